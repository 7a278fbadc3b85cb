"""norm_sim: p-norm of the similarities of each row to a target set."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from llmkern._library import bad_value, define_op
from llmkern.ops.embeddings import Embeddings, check_embeddings, check_precision, compute_dtype, row_blocks, widen


def norm_sim_reference(x: Tensor, target: Tensor, p: float, bf16: bool) -> tuple[Tensor, Tensor]:
    """(N,) in fp32 (float64), and for p = inf the row of the target that is nearest, int64 (N,), else zeros."""
    g = widen(target, bf16)
    parts, winners = [], []
    for block in row_blocks(len(x), max(len(target), x.shape[1])):
        s = (widen(x[block], bf16) @ g.t()).abs()
        if p == math.inf:
            values, indices = s.max(1)
            parts.append(values)
            winners.append(indices)
        else:
            top = s.amax(1, keepdim=True)
            # By its largest entry, so that no power leaves the range of the dtype.
            safe = torch.where((top > 0) & top.isfinite(), top, torch.ones_like(top)).detach()
            parts.append(safe.squeeze(1) * (s / safe).pow(p).sum(1).pow(1 / p))
            winners.append(torch.zeros(len(s), dtype=torch.int64, device=s.device))
    if not parts:
        return x.new_empty(0, dtype=g.dtype), torch.empty(0, dtype=torch.int64, device=x.device)
    return torch.cat(parts), torch.cat(winners)


def norm_sim_max_backward_reference(
    dout: Tensor, x: Tensor, target: Tensor, winners: Tensor, needs: Sequence[bool]
) -> list[Tensor]:
    """Gradients of (x, target) for p = inf: dout sign(x_i . g_w) goes to x_i and g_w, w the winner."""
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if needs[0] else dout.new_empty(0)
    dtarget = dout.new_zeros(target.shape) if needs[1] else dout.new_empty(0)
    for block in row_blocks(*x.shape):
        f, near = widen(x[block]), widen(target[winners[block]])
        ds = dout[block].unsqueeze(1) * (f * near).sum(1, keepdim=True).sign()
        if needs[0]:
            dx[block] = (ds * near).to(x.dtype)
        if needs[1]:
            dtarget.index_add_(0, winners[block], ds * f)
    return [dx, dtarget.to(target.dtype) if needs[1] else dtarget]


def norm_sim_power_backward_reference(
    dout: Tensor, x: Tensor, target: Tensor, out: Tensor, p: float, needs: Sequence[bool]
) -> list[Tensor]:
    """Gradients of (x, target) for finite p: with s = x_i . g_t, ds = dout sign(s) (|s| / out)^(p - 1)."""
    g = widen(target)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if needs[0] else dout.new_empty(0)
    dtarget = torch.zeros_like(g, memory_format=torch.contiguous_format) if needs[1] else dout.new_empty(0)
    for block in row_blocks(len(x), max(len(target), x.shape[1])):
        f = widen(x[block])
        s = f @ g.t()
        norm = out[block].unsqueeze(1)
        share = torch.where(norm > 0, s.abs() / norm, torch.zeros_like(s)).pow(p - 1)
        ds = torch.where(s == 0, torch.zeros_like(s), dout[block].unsqueeze(1) * s.sign() * share)
        if needs[0]:
            dx[block] = (ds @ g).to(x.dtype)
        if needs[1]:
            dtarget += ds.t() @ f
    return [dx, dtarget.to(target.dtype) if needs[1] else dtarget]


define_op(
    "norm_sim_fwd",
    "(Tensor x, Tensor target, float p, bool bf16) -> (Tensor, Tensor)",
    stem="pairwise_scores",
    reference=norm_sim_reference,
    fake=lambda x, target, p, bf16: (
        x.new_empty(x.shape[0], dtype=compute_dtype(x.dtype)),
        x.new_empty(x.shape[0], dtype=torch.int64),
    ),
)
for _name, _schema, _reference in (
    (
        "norm_sim_max_bwd",
        "(Tensor dout, Tensor x, Tensor target, Tensor winners, bool[] needs) -> Tensor[]",
        norm_sim_max_backward_reference,
    ),
    (
        "norm_sim_power_bwd",
        "(Tensor dout, Tensor x, Tensor target, Tensor out, float p, bool[] needs) -> Tensor[]",
        norm_sim_power_backward_reference,
    ),
):
    define_op(
        _name,
        _schema,
        stem="pairwise_scores",
        reference=_reference,
        fake=lambda dout, x, target, *rest: [
            torch.empty(like.shape, dtype=like.dtype, device=like.device) if need else dout.new_empty(0)
            for like, need in zip((x, target), rest[-1])
        ],
    )


class _NormSim(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, target: Tensor, p: float, bf16: bool) -> tuple[Tensor, Tensor]:
        return torch.ops.llmkern.norm_sim_fwd(x, target, p, bf16)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, target, ctx.p, _ = inputs
        ctx.save_for_backward(x, target, *output)
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        needs = list(ctx.needs_input_grad[:2])
        x, target, out, winners = ctx.saved_tensors
        if ctx.p == math.inf:
            grads = torch.ops.llmkern.norm_sim_max_bwd(dout.contiguous(), x, target, winners, needs)
        else:
            grads = torch.ops.llmkern.norm_sim_power_bwd(dout.contiguous(), x, target, out, ctx.p, needs)
        return *(grad if need else None for grad, need in zip(grads, needs)), None, None


def norm_sim(x: Embeddings, target: Embeddings, *, p: float = math.inf, precision: str = "fp32") -> Tensor:
    r"""NormSim of each row (arXiv 2405.19547): the p-norm of its similarities to a target set.

    .. math::  score_i = \Big( \sum_t |x_i \cdot g_t|^p \Big)^{1/p}, \qquad p = \infty:\ \max_t |x_i \cdot g_t|

    Args:
        x: (N, d) in float32, float16, bfloat16 or float64, a tensor or an array (np.memmap included).
        target: (M, d), the rows g_t, at least one.
        p: at least 1, or infinity. For p = 2 and M > d this is sqrt(x^T G^T G x), the ranking of ``vas_score``, and
            taken so: d^2 flops a row in place of 2 M d, with rounding of sqrt(eps) where a row is all but orthogonal to
            the target.
        precision: ``"fp32"``, or ``"bf16"``: operands rounded to bf16 and products summed in fp32, as matrix units
            do it: twice the rate on CPUs with AVX512-BF16, on others rounding and no gain.

    Returns:
        (N,) in float32 (float64 for float64). A row of zeros scores 0; a row of x with NaN scores NaN; NaN in the
        target makes every score NaN. Nothing overflows by the power alone, for any p.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or options that do not fit.

    Differentiable once in x and target; for p = inf through the nearest row, the first of equals. 2 N M d flops; memory
    of a few blocks of rows.
    """
    op = "norm_sim"
    x = check_embeddings(op, "x", x)
    target = check_embeddings(op, "target", target, like=x)
    if len(target) == 0:
        raise bad_value(op, "target of at least one row", tuple(target.shape))
    if not p >= 1:
        raise bad_value(op, "p of at least 1, or infinity", p)
    bf16 = check_precision(op, precision)
    if p == 2 and len(target) > x.shape[1]:
        return _by_moment(x, target, precision)
    if torch.is_grad_enabled() and (x.requires_grad or target.requires_grad):
        return _NormSim.apply(x, target, float(p), bf16)[0]
    return torch.ops.llmkern.norm_sim_fwd(x, target, float(p), bf16)[0]


def _by_moment(x: Tensor, target: Tensor, precision: str) -> Tensor:
    from llmkern.ops.vas_score import vas_score

    return _SafeSqrt.apply(vas_score(x, _Gram.apply(target), precision=precision))


class _Gram(torch.autograd.Function):
    """G^T G, in blocks of rows."""

    @staticmethod
    def forward(ctx: Any, target: Tensor) -> Tensor:
        ctx.save_for_backward(target)
        return torch.ops.llmkern.gram(target)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dgram: Tensor) -> Tensor:
        # Row t is that of the score x^T D x at x = g_t, whose gradient is (D + D^T) g_t.
        (target,) = ctx.saved_tensors
        ones = dgram.new_ones(len(target))
        return torch.ops.llmkern.vas_score_bwd(ones, target, dgram, None, [True, False, False])[0]


class _SafeSqrt(torch.autograd.Function):
    """sqrt of what rounding may leave below zero; no gradient at zero, where the norm has none."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        out = x.clamp(min=0).sqrt()
        ctx.save_for_backward(out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> Tensor:
        (out,) = ctx.saved_tensors
        return torch.where(out > 0, 0.5 * dout / out, torch.zeros_like(out))
