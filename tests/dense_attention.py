"""Attention as a matrix: what rope_attention is to compute, in plain differentiable torch, under plans held fixed."""

from __future__ import annotations

import torch
from torch import Tensor

from llmkern import AttentionPlan
from llmkern.polynomial import fit_exponential, monomials, round_up_bound


def frozen_plan(
    batch: int,
    heads: int,
    dim: int,
    *,
    bound: float,
    degree: int = 3,
    contact: int = 2,
    leading: int | None = None,
    is_causal: bool = False,
    chunk: int = 24,
    rtol: float = 1e6,
    q_limit: float = 1e6,
    k_limit: float = 1e6,
    scale: float = 1.0,
    certify: bool = True,
    device: str = "cpu",
) -> AttentionPlan:
    """A plan that depends on no data; with its defaults every pair is computed by the polynomial.

    Without ``certify`` the error is taken for zero, so that no row fails.
    """
    fit = fit_exponential(degree, contact, round_up_bound(bound))
    leading = dim if leading is None else leading
    a = [abs(x) for x in fit.coefficients]
    tail1 = sum(a[i] * i * fit.bound ** (i - 2) for i in range(3, degree + 1))
    tail0 = sum(a[i] * fit.bound ** (i - 2) for i in range(3, degree + 1))
    errors = (fit.error, tail1, tail0) if certify else (0.0, 0.0, 0.0)
    row = [*fit.coefficients, *errors, q_limit, k_limit, 1e-7 * fit.absolute]
    table = torch.tensor(row, dtype=torch.float64, device=device).expand(batch, heads, len(row)).contiguous()
    return AttentionPlan(
        "polynomial",
        rtol,
        "held fixed",
        error_bound=rtol,
        degree=degree,
        contact=contact,
        leading=leading,
        dim=dim,
        scale=scale,
        features=monomials(dim, degree, leading).count,
        bound=fit.bound,
        chunk=chunk,
        is_causal=is_causal,
        table=table,
    )


def dense_attention(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, key_mask: Tensor | None = None) -> Tensor:
    """p-attention of (B, H, N, D) with every pair in a matrix; pairs and rows that the plan's limits make exact are."""
    assert plan.table is not None
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    group = q.shape[1] // k.shape[1]
    x, y, values = (t.to(dtype) for t in (q, k, v))
    x, y, values = x * plan.scale, y.repeat_interleave(group, 1), values.repeat_interleave(group, 1)
    row = plan.table[0, 0].tolist()
    a, (_, _, _, q_limit, k_limit, _) = row[:-6], row[-6:]
    s = x @ y.mT
    low = x[..., plan.dim - plan.leading :] @ y[..., plan.dim - plan.leading :].mT
    p = sum(c * (s if i <= 2 else low) ** i for i, c in enumerate(a))
    i, j = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])[None, :]
    visible = (j <= i if plan.is_causal else torch.ones_like(j <= i)).to(q.device)
    exact = (j >= i // plan.chunk * plan.chunk) & visible.cpu() if plan.is_causal else torch.zeros_like(j <= i)
    exact = exact.to(q.device) | (y.norm(dim=-1) > k_limit).unsqueeze(-2) | (x.norm(dim=-1) > q_limit).unsqueeze(-1)
    if key_mask is not None:
        visible = visible & key_mask[:, None, None, :]
    weights = torch.where(exact, s.exp(), p) * visible
    total = weights.sum(-1, keepdim=True)
    return ((weights @ values) / torch.where(total == 0, torch.ones_like(total), total)).to(q.dtype)


def exact_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    visible: Tensor | None = None,
) -> Tensor:
    """Softmax attention in float64; visible: (.., N, M) bool. A row that sees nothing is zero."""
    group = q.shape[1] // k.shape[1]
    x, y, values = q.double(), k.double().repeat_interleave(group, 1), v.double().repeat_interleave(group, 1)
    s = x @ y.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    seen = torch.ones_like(s, dtype=torch.bool) if visible is None else visible.expand_as(s)
    if is_causal:
        seen = seen & torch.ones(s.shape[-2:], dtype=torch.bool).tril()
    s = s.masked_fill(~seen, -torch.inf)
    return torch.where(seen.any(-1, keepdim=True), s.softmax(-1), 0.0) @ values


def spread(v: Tensor, o: Tensor, group: int = 1, is_causal: bool = False, key_mask: Tensor | None = None) -> Tensor:
    """max_j |v_j - o_i| over the keys that row i sees, (B, H, N): the unit of the certificate."""
    values = v.double().repeat_interleave(group, 1)
    seen = (
        torch.ones(v.shape[0], 1, v.shape[2], 1, dtype=torch.bool) if key_mask is None else key_mask[:, None, :, None]
    )
    high, low = values.masked_fill(~seen, -torch.inf), values.masked_fill(~seen, torch.inf)
    if is_causal:
        rows = torch.arange(o.shape[2]).clamp(max=v.shape[2] - 1)
        high, low = high.cummax(2).values[:, :, rows], low.cummin(2).values[:, :, rows]
    else:
        high, low = high.amax(2, keepdim=True), low.amin(2, keepdim=True)
    return torch.maximum(high - o, o - low).amax(-1).clamp(min=0)
