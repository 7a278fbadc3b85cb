"""The plan: which route, which polynomial, and what it certifies."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from llmkern._library import bad_value
from llmkern.ops.rope_attention.arguments import Arguments
from llmkern.ops.rope_attention.cost import Work, exact_seconds, polynomial_seconds
from llmkern.ops.rope_attention.reference import ROUNDING_PARTS, compute_dtype, segments
from llmkern.polynomial import Fit, fit_exponential, round_up_bound
from llmkern.polynomial.fit import MAX_BOUND

CHUNK = 240
# The prediction is to stay this far below rtol, so that few rows fail their certificate.
MARGIN = 0.7
SAMPLED_ROWS = 32
MAX_DEGREE = 9
MAX_FEATURES = 120_000


@dataclass(frozen=True, eq=False)
class AttentionPlan:
    """How ``rope_attention`` computes: made by ``plan_attention``, accepted as its argument ``plan``.

    The result is certified for any data, also where the plan was made for others: rows whose certificate fails and
    keys beyond the limits are computed exactly. Then more of them are.

    Attributes:
        method: "polynomial" or "exact".
        degree, contact: of the polynomial; its order of contact with exp at zero.
        features: numbers R that a key contributes to; the state holds R (Dv + 1) of them.
        error_bound: every row errs by at most this times max_j |v_j - o|; 0 for exact.
        rounding: what floating point may add, as a share of max_j |v_j| (included in the certificate).
        predicted_error: what the moments of the data promise.
        predicted_cost: seconds by route.
        reason: why this route.
    """

    method: str
    rtol: float
    reason: str
    predicted_cost: dict[str, float] = field(default_factory=dict)
    error_bound: float = 0.0
    rounding: float = 0.0
    predicted_error: float = 0.0
    degree: int = 0
    contact: int = 0
    leading: int = 0
    features: int = 0
    bound: float = 0.0
    chunk: int = CHUNK
    is_causal: bool = False
    dim: int = 0
    scale: float = 1.0
    table: Tensor | None = None
    key_shift: Tensor | None = None

    @property
    def speedup(self) -> float:
        costs = self.predicted_cost
        return costs["exact"] / costs["polynomial"] if len(costs) == 2 else 1.0

    def transform_queries(self, q: Tensor) -> Tensor:
        """What the polynomial is applied to: q scaled; in the dtype of computation."""
        return q * self.scale

    def transform_keys(self, k: Tensor) -> Tensor:
        """The same for keys: less the planned mean, which no softmax notices."""
        return k if self.key_shift is None else k - self.key_shift.to(k)

    def state_dict(self) -> dict[str, Any]:
        """All fields, as plain numbers and tensors."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    @classmethod
    def from_state_dict(cls, stored: dict[str, Any]) -> AttentionPlan:
        return cls(**stored)

    def __str__(self) -> str:
        if self.method == "exact":
            return f"exact attention: {self.reason}"
        return (
            f"polynomial of degree {self.degree} ({self.features} features) for scores within {self.bound:.3g}: each "
            f"row errs by at most {self.error_bound:.2g} of max|v - o| (predicted {self.predicted_error:.2g}, rows "
            f"that fail are computed exactly), predicted {self.speedup:.1f} times as fast as exact attention"
        )


@dataclass
class Candidate:
    degree: int
    contact: int
    features: int
    fits: list[list[Fit]]
    error: float
    rounding: float
    seconds: float


def make_plan(op: str, args: Arguments, is_causal: bool, rtol: float, method: str) -> AttentionPlan:
    work = Work.of(args, is_causal)
    exact = exact_seconds(work)
    if method == "exact":
        return AttentionPlan("exact", rtol, "asked for", {"exact": exact}, is_causal=is_causal)
    least = polynomial_seconds(work, math.comb(work.dim + 2, 2))
    if method == "auto" and least >= exact:
        reason = (
            f"{work.rows} by {work.keys} tokens are too few for the {math.comb(work.dim + 2, 2)} features of degree 2"
        )
        return AttentionPlan("exact", rtol, reason, {"exact": exact, "polynomial": least}, is_causal=is_causal)
    return _measured_plan(op, args, is_causal, rtol, method, work, exact)


