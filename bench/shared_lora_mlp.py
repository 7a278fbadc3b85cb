"""shared_lora_mlp against PEFT's modules, plain torch, and torch without any correction, on MLPs of real models.

Each call takes the next of several layers, so that no provider finds its weights in a cache: as in a model. Adapters of
PEFT have the dtype of the base here; by default it makes them float32, which costs it more.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import cached_property, partial
from typing import Any

import torch
import torch.nn.functional as F
from _harness import Case, check_agreement, measure
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

import llmkern
from llmkern import MlpLora, MlpWeights

# Above the last-level cache of any machine that this is likely to run on.
ROTATION_BYTES = 160e6
BF16, FP32 = torch.bfloat16, torch.float32


class Gated(nn.Module):
    """As transformers writes it for Llama."""

    def __init__(self, weights: MlpWeights) -> None:
        super().__init__()
        for name, weight in zip(("gate_proj", "up_proj", "down_proj"), weights):
            linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
            linear.weight = nn.Parameter(weight, requires_grad=False)
            self.add_module(name, linear)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def as_lora(matrices: list[Tensor]) -> MlpLora:
    """From A and B of gate, up and down."""
    return MlpLora(matrices[:2], matrices[2:4], matrices[4:])


class Layer:
    """Frozen weights in the forms in which providers take them."""

    def __init__(self, weights: MlpWeights, lora: list[Tensor], packing: str | None) -> None:
        self.weights, self.lora, self.rank = weights, lora, lora[0].shape[0]
        self.own, self.factors = weights, as_lora(lora)
        if packing is not None:
            self.own = llmkern.pack_mlp(weights, dtype=packing, group_size=32)
            self.factors = llmkern.pack_lora(self.factors)

    @cached_property
    def peft(self) -> nn.Module:
        config = LoraConfig(r=self.rank, lora_alpha=self.rank, target_modules=["gate_proj", "up_proj", "down_proj"])
        module = inject_adapter_in_model(config, Gated(self.weights))
        for (_, parameter), value in zip(self.adapters(module), self.lora):
            parameter.data = value
        return module

    @staticmethod
    def adapters(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
        return [(name, parameter) for name, parameter in module.named_parameters() if "lora_" in name]


class Draw:
    """Random numbers that leave the size of what they multiply as it is."""

    def __init__(self, device: str, dtype: torch.dtype) -> None:
        self.device, self.dtype, self.generator = device, dtype, torch.Generator().manual_seed(0)

    def __call__(self, *size: int) -> Tensor:
        return (torch.randn(size, generator=self.generator) / size[-1] ** 0.5).to(self.device, self.dtype)

    def weights(self, shape: tuple[int, int]) -> MlpWeights:
        hidden, inner = shape
        return MlpWeights(self(inner, hidden), self(inner, hidden), self(hidden, inner))

    def layer(self, shape: tuple[int, int], rank: int, packing: str | None) -> Layer:
        weights = self.weights(shape)
        lora = [t for w in weights for t in (self(rank, w.shape[1]), self(w.shape[0], rank))]
        return Layer(weights, lora, packing)


class Rotation:
    """Layers of one shape; ``next(name)`` is the next one for that provider."""

    def __init__(self, layers: list[Layer]) -> None:
        self.layers, self.turns = layers, {}

    def next(self, name: str) -> Layer:
        return next(self.turns.setdefault(name, itertools.cycle(self.layers)))


def plain_mlp(x: Tensor, gate: Tensor, up: Tensor, down: Tensor, lora: list[Tensor]) -> Tensor:
    def linear(value: Tensor, weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return F.linear(value, weight) + F.linear(F.linear(value, a), b)

    return linear(F.silu(linear(x, gate, *lora[:2])) * linear(x, up, *lora[2:4]), down, *lora[4:])


def pick(layer: Layer, lora: list[Tensor]) -> list[Tensor]:
    """The corrections of the layer, or those that gradients are asked of."""
    return lora or layer.lora


def ours(x: Tensor, lora: list[Tensor], rotation: Rotation, keep: bool = False) -> Tensor:
    layer = rotation.next("llmkern")
    return llmkern.shared_lora_mlp(x, layer.own, as_lora(lora) if lora else layer.factors, keep=keep)


def plain(x: Tensor, lora: list[Tensor], rotation: Rotation) -> Tensor:
    layer = rotation.next("torch")
    return plain_mlp(x, *layer.weights, pick(layer, lora))


compiled_mlp = torch.compile(plain_mlp)


def compiled(x: Tensor, lora: list[Tensor], rotation: Rotation) -> Tensor:
    layer = rotation.next("torch.compile")
    return compiled_mlp(x, *layer.weights, pick(layer, lora))


def peft(x: Tensor, lora: list[Tensor], rotation: Rotation) -> Tensor:
    module = rotation.next("PEFT").peft
    if not lora:
        return module(x)
    named = {name: value for (name, _), value in zip(Layer.adapters(module), lora)}
    return torch.func.functional_call(module, named, (x,))


def bare(x: Tensor, lora: list[Tensor], rotation: Rotation) -> Tensor:
    """Without any correction: not the same function, and what a merged one would cost."""
    gate, up, down = rotation.next("torch, no LoRA").weights
    return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)


def case(
    shape: tuple[int, int],
    rank: int,
    dtype: torch.dtype,
    tokens: int,
    *,
    packing: str | None = None,
    mode: str = "forward",
    compile: bool = False,
) -> Case:
    hidden, inner = shape
    weight_bytes = {None: dtype.itemsize, "bf16": 2, "int8": 1 + 2 / 32, "int4": 0.5 + 2 / 32}[packing]
    n_base, n_lora = 3 * hidden * inner, 3 * rank * (hidden + inner)

    def inputs(device: str) -> tuple[Any, ...]:
        draw = Draw(device, dtype)
        count = 1 if mode == "full" else max(2, round(ROTATION_BYTES / (n_base * weight_bytes)))
        rotation = Rotation([draw.layer(shape, rank, packing) for _ in range(count)])
        return draw(tokens, hidden), rotation.layers[0].lora if mode == "full" else [], rotation

    def agree(results: dict[str, Any], arguments: tuple[Any, ...]) -> None:
        x, _, rotation = arguments
        first = rotation.layers[0]
        own = first.own if packing is None else first.own.dequantize(dtype)

        def run(type_: torch.dtype, weights: MlpWeights) -> Any:
            leaves = [t.detach().to(type_).requires_grad_() for t in (x, *first.lora)]
            y = plain_mlp(leaves[0], *(w.to(type_) for w in weights), leaves[1:])
            upstream = torch.linspace(-1, 1, y.numel(), device=y.device).roll(7).view(y.shape).to(dtype).to(type_)
            return y.detach() if mode == "forward" else torch.autograd.grad(y, leaves, upstream)

        same = {"llmkern": results["llmkern"], "torch": run(dtype, own)}
        check_agreement(this, same, run(torch.float64, own))
        others = {name: result for name, result in results.items() if name not in ("llmkern", "torch, no LoRA")}
        check_agreement(this, others, run(torch.float64, first.weights))

    providers: dict[str, Callable[..., Any]] = {"llmkern": ours, "PEFT": peft, "torch": plain}
    if mode == "forward":
        providers["torch, no LoRA"] = bare
    else:
        # With the pre-activations saved, as the others save them.
        providers["llmkern, keep=True"] = partial(ours, keep=True)
    if compile:
        providers["torch.compile"] = compiled
    passes = 1 if mode == "forward" else 2
    this = Case(
        op="shared_lora_mlp",
        name=f"{hidden}x{inner}-r{rank}-N{tokens}" + (f"-{packing}" if packing not in (None, "bf16") else ""),
        dtype=dtype,
        shape={"H": hidden, "I": inner, "R": rank, "N": tokens},
        inputs=inputs,
        providers=providers,
        bytes=n_base * weight_bytes + n_lora * dtype.itemsize,
        flops=tokens * 2 * (passes * n_base + (3 if mode == "full" else 1) * n_lora),
        mode=mode,
        agree=agree,
    )
    return this


class Warmup:
    """One layer of Single Layer Warmup: its MLP, the one that it gave up, and what that gives on some tokens."""

    def __init__(self, x: Tensor, layer: Layer, teacher: MlpWeights) -> None:
        self.x, self.student, self.teacher = x, Rotation([layer]), teacher
        self.gated = Gated(teacher)
        self.target = self.gated(x)


def by_op(warmup: Warmup) -> Tensor:
    return llmkern.shared_lora_mlp(warmup.x, warmup.teacher)


def by_torch(warmup: Warmup) -> Tensor:
    return warmup.gated(warmup.x)


def from_disk(warmup: Warmup) -> Tensor:
    return warmup.target


def warmup_loss(forward: Callable[..., Tensor], teach: Callable[[Warmup], Tensor]) -> Callable[..., Tensor]:
    def loss(lora: list[Tensor], warmup: Warmup) -> Tensor:
        with torch.no_grad():
            target = teach(warmup)
        return F.mse_loss(forward(warmup.x, lora, warmup.student).float(), target.float())

    return loss


def warmup_case(shape: tuple[int, int], rank: int, dtype: torch.dtype, tokens: int) -> Case:
    """A step without its optimizer: the teacher's outputs as they lie on disk, or computed in each step."""
    hidden, inner = shape
    n_base, n_lora = 3 * hidden * inner, 3 * rank * (hidden + inner)

    def inputs(device: str) -> tuple[Any, ...]:
        draw = Draw(device, dtype)
        layer, teacher = draw.layer(shape, rank, None), draw.weights(shape)
        return layer.lora, Warmup(draw(tokens, hidden), layer, teacher)

    def agree(results: dict[str, Any], arguments: tuple[Any, ...]) -> None:
        lora, warmup = arguments
        (layer,) = warmup.student.layers

        def run(type_: torch.dtype) -> Any:
            leaves = [t.detach().to(type_).requires_grad_() for t in lora]
            x, wide = warmup.x.to(type_), torch.promote_types(type_, FP32)
            target = Gated(MlpWeights(*(w.to(type_) for w in warmup.teacher)))(x).to(wide)
            y = plain_mlp(x, *(w.to(type_) for w in layer.weights), leaves)
            # What the harness asks for is minus the gradient.
            return torch.autograd.grad(-F.mse_loss(y.to(wide), target), leaves)

        check_agreement(this, {**results, "torch": run(dtype)}, run(torch.float64))

    keep = partial(ours, keep=True)
    this = Case(
        op="shared_lora_mlp",
        name=f"{hidden}x{inner}-r{rank}-N{tokens}",
        dtype=dtype,
        shape={"H": hidden, "I": inner, "R": rank, "N": tokens},
        inputs=inputs,
        providers={
            "llmkern": warmup_loss(keep, from_disk),
            "llmkern, teacher each step": warmup_loss(keep, by_op),
            "PEFT": warmup_loss(peft, from_disk),
            "PEFT, teacher each step": warmup_loss(peft, by_torch),
        },
        bytes=(n_base + n_lora) * dtype.itemsize,
        # x needs no gradient: backward is one product of base weights, of down, and no product of LoRA with A.
        flops=tokens * 2 * (n_base * 4 // 3 + 3 * n_lora),
        mode="warmup",
        agree=agree,
    )
    return this


SMALL, MIDDLE, LARGE = (576, 1536), (896, 4864), (4096, 11008)
test_decode = measure(
    [
        case(SMALL, 16, BF16, 1, packing="bf16", compile=True),
        case(MIDDLE, 64, BF16, 1, packing="bf16", compile=True),
        case(LARGE, 64, BF16, 1, packing="bf16"),
        case(LARGE, 64, BF16, 1, packing="int8"),
        case(LARGE, 64, BF16, 1, packing="int4"),
        case(MIDDLE, 64, BF16, 4, packing="bf16"),
    ]
)
test_prefill = measure(
    [
        case(MIDDLE, 64, BF16, 512, compile=True),
        case(MIDDLE, 64, FP32, 512),
        case(LARGE, 64, BF16, 512),
        case(MIDDLE, 64, BF16, 512, packing="int8"),
        case(MIDDLE, 64, BF16, 512, packing="int4"),
        case(MIDDLE, 64, BF16, 16, packing="int4"),
        case(MIDDLE, 64, FP32, 16),
    ]
)
test_training = measure([case(MIDDLE, 64, dtype, 512, mode="full") for dtype in (BF16, FP32)])
test_warmup = measure([warmup_case(MIDDLE, 64, dtype, 512) for dtype in (BF16, FP32)])
