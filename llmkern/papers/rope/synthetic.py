r"""Attention on Gaussian data with scores scaled to a bound: errors, certificates, gradients, thresholds.

With p the polynomial of degree g that touches exp at zero to order 2, |p(s) - e^s| <= M s^2 on [-B, B], and

    |o_i - exact_i| <= D_i / (Z_i - D_i) max_j |v_j - exact_i|,    D_i = M sum_j s_ij^2,  Z_i = sum_j p(s_ij)

(the moment certificate). The uniform certificate is the relative error eps of the best polynomial of that degree.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import llmkern
from llmkern.papers.rope.measure import Heads, largest_row_error
from llmkern.polynomial import fit_exponential

CONTACT = 2


def gaussian_heads(n: int, dim: int, bound: float, seed: int = 0, dtype: torch.dtype = torch.float32) -> Heads:
    """One head with max |q| max |k| = bound."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(1, 1, n, dim, generator=generator, dtype=torch.float64) for _ in range(3))
    q, k = (math.sqrt(bound) * x / x.norm(dim=-1).max() for x in (q, k))
    return Heads(q.to(dtype), k.to(dtype), v.to(dtype), 1.0)


@dataclass
class DegreeRow:
    """Largest error of a row relative to max_j |v_j - o|, and what certifies it; inf where a certificate fails."""

    bound: float
    degree: int
    features: int
    error: float
    moment: float
    uniform: float


def degree_row(n: int, dim: int, bound: float, degree: int, seed: int = 0) -> DegreeRow:
    """Polynomial attention written out with all n^2 pairs, in float64."""
    heads = gaussian_heads(n, dim, bound, seed, torch.float64)
    q, k, v = heads.q[0, 0], heads.k[0, 0], heads.v[0, 0]
    fit = fit_exponential(degree, CONTACT, bound)
    s = q @ k.mT
    p = sum((a * s**i for i, a in enumerate(fit.coefficients)), torch.zeros_like(s))
    z = p.sum(-1)
    exact = s.softmax(-1) @ v
    reach = (v[None] - exact[:, None]).abs().amax((1, 2))
    error = ((p @ v) / z[:, None] - exact).abs().amax(-1) / reach
    d = fit.error * s.square().sum(-1)
    moment = torch.where(z > d, d / (z - d), torch.inf)
    uniform = fit_exponential(degree, 0, bound).error
    return DegreeRow(bound, degree, math.comb(dim + degree, degree), float(error.max()), float(moment.max()), uniform)


@dataclass
class GradientRow:
    """Errors of ``rope_attention`` at one rtol: of a row, and of each gradient relative to its largest entry."""

    rtol: float
    degree: int
    error: float
    dq: float
    dk: float
    dv: float


def gradient_row(n: int, dim: int, bound: float, rtol: float, is_causal: bool, seed: int = 0) -> GradientRow | None:
    """Against exact attention in float64; None where no polynomial certifies rtol."""
    heads = gaussian_heads(n, dim, bound, seed)
    try:
        plan = llmkern.plan_attention(
            heads.q, heads.k, heads.v, is_causal=is_causal, scale=1.0, rtol=rtol, method="polynomial"
        )
    except ValueError:
        return None
    upstream = torch.randn(heads.v.shape, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
    found: list[tuple[Tensor, ...]] = []
    for exact in (True, False):
        dtype = torch.float64 if exact else torch.float32
        q, k, v = (x.to(dtype, copy=True).requires_grad_() for x in (heads.q, heads.k, heads.v))
        if exact:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=is_causal, scale=1.0)
        else:
            out = llmkern.rope_attention(q, k, v, is_causal=is_causal, scale=1.0, rtol=rtol, plan=plan)
        found.append(torch.autograd.grad(out, (q, k, v), upstream.to(dtype)))
    errors = [float((b - a).abs().max() / a.abs().max()) for a, b in zip(*found)]
    return GradientRow(rtol, plan.degree, largest_row_error(heads, plan, is_causal), *errors)


def largest_fast_bound(n: int, dim: int, rtol: float, is_causal: bool, steps: int = 7) -> float:
    """The largest B for which the plan takes the polynomial of itself, by bisection in log B; 0 where there is none."""

    def is_fast(bound: float) -> bool:
        heads = gaussian_heads(n, dim, bound)
        plan = llmkern.plan_attention(heads.q, heads.k, heads.v, is_causal=is_causal, scale=1.0, rtol=rtol)
        return plan.method == "polynomial"

    low, high = 1 / 16, 16.0
    if not is_fast(low):
        return 0.0
    for _ in range(steps):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if is_fast(middle) else (low, middle)
    return low