@torch.no_grad()
def _measured_plan(
    op: str, args: Arguments, is_causal: bool, rtol: float, method: str, work: Work, exact: float
) -> AttentionPlan:
    dtype = compute_dtype(args.q.dtype)
    q, k = args.q.to(dtype) * args.scale, args.k.to(dtype)
    live = None if args.key_mask is None else args.key_mask[:, None, :, None].to(dtype)
    count = k.shape[2] if live is None else live.sum(2, keepdim=True).clamp(min=1)
    total = (k if live is None else k * live).sum(2, keepdim=True)
    shift = total / (max(count, 1) if isinstance(count, int) else count)
    raw_norm = k.square().sum(-1).amax(-1) if k.shape[2] else k.new_zeros(k.shape[:2])
    k = k - shift
    if live is not None:
        k = k * live
    q_norm = q.square().sum(-1).sqrt().amax(-1) if q.shape[2] else q.new_zeros(q.shape[:2])
    k_norm = k.square().sum(-1).sqrt().amax(-1) if k.shape[2] else k.new_zeros(k.shape[:2])
    group = q.shape[1] // max(k.shape[1], 1)
    # Room for the rounding of norms and of inputs.
    margin = 1 + 64 * torch.finfo(dtype).eps
    q_limit, k_limit = q_norm * margin, (k_norm * margin).repeat_interleave(group, 1)
    bounds = (q_limit * k_limit).double()
    top = float(bounds.max()) if bounds.numel() else 0.0
    costs = {"exact": exact}
    if not math.isfinite(top) or top > MAX_BOUND / 1.1:
        return _uncertified(op, method, rtol, is_causal, costs, top, math.inf)
    raw_bound = float((q_norm * raw_norm.sqrt().repeat_interleave(group, 1)).max()) if bounds.numel() else 0.0
    second, fourth = _moments(q, k, group, count)
    candidates = _candidates(bounds.tolist(), second.tolist(), fourth.tolist(), work, rtol, dtype, raw_bound)
    good = [c for c in candidates if c.error + ROUNDING_PARTS * c.rounding <= MARGIN * rtol]
    if not good:
        reach = min((c.error + ROUNDING_PARTS * c.rounding for c in candidates), default=math.inf)
        return _uncertified(op, method, rtol, is_causal, costs, top, reach)
    best = min(good, key=lambda c: c.seconds)
    costs["polynomial"] = best.seconds
    if method == "auto" and best.seconds >= exact:
        reason = f"degree {best.degree} ({best.features} features) certifies rtol {rtol:g} but would not be faster"
        return AttentionPlan("exact", rtol, reason, costs, is_causal=is_causal)
    rows = [[[*f.coefficients, f.error, 0.0, 0.0, 0.0, 0.0, best.rounding] for f in heads] for heads in best.fits]
    table = torch.tensor(rows, dtype=torch.float64, device=q.device).reshape(*q.shape[:2], best.degree + 7)
    table[..., -3], table[..., -2] = q_limit, k_limit
    index = segments(q, k, args.cu_q, args.cu_k)
    if args.cu_q is not None:
        table = table.expand(len(index), *table.shape[1:]).contiguous()
    return AttentionPlan(
        "polynomial",
        rtol,
        "faster",
        costs,
        error_bound=rtol,
        rounding=ROUNDING_PARTS * best.rounding,
        predicted_error=best.error,
        degree=best.degree,
        contact=best.contact,
        leading=work.dim,
        dim=work.dim,
        scale=args.scale,
        features=best.features,
        bound=top,
        is_causal=is_causal,
        table=table,
        key_shift=shift,
    )


def _moments(q: Tensor, k: Tensor, group: int, count: Tensor | int) -> tuple[Tensor, Tensor]:
    """max_i mean_j s_ij^2 of each head, and of the mean of s^4 what sampled rows make of it; (B, Hq)."""
    n, m = q.shape[2], k.shape[2]
    if n == 0 or m == 0:
        return q.new_zeros(q.shape[:2]), q.new_zeros(q.shape[:2])
    second_moment = (k.mT @ k / count).repeat_interleave(group, 1)
    second = ((q @ second_moment) * q).sum(-1)
    rows = torch.linspace(0, n - 1, min(n, SAMPLED_ROWS), device=q.device).long()
    s2 = (q[:, :, rows] @ k.repeat_interleave(group, 1).mT).square()
    scale = m / count if isinstance(count, int) else m / count.reshape(-1, 1, 1)
    mean2, mean4 = s2.mean(-1) * scale, s2.square().mean(-1) * scale
    kurtosis = (mean4 / mean2.square().clamp(min=1e-30)).amax(-1)
    top = second.amax(-1).clamp(min=0)
    return top, kurtosis * top.square()


def _candidates(
    bounds: list[list[float]],
    second: list[list[float]],
    fourth: list[list[float]],
    work: Work,
    rtol: float,
    dtype: torch.dtype,
    raw_bound: float,
) -> list[Candidate]:
    found = []
    for degree in range(2, MAX_DEGREE + 1):
        features = math.comb(work.dim + degree, degree)
        if features > MAX_FEATURES:
            break
        for contact in (2, 4):
            if contact > degree:
                continue
            fits = [[fit_exponential(degree, contact, round_up_bound(b)) for b in heads] for heads in bounds]
            moments = second if contact == 2 else fourth
            error = max((f.error * s for fs, ss in zip(fits, moments) for f, s in zip(fs, ss)), default=0.0)
            error = error / (1 - error) if error < 1 else math.inf
            worst = max((f.absolute for heads in fits for f in heads), default=1.0)
            rounding = rounding_of(work, degree, dtype) * worst + 8 * torch.finfo(dtype).eps * raw_bound
            found.append(
                Candidate(degree, contact, features, fits, error, rounding, polynomial_seconds(work, features))
            )
        if any(c.error <= MARGIN * rtol * 1e-3 for c in found):
            break
    return found


def rounding_of(work: Work, degree: int, dtype: torch.dtype) -> float:
    """Relative error of a sum of the kernels: probabilistic bound (Higham and Mary 2019, lambda = 6) for its longest
    chain of additions: within a panel of keys, over panels, within a block of features, over blocks."""
    chain = 64 + work.keys / 512 + math.comb(work.dim + degree - 1, degree - 1) + work.dim + 4 * degree
    return 6 * math.sqrt(chain) * torch.finfo(dtype).eps / 2


def _uncertified(
    op: str, method: str, rtol: float, is_causal: bool, costs: dict[str, float], bound: float, reach: float
) -> AttentionPlan:
    found = f"scores are bounded by {bound:.3g} only"
    if method == "polynomial":
        reached = "no bound below 1" if not reach < 1 else f"a bound of {reach:.2g} at best"
        raise bad_value(
            op,
            f"data for which a polynomial certifies rtol {rtol:g}",
            f"{reached} ({found})",
            "raise rtol, bound the scores (normalise q and k), or take method='auto'",
        )
    reason = f"{found}, and no polynomial of up to {MAX_FEATURES} features certifies rtol {rtol:g}"
    if reach < 1:
        reason += f" (best bound {reach:.2g})"
    return AttentionPlan("exact", rtol, reason, costs, is_causal=is_causal)
