"""The exact route: tiles that read what depends on the distance from its table, never a mask of N x M."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from llmkern._library import define_op
from llmkern.ops.rope_attention.reference import compute_dtype
from llmkern.ops.toeplitz_attention.arguments import Arguments
from llmkern.ops.toeplitz_attention.reference import toeplitz_exact_backward_reference, toeplitz_exact_reference

define_op(
    "toeplitz_exact_fwd",
    "(Tensor q, Tensor k, Tensor v, Tensor relative, Tensor? support, Tensor? key_bias, bool is_causal, float scale)"
    " -> (Tensor, Tensor)",
    stem="toeplitz_attention",
    reference=toeplitz_exact_reference,
    fake=lambda q, k, v, *_: (
        q.new_empty((*q.shape[:3], v.shape[3]), dtype=compute_dtype(q.dtype)),
        q.new_empty(q.shape[:3], dtype=compute_dtype(q.dtype)),
    ),
)
define_op(
    "toeplitz_exact_bwd",
    "(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor relative, Tensor? support, Tensor? key_bias, Tensor out,"
    " Tensor lse, bool is_causal, float scale, bool want_relative) -> (Tensor, Tensor, Tensor, Tensor)",
    stem="toeplitz_attention",
    reference=toeplitz_exact_backward_reference,
    fake=lambda grad, q, k, v, relative, support, key_bias, out, lse, is_causal, scale, want_relative: (
        *(torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v)),
        torch.empty(relative.shape if want_relative else (0,), dtype=relative.dtype, device=q.device),
    ),
)


class _ExactAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        relative: Tensor,
        support: Tensor | None,
        key_bias: Tensor | None,
        is_causal: bool,
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        return torch.ops.llmkern.toeplitz_exact_fwd(q, k, v, relative, support, key_bias, is_causal, scale)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        *tensors, ctx.is_causal, ctx.scale = inputs
        ctx.save_for_backward(*tensors, *output)
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        options = (ctx.is_causal, ctx.scale, ctx.needs_input_grad[3])
        grads = torch.ops.llmkern.toeplitz_exact_bwd(grad, *ctx.saved_tensors, *options)
        return *(g if need else None for g, need in zip(grads, ctx.needs_input_grad)), None, None, None, None


def exact_attention(args: Arguments) -> Tensor:
    *inputs, _ = args
    return _ExactAttention.apply(*inputs)[0].to(args.v.dtype)
