r"""Log-sum-exp of a similarity matrix along rows and columns, from one pass over its blocks, and its gradient.

    z_ij = scale f_i . g_j     rows_i = log sum_j exp z_ij     columns_j = log sum_i exp z_ij
    pairs_i = z_{i,i+offset}

Gradient, with upstream r, c, p: w_ij = r_i exp(z_ij - rows_i) + c_j exp(z_ij - columns_j), plus p_i
where j = i + offset, and

    df_i = scale sum_j w_ij g_j     dg_j = scale sum_i w_ij f_i     dscale = sum_ij w_ij f_i . g_j

A log-sum-exp comes as two numbers, (2, N): itself, and what rounding took from it. Where a pair outweighs all others,
rows_i is pairs_i but for rounding, and what is left of a loss and its gradient are the differences.

``columns`` may come from more rows than these (other processes hold them): then it is that of all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from llmkern._library import define_op
from llmkern.ops.embeddings import compute_dtype, row_blocks, widen


def in_two(value: Tensor, dtype: torch.dtype) -> Tensor:
    """(2, ...) of a float64 tensor: in this dtype, and the rest of it."""
    first = value.to(dtype)
    return torch.stack([first, torch.where(first.isfinite(), value - first.double(), 0).to(dtype)])


def _log_sum_exp(z: Tensor, dim: int) -> Tensor:
    """In float64 of what is summed in the dtype of z, so that a sum of hardly more than one term keeps its rest."""
    top = z.detach().amax(dim, keepdim=True)
    top = torch.where(top.isfinite(), top, 0)
    return top.squeeze(dim).double() + (z - top).exp().sum(dim).double().log()


def two_way_lse_reference(
    image: Tensor, text: Tensor, scale: Tensor, offset: int, bf16: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """rows (2, N), columns (2, M), pairs (N,) in fp32 (float64); holds a block of rows of the matrix at a time."""
    g = widen(text, bf16)
    rows, columns = [], [g.new_full((len(text),), -torch.inf, dtype=torch.float64)]
    pairs = []
    for block in row_blocks(len(image), len(text)):
        f = widen(image[block], bf16)
        z = (f @ g.t()) * scale
        if len(text):
            columns.append(_log_sum_exp(z, 0))
        rows.append(_log_sum_exp(z, 1) if len(text) else columns[0].new_full((len(f),), -torch.inf))
        pairs.append(z.diagonal(block.start + offset))
    every = in_two(torch.stack(columns).logsumexp(0), g.dtype)
    if not rows:
        return g.new_empty((2, 0)), every, g.new_empty(0)
    return in_two(torch.cat(rows), g.dtype), every, torch.cat(pairs)


def two_way_lse_backward_reference(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    rows: Tensor,
    columns: Tensor,
    drows: Tensor,
    dcolumns: Tensor,
    dpairs: Tensor,
    offset: int,
    needs: Sequence[bool],
) -> list[Tensor]:
    """Gradients of (image, text, scale); an empty tensor stands where ``needs`` asks for none."""
    g = widen(text)
    dimage = torch.empty(image.shape, dtype=image.dtype, device=image.device) if needs[0] else rows.new_empty(0)
    dtext = torch.zeros_like(g, memory_format=torch.contiguous_format) if needs[1] else rows.new_empty(0)
    dscale = rows.new_zeros(()) if needs[2] else rows.new_empty(0)
    for block in row_blocks(len(image), len(text)):
        f = widen(image[block])
        s = f @ g.t()
        z = s * scale
        in_row = (z - rows[0, block].unsqueeze(1)) - rows[1, block].unsqueeze(1)
        in_column = (z - columns[0]) - columns[1]
        r = drows[block].unsqueeze(1)
        w = r * in_row.exp() + dcolumns * in_column.exp()
        # Where p nearly cancels the rest: the sum of r, c and p apart from what exp takes off one.
        own = r * in_row.expm1() + dcolumns * in_column.expm1() + ((r + dcolumns) + dpairs[block].unsqueeze(1))
        w.diagonal(block.start + offset).copy_(own.diagonal(block.start + offset))
        if needs[0]:
            dimage[block] = (scale * (w @ g)).to(image.dtype)
        if needs[1]:
            dtext += scale * (w.t() @ f)
        if needs[2]:
            dscale += (w * s).sum()
    return [dimage, dtext.to(text.dtype) if needs[1] else dtext, dscale]


define_op(
    "two_way_lse_fwd",
    "(Tensor image, Tensor text, Tensor scale, int offset, bool bf16) -> (Tensor, Tensor, Tensor)",
    stem="pairwise_scores",
    reference=two_way_lse_reference,
    fake=lambda image, text, scale, offset, bf16: (
        scale.new_empty((2, image.shape[0])),
        scale.new_empty((2, text.shape[0])),
        scale.new_empty(image.shape[0]),
    ),
)
define_op(
    "two_way_lse_bwd",
    "(Tensor image, Tensor text, Tensor scale, Tensor rows, Tensor columns, Tensor drows, Tensor dcolumns,"
    " Tensor dpairs, int offset, bool[] needs) -> Tensor[]",
    stem="pairwise_scores",
    reference=two_way_lse_backward_reference,
    fake=lambda image, text, scale, rows, columns, drows, dcolumns, dpairs, offset, needs: [
        torch.empty(like.shape, dtype=like.dtype, device=like.device) if need else rows.new_empty(0)
        for like, need in zip((image, text, scale), needs)
    ],
)


class TwoWayLse(torch.autograd.Function):
    """(rows, columns, pairs), differentiable once, parts by their sum; scale: () in the dtype of computation."""

    @staticmethod
    def forward(image: Tensor, text: Tensor, scale: Tensor, offset: int) -> tuple[Tensor, Tensor, Tensor]:
        return torch.ops.llmkern.two_way_lse_fwd(image, text, scale, offset, False)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        image, text, scale, ctx.offset = inputs
        ctx.save_for_backward(image, text, scale, output[0], output[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, drows: Tensor, dcolumns: Tensor, dpairs: Tensor) -> tuple[Tensor | None, ...]:
        needs = list(ctx.needs_input_grad[:3])
        # The gradient of a log-sum-exp is that of its first number; the second is rounding.
        upstream = [grad.contiguous() for grad in (drows[0], dcolumns[0], dpairs)]
        grads = torch.ops.llmkern.two_way_lse_bwd(*ctx.saved_tensors, *upstream, ctx.offset, needs)
        return *(grad if need else None for grad, need in zip(grads, needs)), None


def scale_tensor(scale: Tensor | float, like: Tensor) -> Tensor:
    """scale as the ops take it: () in the dtype of computation, on the device of the rows."""
    return torch.as_tensor(scale, dtype=compute_dtype(like.dtype), device=like.device)
