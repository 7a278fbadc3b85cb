"""Cases of shared_lora_mlp for Triton's interpreter (triton_interpreter_worker.py): launchers against references."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from cases.shared_lora_mlp import NAMES, SCALING, make
from oracle import assert_close, farther, map_tensors, nudge
from torch import Tensor

from llmkern.kernels import _mlp
from llmkern.kernels import shared_lora_mlp as kernels
from llmkern.ops.shared_lora_mlp import MlpWeights, pack_mlp, reference

BOTH = (reference.shared_lora_mlp_reference, reference.shared_lora_mlp_backward_reference)
OURS = (kernels.shared_lora_mlp_fwd, kernels.shared_lora_mlp_bwd)
SMALL_TILES = dict.fromkeys(_mlp.MLP_TILES, (16, 16, 16, 4, 2))


def everything(forward: Callable[..., Any], backward: Callable[..., Any], args: tuple[Any, ...]) -> dict[str, Tensor]:
    y, kept = forward(*args)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64).to(y)
    x, *common, _ = args
    grads = backward(dy, x, kept, *common, [True] * 10)
    named = {name: grad for name, grad in zip(NAMES, grads) if grad.numel()}
    return {"y": y, **({"kept": kept} if kept.numel() else {}), **named}


def check(
    rows: int,
    width: int,
    dtype: torch.dtype,
    ranks: tuple[int, int, int] = (3, 20, 2),
    *,
    gated: bool = True,
    activation: str = "silu",
    keep: bool = False,
    masked: bool = False,
    packing: str | None = None,
    lora_dtype: torch.dtype | None = None,
) -> None:
    x, *tensors = make(rows, width, dtype, "cpu", gated=gated, ranks=ranks)
    weights, lora, group = tensors[:3], tensors[3:], 0
    if packing is not None:
        packed = pack_mlp(MlpWeights(*weights), dtype=packing, group_size=32)
        weights, group = [packed.data, packed.scales], packed.group_size
    if lora_dtype is not None:
        lora = [None if t is None else t.to(lora_dtype) for t in lora]
    masks = [None] * 3
    if masked:
        generator = torch.Generator().manual_seed(4)
        masks = [torch.rand(rows, n, generator=generator) < 0.6 for n in (width, width, width // 3 + 11)]
    args = (x, weights, group, lora, list(SCALING), masks, activation, keep)

    def changed(change: Callable[[Tensor], Tensor]) -> tuple[Any, ...]:
        base = weights if packing else map_tensors(weights, change)
        return (change(x), base, group, map_tensors(lora, change), *args[4:])

    truth, base = everything(*BOTH, changed(torch.Tensor.double)), everything(*BOTH, args)
    moved = everything(*BOTH, changed(nudge)) if dtype == torch.float32 else base
    before = changed(torch.Tensor.clone)
    with mock.patch.dict(_mlp.MLP_TILES, SMALL_TILES):
        ours = everything(*OURS, args)
    for now, then in zip([x, *lora], [before[0], *before[3]]):
        assert now is None or torch.equal(now, then), "an input was written to"
    assert ours.keys() == truth.keys()
    for name, wanted in truth.items():
        assert (ours[name].shape, ours[name].dtype) == (wanted.shape, base[name].dtype), name
        # Rounding of LoRA in float32 is that of h and of the gradients that reach it, in the dtype of x.
        assert_close(name, ours[name], wanted, farther(wanted, base[name], moved[name]), dtype, 2.0)


def check_needs() -> None:
    """Each gradient alone is the same as among all of them, and no other is returned."""
    x, *tensors = make(9, 20, torch.float32, "cpu", gated=True, ranks=(3, 2, 4))
    common = (tensors[:3], 0, tensors[3:], list(SCALING), [None] * 3, "silu")
    dy = torch.linspace(-1, 1, x.numel()).view_as(x)
    for kept in (x.new_empty(0), kernels.shared_lora_mlp_fwd(x, *common, True)[1]):
        together = kernels.shared_lora_mlp_bwd(dy, x, kept, *common, [True] * 10)
        for wanted in range(10):
            alone = kernels.shared_lora_mlp_bwd(dy, x, kept, *common, [i == wanted for i in range(10)])
            for i, grad in enumerate(alone):
                assert torch.equal(grad, together[i]) if i == wanted else grad.numel() == 0, (wanted, i)


def check_strides() -> None:
    """Nothing is contiguous."""
    x, *tensors = make(9, 20, torch.float32, "cpu", gated=True, ranks=(3, 2, 4))

    def spread(t: Tensor) -> Tensor:
        return torch.stack([t, t], -1).mT.contiguous().mT[..., 0].mT.contiguous().mT

    results = []
    for change in (spread, torch.Tensor.contiguous):
        weights, lora = ([change(t) for t in part] for part in (tensors[:3], tensors[3:]))
        args = (change(x), weights, 0, lora, list(SCALING), [None] * 3, "silu", False)
        results.append(everything(*OURS, args))
    for name, value in results[0].items():
        torch.testing.assert_close(value, results[1][name])


def check_edges() -> None:
    """No tokens; NaN stays in its row."""
    x, *tensors = make(5, 20, torch.float32, "cpu", gated=True, ranks=(3, 0, 4))
    common = (tensors[:3], 0, tensors[3:], list(SCALING), [None] * 3, "silu")
    y, _ = kernels.shared_lora_mlp_fwd(x[:0], *common, False)
    assert y.shape == (0, 20)
    x[3, 2] = torch.nan
    y, _ = kernels.shared_lora_mlp_fwd(x, *common, False)
    assert y.isnan().any(1).tolist() == [False, False, False, True, False]


def cases() -> Iterator[tuple[str, Callable[[], None]]]:
    def named(name: str, run: Callable[..., None], *args: Any, **options: Any) -> tuple[str, Callable[[], None]]:
        return f"shared_lora_mlp-{name}", lambda: run(*args, **options)

    half, single = torch.float16, torch.float32
    yield named("silu", check, 21, 50, single)
    yield named("silu-float16", check, 18, 40, half)
    yield named("one-token", check, 1, 37, single)
    yield named("one-entry", check, 1, 1, single, (1, 1, 1))
    yield named("gelu-kept", check, 18, 33, single, activation="gelu", keep=True)
    yield named("gelu_tanh-kept-float16", check, 18, 33, half, activation="gelu_tanh", keep=True)
    yield named("relu-plain", check, 18, 33, single, (0, 5, 0), gated=False, activation="relu")
    yield named("plain-kept", check, 18, 33, single, (0, 0, 3), gated=False, activation="gelu", keep=True)
    yield named("no-lora", check, 18, 33, single, (0, 0, 0))
    yield named("dropout", check, 18, 33, single, masked=True)
    yield named("dropout-plain", check, 18, 33, single, (0, 2, 3), gated=False, masked=True)
    yield named("wide-lora-float16", check, 18, 33, half, lora_dtype=single)
    for packing in ("bf16", "int8", "int4"):
        yield named(f"{packing}", check, 2, 70, single, packing=packing)
        yield named(f"{packing}-float16", check, 18, 70, half, packing=packing)
    yield named("int4-plain", check, 3, 40, single, (0, 2, 3), gated=False, packing="int4")
    yield named("needs", check_needs)
    yield named("strides", check_strides)
    yield named("edges", check_edges)
