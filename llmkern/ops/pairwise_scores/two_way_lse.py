r"""Log-sum-exp of a similarity matrix along rows and columns, from one pass over its blocks, and its gradient.

    z_ij = scale f_i . g_j     rows_i = log sum_j exp z_ij     columns_j = log sum_i exp z_ij
    pairs_i = z_{i,i+offset}

Gradient, with upstream r, c, p: w_ij = r_i exp(z_ij - rows_i) + c_j exp(z_ij - columns_j), plus p_i
where j = i + offset, and

    df_i = scale sum_j w_ij g_j     dg_j = scale sum_i w_ij f_i     dscale = sum_ij w_ij f_i . g_j

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


def two_way_lse_reference(
    image: Tensor, text: Tensor, scale: Tensor, offset: int, bf16: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """rows (N,), columns (M,), pairs (N,) in fp32 (float64); holds a block of rows of the matrix at a time."""
    g = widen(text, bf16)
    rows, columns = [], [g.new_full((len(text),), -torch.inf)]
    pairs = []
    for block in row_blocks(len(image), len(text)):
        f = widen(image[block], bf16)
        z = (f @ g.t()) * scale
        rows.append(z.logsumexp(1))
        columns.append(z.logsumexp(0))
        pairs.append(z.diagonal(block.start + offset))
    if not rows:
        return g.new_empty(0), columns[0], g.new_empty(0)
    return torch.cat(rows), torch.stack(columns).logsumexp(0), torch.cat(pairs)


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
        w = drows[block].unsqueeze(1) * (z - rows[block].unsqueeze(1)).exp() + dcolumns * (z - columns).exp()
        w.diagonal(block.start + offset).add_(dpairs[block])
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
        scale.new_empty(image.shape[0]),
        scale.new_empty(text.shape[0]),
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
    """(rows, columns, pairs), differentiable once; scale is a tensor () of the dtype of computation."""

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
        upstream = [grad.contiguous() for grad in (drows, dcolumns, dpairs)]
        grads = torch.ops.llmkern.two_way_lse_bwd(*ctx.saved_tensors, *upstream, ctx.offset, needs)
        return *(grad if need else None for grad, need in zip(grads, needs)), None


def scale_tensor(scale: Tensor | float, like: Tensor) -> Tensor:
    """scale as the ops take it: () in the dtype of computation, on the device of the rows."""
    return torch.as_tensor(scale, dtype=compute_dtype(like.dtype), device=like.device)
