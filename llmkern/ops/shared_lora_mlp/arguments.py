"""What shared_lora_mlp accepts, and the flat form in which the ops take it."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from llmkern._library import bad_type, bad_value
from llmkern.ops.shared_lora_mlp.packed import PackedMlp

OP = "shared_lora_mlp"
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

LoraPair = tuple[Tensor, Tensor]


class MlpWeights(NamedTuple):
    """Weights in the layout of nn.Linear: gate and up (I, H), down (H, I); gate is None in an MLP without a gate."""

    gate: Tensor | None
    up: Tensor
    down: Tensor


class MlpLora(NamedTuple):
    """Low-rank corrections (A, B), A (r, in) and B (out, r), of gate, up and down; None where a projection has none.

    Ranks may differ. ``scaling`` is one number, or three for gate, up and down; in PEFT's words lora_alpha / r.
    """

    gate: LoraPair | None = None
    up: LoraPair | None = None
    down: LoraPair | None = None
    scaling: float | tuple[float, float, float] = 1.0


class FlatArguments(NamedTuple):
    """Arguments as the ops take them; ``weights`` is (gate, up, down), or (data, scales) of packed ones."""

    x: Tensor
    weights: list[Tensor | None]
    group_size: int
    lora: list[Tensor | None]
    scaling: list[float]


def flatten_arguments(
    x: Tensor, weights: MlpWeights | PackedMlp, lora: MlpLora | None, activation: str, dropout: float
) -> FlatArguments:
    """Checks everything; x comes out as rows (N, H)."""
    if activation not in ACTIVATIONS:
        raise bad_value(OP, f"activation to be one of {', '.join(ACTIVATIONS)}", repr(activation))
    if not 0 <= dropout < 1:
        raise bad_value(OP, "dropout in [0, 1)", dropout)
    if x.dtype not in DTYPES:
        raise bad_type(OP, "x of dtype float32, float16, bfloat16 or float64", x.dtype, "cast it")
    if isinstance(weights, PackedMlp):
        hidden, inner, gated = weights.hidden_size, weights.intermediate_size, weights.gated
        flat: list[Tensor | None] = [weights.data, weights.scales]
        group_size = weights.group_size
        if weights.data.device != x.device:
            raise bad_value(
                OP, f"packed weights on the device of x, {x.device}", weights.data.device, "move them there"
            )
    else:
        hidden, inner = _check_weights(x, weights)
        gated, flat, group_size = weights.gate is not None, list(weights), 0
    if x.dim() == 0 or x.shape[-1] != hidden:
        raise bad_value(OP, f"x of shape (..., {hidden}), as the weights have it", tuple(x.shape))
    pairs = _check_lora(x, lora, hidden, inner, gated)
    return FlatArguments(x.reshape(-1, hidden), flat, group_size, pairs, _scalings(lora))


def _check_weights(x: Tensor, weights: MlpWeights) -> tuple[int, int]:
    gate, up, down = weights
    if up.dim() != 2 or 0 in up.shape:
        raise bad_value(OP, "up of shape (I, H), neither of them zero", tuple(up.shape))
    inner, hidden = up.shape
    for name, weight, shape in (("gate", gate, (inner, hidden)), ("down", down, (hidden, inner))):
        if weight is not None and weight.shape != shape:
            raise bad_value(OP, f"{name} of shape {shape}, to fit up {tuple(up.shape)}", tuple(weight.shape))
    for name, weight in zip(weights._fields, weights):
        _check_kind(name, weight, (x.dtype,), x)
    return hidden, inner


def _check_lora(x: Tensor, lora: MlpLora | None, hidden: int, inner: int, gated: bool) -> list[Tensor | None]:
    if lora is None:
        return [None] * 6
    if lora.gate is not None and not gated:
        raise bad_value(OP, "no lora.gate for weights without a gate", "one", "drop it")
    # LoRA in float32 over a half base is how PEFT trains by default.
    allowed = (x.dtype, torch.float32) if x.dtype in (torch.float16, torch.bfloat16) else (x.dtype,)
    flat: list[Tensor | None] = []
    for name, pair, (ins, outs) in zip(
        ("gate", "up", "down"), lora[:3], ((hidden, inner), (hidden, inner), (inner, hidden))
    ):
        if pair is None:
            flat += [None, None]
            continue
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise bad_type(OP, f"lora.{name} as a pair (A, B) of tensors, or None", type(pair).__name__)
        a, b = pair
        if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1] or (b.shape[0], a.shape[1]) != (outs, ins):
            got = f"{tuple(a.shape)} and {tuple(b.shape)}"
            raise bad_value(OP, f"lora.{name} as A (r, {ins}) and B ({outs}, r) of one rank r", got)
        _check_kind(f"lora.{name}[0]", a, allowed, x)
        _check_kind(f"lora.{name}[1]", b, allowed, x)
        # A rank of zero is no correction at all.
        flat += [a, b] if a.shape[0] else [None, None]
    kinds = {t.dtype for t in flat if t is not None}
    if len(kinds) > 1:
        raise bad_type(OP, "lora matrices of one dtype", " and ".join(sorted(map(str, kinds))), "cast them")
    return flat


def _check_kind(name: str, tensor: Tensor | None, dtypes: tuple[torch.dtype, ...], x: Tensor) -> None:
    if tensor is None:
        return
    if tensor.dtype not in dtypes:
        wanted = " or ".join(str(dtype) for dtype in dtypes)
        raise bad_type(OP, f"{name} of dtype {wanted}, to go with x", tensor.dtype, "cast one of them")
    if tensor.device != x.device:
        raise bad_value(OP, f"{name} on the device of x, {x.device}", tensor.device, "move it there")


def _scalings(lora: MlpLora | None) -> list[float]:
    given = 1.0 if lora is None else lora.scaling
    three = [float(s) for s in given] if isinstance(given, tuple | list) else [float(given)] * 3
    if len(three) != 3 or not all(math.isfinite(s) for s in three):
        raise bad_value(OP, "lora.scaling as one finite number, or three for gate, up and down", given)
    return three
