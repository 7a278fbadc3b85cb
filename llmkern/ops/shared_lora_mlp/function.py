"""The public function, its ops and its gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from llmkern._library import define_op
from llmkern.ops.shared_lora_mlp.arguments import MlpLora, MlpWeights, flatten_arguments
from llmkern.ops.shared_lora_mlp.packed import PackedMlp
from llmkern.ops.shared_lora_mlp.reference import shared_lora_mlp_backward_reference, shared_lora_mlp_reference


def _fake_forward(
    x: Tensor,
    weights: Sequence[Tensor | None],
    group_size: int,
    lora: Any,
    scaling: Any,
    masks: Any,
    act: str,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    if len(weights) == 2:
        assert weights[0] is not None
        inner, parts = weights[0].shape[0], weights[0].shape[1] - 1
    else:
        assert weights[1] is not None
        inner, parts = weights[1].shape[0], 1 if weights[0] is None else 2
    return x.new_empty(x.shape), x.new_empty((parts, x.shape[0], inner) if keep else 0)


def _fake_backward(
    dy: Tensor, x: Tensor, kept: Tensor, weights: Any, group_size: int, lora: Any, *rest: Any
) -> list[Tensor]:
    likes = [x, *(weights if len(weights) == 3 else [None] * 3), *lora]
    return [
        torch.empty(like.shape, dtype=like.dtype, device=like.device) if need and like is not None else x.new_empty(0)
        for like, need in zip(likes, rest[-1])
    ]


_COMMON = "Tensor?[] weights, int group_size, Tensor?[] lora, float[] scaling, Tensor?[] masks, str activation"
define_op(
    "shared_lora_mlp_fwd",
    f"(Tensor x, {_COMMON}, bool keep) -> (Tensor, Tensor)",
    stem="shared_lora_mlp",
    reference=shared_lora_mlp_reference,
    fake=_fake_forward,
)
define_op(
    "shared_lora_mlp_bwd",
    f"(Tensor dy, Tensor x, Tensor kept, {_COMMON}, bool[] needs) -> Tensor[]",
    stem="shared_lora_mlp",
    reference=shared_lora_mlp_backward_reference,
    fake=_fake_backward,
)


class _SharedLoraMlp(torch.autograd.Function):
    @staticmethod
    def forward(
        group_size: int, scaling: list[float], activation: str, keep: bool, x: Tensor, *tensors: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        # The masks and the matrices of LoRA have fixed numbers; the weights are the rest, packed or not.
        masks, lora, weights = tensors[:3], tensors[3:9], tensors[9:]
        return torch.ops.llmkern.shared_lora_mlp_fwd(x, weights, group_size, lora, scaling, masks, activation, keep)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.group_size, ctx.scaling, ctx.activation, _, *tensors = inputs
        ctx.save_for_backward(output[1], *tensors)
        ctx.mark_non_differentiable(output[1])
        # Or backward would be handed zeros of the size of what was kept.
        ctx.set_materialize_grads(False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return (None,) * len(ctx.needs_input_grad)
        kept, x, *tensors = ctx.saved_tensors
        masks, lora, weights = tensors[:3], tensors[3:9], tensors[9:]
        asked = ctx.needs_input_grad[4:]
        packed = len(weights) == 2
        needs = [asked[0], *([False] * 3 if packed else asked[10:13]), *asked[4:10]]
        dx, *grads = torch.ops.llmkern.shared_lora_mlp_bwd(
            dy, x, kept, weights, ctx.group_size, lora, ctx.scaling, masks, ctx.activation, needs
        )
        dweights, dlora = grads[:3], grads[3:]
        given = [dx, None, None, None, *dlora, *([None] * 2 if packed else dweights)]
        return None, None, None, None, *(grad if need else None for grad, need in zip(given, asked))


def shared_lora_mlp(
    x: Tensor,
    weights: MlpWeights | PackedMlp,
    lora: MlpLora | None = None,
    *,
    activation: str = "silu",
    dropout: float = 0.0,
    keep: bool = False,
) -> Tensor:
    r"""An MLP of shared base weights with the low-rank correction of one layer, in one op (SHARP, arXiv 2502.07832).

    .. math::  y = W_d h, \qquad h = act(W_g x) \odot W_u x, \qquad W_p = base_p + s_p B_p A_p

    Where several layers share the base no correction can be merged into it, so the products are never formed: what is
    added to a row of x costs 2 r numbers for each projection, and no delta of full width is written.

    Args:
        x: (..., H) in float32, float16, bfloat16 or float64; computed in float32 (float64).
        weights: MlpWeights in the dtype of x: gate and up (I, H), down (H, I); without a gate h = act(W_u x). Or what
            ``pack_mlp`` made of them, with any x.
        lora: pairs A (r, in) and B (out, r), any of them absent, of unequal ranks, and their scaling; in the dtype of
            x, or in float32 with x in half precision.
        activation: ``"silu"`` (SwiGLU), ``"gelu"`` and ``"gelu_tanh"`` (GEGLU), ``"relu"``.
        dropout: probability with which each input of each A is dropped, as LoRA is trained: a mask for each projection,
            drawn from torch's generator. Pass zero (the default) outside of training.
        keep: keep the two pre-activations for the backward pass, 2 I numbers a row in the dtype of x. By default only x
            is saved, and they are computed again.

    Returns:
        (..., H) in the dtype of x. Under autocast x, weights and lora are cast as ``nn.Linear`` would cast them.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or options that do not fit.

    Differentiable once in x, lora and weights (not packed ones); what needs no gradient costs nothing. 6 I H + 6 r
    (I + H) flops a row, and twice these backward with frozen weights; 2 I H more where pre-activations are computed
    again, for each of the projections before the activation.
    """
    if torch.is_autocast_enabled(x.device.type):
        cast = _autocast(x, weights, lora)
        with torch.autocast(x.device.type, enabled=False):
            return shared_lora_mlp(*cast, activation=activation, dropout=dropout, keep=keep)
    flat = flatten_arguments(x, weights, lora, activation, dropout)
    masks, scaling = _draw_masks(flat.x, flat.lora, flat.scaling, dropout)
    tensors = (flat.x, *masks, *flat.lora, *flat.weights)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        y = _SharedLoraMlp.apply(flat.group_size, scaling, activation, keep, *tensors)[0]
    else:
        y = torch.ops.llmkern.shared_lora_mlp_fwd(
            flat.x, flat.weights, flat.group_size, flat.lora, scaling, masks, activation, False
        )[0]
    return y.reshape(x.shape)


def _draw_masks(
    x: Tensor, lora: list[Tensor | None], scaling: list[float], dropout: float
) -> tuple[list[Tensor | None], list[float]]:
    """Which inputs of each A survive, and the scaling divided by their share."""
    if dropout == 0:
        return [None] * 3, scaling
    masks = [
        None
        if a is None
        else torch.empty((x.shape[0], a.shape[1]), dtype=torch.bool, device=x.device).bernoulli_(1 - dropout)
        for a in lora[::2]
    ]
    return masks, [s / (1 - dropout) for s in scaling]


def _autocast(
    x: Tensor, weights: MlpWeights | PackedMlp, lora: MlpLora | None
) -> tuple[Tensor, MlpWeights | PackedMlp, MlpLora | None]:
    dtype = torch.get_autocast_dtype(x.device.type)

    def cast(t: Tensor) -> Tensor:
        return t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t

    if isinstance(weights, MlpWeights):
        weights = MlpWeights(*(None if w is None else cast(w) for w in weights))  # type: ignore[arg-type]
    if lora is not None:
        pairs = [None if pair is None else (cast(pair[0]), cast(pair[1])) for pair in lora[:3]]
        lora = MlpLora(pairs[0], pairs[1], pairs[2], lora.scaling)
    return cast(x), weights, lora
