"""vas_score: the public function, its op and its gradient.

A quadratic form needs half of the matrix: x^T S x = x^T U x with U_jj = S_jj, U_ij = S_ij + S_ji above the diagonal and
zero below. That is exact for any square S, so neither a factor nor positive eigenvalues are asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from llmkern._library import bad_type, bad_value, define_op
from llmkern.ops.embeddings import Embeddings, check_embeddings, check_precision, compute_dtype, row_blocks, widen


def vas_score_reference(x: Tensor, sigma: Tensor, y: Tensor | None, bf16: bool) -> Tensor:
    """(N,) in fp32 (float64); differentiable."""
    s = widen(sigma, bf16)
    parts = []
    for block in row_blocks(*x.shape):
        left = widen(x[block], bf16)
        parts.append(((left @ s) * (left if y is None else widen(y[block], bf16))).sum(-1))
    return torch.cat(parts) if parts else x.new_empty(0, dtype=compute_dtype(x.dtype))


def vas_score_backward_reference(
    dout: Tensor, x: Tensor, sigma: Tensor, y: Tensor | None, needs: Sequence[bool]
) -> list[Tensor]:
    """Gradients of (x, sigma, y); an empty tensor stands where ``needs`` asks for none.

    dx = dout (S y), dy = dout (S^T x), dS = sum_i dout_i x_i y_i^T; with y = x the first two add up.
    """
    s = sigma.to(compute_dtype(x.dtype))
    # At most one product a row for the quadratic form.
    folded = s + s.t() if y is None else s
    dx = torch.empty_like(x, memory_format=torch.contiguous_format) if needs[0] else dout.new_empty(0)
    dsigma = torch.zeros_like(s, memory_format=torch.contiguous_format) if needs[1] else dout.new_empty(0)
    want_y = y is not None and needs[2]
    dy = torch.empty_like(y, memory_format=torch.contiguous_format) if want_y and y is not None else dout.new_empty(0)
    for block in row_blocks(*x.shape):
        left = widen(x[block])
        right = left if y is None else widen(y[block])
        weighted = dout[block].unsqueeze(-1) * right
        if needs[0]:
            dx[block] = (weighted @ folded.t()).to(x.dtype)
        if needs[1]:
            dsigma += left.t() @ weighted
        if want_y:
            dy[block] = ((dout[block].unsqueeze(-1) * left) @ s).to(dy.dtype)
    return [dx, dsigma.to(sigma.dtype) if needs[1] else dsigma, dy]


def _empty_gradients(dout: Tensor, x: Tensor, sigma: Tensor, y: Tensor | None, needs: Sequence[bool]) -> list[Tensor]:
    return [
        torch.empty(like.shape, dtype=like.dtype, device=like.device)
        if need and like is not None
        else dout.new_empty(0)
        for like, need in zip((x, sigma, y), needs)
    ]


define_op(
    "vas_score_fwd",
    "(Tensor x, Tensor sigma, Tensor? y, bool bf16) -> Tensor",
    stem="vas_score",
    reference=vas_score_reference,
    fake=lambda x, sigma, y, bf16: x.new_empty(x.shape[0], dtype=compute_dtype(x.dtype)),
)
define_op(
    "vas_score_bwd",
    "(Tensor dout, Tensor x, Tensor sigma, Tensor? y, bool[] needs) -> Tensor[]",
    stem="vas_score",
    reference=vas_score_backward_reference,
    fake=_empty_gradients,
)


def gram_reference(x: Tensor) -> Tensor:
    """x^T x in fp32 (float64)."""
    total = x.new_zeros(x.shape[1], x.shape[1], dtype=compute_dtype(x.dtype))
    for block in row_blocks(*x.shape):
        rows = widen(x[block])
        total += rows.t() @ rows
    return total


define_op(
    "gram",
    "(Tensor x) -> Tensor",
    stem="vas_score",
    reference=gram_reference,
    fake=lambda x: x.new_empty((x.shape[1], x.shape[1]), dtype=compute_dtype(x.dtype)),
)


class _VasScore(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, sigma: Tensor, y: Tensor | None, bf16: bool) -> Tensor:
        return torch.ops.llmkern.vas_score_fwd(x, sigma, y, bf16)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, sigma, y, _ = inputs
        ctx.save_for_backward(x, sigma, y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        needs = list(ctx.needs_input_grad[:3])
        grads = torch.ops.llmkern.vas_score_bwd(dout.contiguous(), *ctx.saved_tensors, needs)
        return *(grad if need else None for grad, need in zip(grads, needs)), None


def vas_score(x: Embeddings, sigma: Tensor, y: Embeddings | None = None, *, precision: str = "fp32") -> Tensor:
    r"""Variance alignment score of each row (arXiv 2402.02055): how far x_i lies along the variance of a target.

    .. math::  score_i = x_i^T \Sigma\, y_i, \qquad y = x \text{ where none is given}

    Args:
        x: (N, d) in float32, float16, bfloat16 or float64, a tensor or an array (np.memmap included).
        sigma: (d, d), in general ``second_moment`` of the target. It need not be symmetric or definite.
        y: (N, d), the other modality, for the cross form.
        precision: ``"fp32"``, or ``"bf16"``: x, y and sigma are rounded to bf16 and the products summed in fp32, as
            matrix units do it: twice the rate on CPUs with AVX512-BF16 (with y or a symmetric sigma), on others
            rounding and no gain.

    Returns:
        (N,) in float32 (float64 for float64). A row of zeros scores 0; a row with NaN or infinity is not finite, and no
        other row is touched by it.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or options that do not fit.

    Differentiable once in x, sigma and y. N d^2 flops without y (half of a product's), twice that with it; extra memory
    of O(d^2).
    """
    op = "vas_score"
    x = check_embeddings(op, "x", x)
    y = None if y is None else check_embeddings(op, "y", y, like=x, rows=len(x))
    if not isinstance(sigma, Tensor) or sigma.shape != (x.shape[1], x.shape[1]):
        got = tuple(sigma.shape) if isinstance(sigma, Tensor) else type(sigma).__name__
        raise bad_value(op, f"sigma as a tensor of shape ({x.shape[1]}, {x.shape[1]})", got)
    if not sigma.is_floating_point():
        raise bad_type(op, "sigma of a floating dtype", sigma.dtype, "cast it")
    if sigma.device != x.device:
        raise bad_value(op, f"sigma on {x.device}", sigma.device, "move it there")
    bf16 = check_precision(op, precision)
    sigma = sigma.to(compute_dtype(x.dtype))
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, sigma, y)):
        return _VasScore.apply(x, sigma, y, bf16)
    return torch.ops.llmkern.vas_score_fwd(x, sigma, y, bf16)
