"""Cases of shared_lora_mlp: rows are tokens, width is H."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import llmkern
from cases.case import Case

NAMES = ("x", "gate", "up", "down", "A_gate", "B_gate", "A_up", "B_up", "A_down", "B_down")
WIDTHS = (1, 16, 17, 65, 300)
SCALING = (0.5, 1.5, -0.75)
ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}


def make(
    rows: int, width: int, dtype: torch.dtype, device: str, *, gated: bool, ranks: tuple[int, int, int], times: int = 1
) -> list[Tensor | None]:
    """Ranks of zero are absent pairs; ``times`` rows for each that is asked for."""
    generator = torch.Generator().manual_seed(rows * 1000 + width)
    hidden, inner = width, width // 3 + 11

    def normal(*shape: int) -> Tensor:
        return (torch.randn(shape, generator=generator, dtype=torch.float64) / shape[-1] ** 0.5).to(device, dtype)

    x = (torch.randn((times * rows, hidden), generator=generator, dtype=torch.float64) * 1.5).to(device, dtype)
    weights = [normal(inner, hidden) if gated else None, normal(inner, hidden), normal(hidden, inner)]
    pairs: list[Tensor | None] = []
    for rank, (ins, outs) in zip(ranks, ((hidden, inner), (hidden, inner), (inner, hidden))):
        pairs += [normal(rank, ins), normal(outs, rank)] if rank else [None, None]
    return [x, *weights, *pairs]


def lora_of(pairs: tuple[Tensor | None, ...]) -> llmkern.MlpLora:
    present = [None if a is None else (a, b) for a, b in zip(pairs[::2], pairs[1::2])]
    return llmkern.MlpLora(*present, scaling=SCALING)


def apply(x: Tensor, *tensors: Tensor | None, **options: Any) -> Tensor:
    return llmkern.shared_lora_mlp(x, llmkern.MlpWeights(*tensors[:3]), lora_of(tensors[3:]), **options)


def plain(x: Tensor, *tensors: Tensor | None, activation: str = "silu", keep: bool = False) -> Tensor:
    """As one would write it, in the dtype of x throughout."""
    (gate, up, down), pairs = tensors[:3], tensors[3:]

    def linear(part: int, value: Tensor, weight: Tensor) -> Tensor:
        a, b = pairs[2 * part : 2 * part + 2]
        out = F.linear(value, weight)
        return out if a is None else out + SCALING[part] * F.linear(F.linear(value, a), b)

    act = ACTIVATIONS[activation]
    h = act(linear(1, x, up)) if gate is None else act(linear(0, x, gate)) * linear(1, x, up)
    return linear(2, h, down)


def raw_calls(
    x: Tensor, weights: list[Tensor | None], group_size: int, pairs: list[Tensor | None], activation: str, keep: bool
) -> list[tuple[Any, tuple[Any, ...]]]:
    ops = torch.ops.llmkern
    common = (weights, group_size, pairs, list(SCALING), [None] * 3, activation)
    y, kept = ops.shared_lora_mlp_fwd(x, *common, keep)
    needs = [True] * 10
    return [
        (ops.shared_lora_mlp_fwd.default, (x, *common, keep)),
        (ops.shared_lora_mlp_bwd.default, (torch.randn_like(y), x, kept, *common, needs)),
    ]


def raw(tensors: list[Tensor | None], *, activation: str = "silu", keep: bool = False) -> list[Any]:
    x = tensors[0]
    assert x is not None
    return raw_calls(x, tensors[1:4], 0, tensors[4:], activation, keep)


def case(name: str, *, gated: bool, ranks: tuple[int, int, int], times: int = 1, **options: Any) -> Case:
    return Case(
        f"shared_lora_mlp-{name}",
        functools.partial(make, gated=gated, ranks=ranks, times=times),
        NAMES,
        functools.partial(apply, **options),
        functools.partial(plain, **options),
        functools.partial(raw, **options),
        widths=WIDTHS,
        large=((1, 1500), (5, 700)) if times == 1 else ((32, 150), (3, 500)),
    )


class Packed:
    """A case whose base is packed: x and LoRA alone take gradients. Packs are made by ``make``, one for each width."""

    def __init__(self, dtype: str, group_size: int) -> None:
        self.dtype, self.group_size = dtype, group_size
        self.packs: dict[tuple[int, str], llmkern.PackedMlp] = {}

    def make(self, rows: int, width: int, dtype: torch.dtype, device: str) -> list[Tensor | None]:
        weights = make(rows, width, torch.float32, device, gated=True, ranks=(3, 17, 2))[1:4]
        others = make(rows, width, dtype, device, gated=True, ranks=(3, 17, 2))
        packed = llmkern.pack_mlp(llmkern.MlpWeights(*weights), dtype=self.dtype, group_size=self.group_size)
        self.packs[width, device] = packed
        return [others[0], *others[4:]]

    def function(self, x: Tensor, *pairs: Tensor | None) -> Tensor:
        return llmkern.shared_lora_mlp(x, self.packs[x.shape[1], x.device.type], lora_of(pairs), keep=False)

    def reference(self, x: Tensor, *pairs: Tensor | None) -> Tensor:
        return plain(x, *self.packs[x.shape[1], x.device.type].dequantize(x.dtype), *pairs)

    def raw(self, tensors: list[Tensor | None]) -> list[Any]:
        x = tensors[0]
        assert x is not None
        packed = self.packs[x.shape[1], x.device.type]
        return raw_calls(x, [packed.data, packed.scales], packed.group_size, tensors[1:], "silu", False)

    def case(self) -> Case:
        names = (NAMES[0], *NAMES[4:])
        sizes = {"widths": WIDTHS, "large": ((1, 1500), (40, 300))}
        return Case(f"shared_lora_mlp-{self.dtype}", self.make, names, self.function, self.reference, self.raw, **sizes)


CASES = [
    case("silu", gated=True, ranks=(4, 9, 3)),
    case("gelu-many", gated=True, ranks=(2, 0, 17), times=5, activation="gelu", keep=True),
    case("relu-plain", gated=False, ranks=(0, 5, 0), activation="relu"),
    case("gelu_tanh-many", gated=True, ranks=(0, 0, 0), times=5, activation="gelu_tanh"),
    Packed("bf16", 0).case(),
    Packed("int8", 64).case(),
    Packed("int4", 32).case(),
]
