"""What a plan knows of the data: norms, moments, directions; and the polynomials that these allow."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from llmkern.ops.rope_attention.cost import Work, polynomial_seconds
from llmkern.ops.rope_attention.reference import ROUNDING_PARTS
from llmkern.polynomial import Fit, fit_exponential, round_up_bound
from llmkern.polynomial.fit import MAX_BOUND

SAMPLE, SAMPLED_ROWS = 1024, 256
MAX_DEGREE = 10
MAX_FEATURES = 120_000
CONTACTS = (2, 4, 6)
LEADING = (4, 8, 16, 32)
# Rows that may fail their certificate, to be computed exactly.
MAX_FAILING = 0.05


@dataclass(frozen=True)
class Measured:
    """Queries (B, Hq, n, D) scaled and keys (B, Hkv, m, D) shifted, in the basis ``balanced`` or their own.

    ``count``: keys that take part; ``raw_bound``: of the scores before the shift, which inputs are rounded with;
    ``allowed``: share of the rows that may fail.
    """

    q: Tensor
    k: Tensor
    count: Tensor | int
    raw_bound: float
    balanced: bool
    allowed: float


@dataclass(frozen=True)
class Limits:
    """Of one split: limits of the norms (B, Hq), moments of the scores of each sampled row, by order (B, Hq, rows), and
    for leading directions r the means of t^2 and the roots of mean s^2 mean t^2."""

    q: Tensor
    k: Tensor
    moments: dict[int, Tensor]
    tails: dict[int, tuple[Tensor, Tensor]]
    split: float
    raw_bound: float
    allowed: float
    # Norms of sampled keys over the limit, (B, Hq, keys).
    key_norms: Tensor

    @property
    def bounds(self) -> Tensor:
        return (self.q * self.k).double()

    def grown(self, q: Tensor, k: Tensor) -> Limits:
        """The same data under the limits that all tokens have, larger than those of the sample.

        What the sample says of moments stays: rows beyond it are few, and exact where they fail. Where none may fail
        moments grow with the limits.
        """
        key_norms = self.key_norms * (self.k / k.clamp(min=1e-30)).unsqueeze(-1)
        grown = replace(self, q=q, k=k, key_norms=key_norms)
        if self.allowed:
            return grown
        by = ((q * k) / (self.q * self.k).clamp(min=1e-30)).clamp(min=1.0).unsqueeze(-1)
        moments = {order: x * by**order for order, x in self.moments.items()}
        tails = {r: (a * by**2, b * by**2) for r, (a, b) in self.tails.items()}
        return replace(grown, moments=moments, tails=tails)


@dataclass(frozen=True)
class Candidate:
    """``error``: the largest of the rows that keep rtol (of all, if none does); ``failing``: share of the others."""

    degree: int
    contact: int
    leading: int
    features: int
    fits: list[list[Fit]]
    limits: Limits
    error: float
    worst: float
    failing: float
    rounding: float
    seconds: float

    @property
    def good(self) -> bool:
        return self.failing <= self.limits.allowed

    @property
    def split(self) -> float:
        return self.limits.split

    @property
    def total(self) -> float:
        return self.worst + ROUNDING_PARTS * self.rounding


def sample(x: Tensor, count: int = SAMPLE) -> Tensor:
    """Up to ``count`` tokens (dimension 2), evenly."""
    if x.shape[2] <= count:
        return x
    return x[:, :, torch.linspace(0, x.shape[2] - 1, count, device=x.device).long()]


def balance(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Maps a, b (B, Hkv, D, D), a b^T = 1, after which q a and k b have equal, diagonal second moments; ascending.

    Scores stay as they are; norms shrink to what the scores need, and the directions that matter are the last.
    """
    group = q.shape[1] // k.shape[1]
    pooled = q.double().reshape(q.shape[0], k.shape[1], group * q.shape[2], q.shape[3])
    moments = [x.mT @ x / max(x.shape[2], 1) for x in (pooled, k.double())]
    eye = torch.eye(q.shape[3], dtype=torch.float64, device=q.device)
    ridge = [1e-6 * m.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None].clamp(min=1e-30) * eye for m in moments]
    (sq, sk) = (m + r for m, r in zip(moments, ridge))
    if not bool(torch.isfinite(sq).all() & torch.isfinite(sk).all()):
        return eye.expand(sk.shape).to(q), eye.expand(sk.shape).to(q)
    root = torch.linalg.cholesky(sq)
    values, vectors = torch.linalg.eigh(root.mT @ sk @ root)
    values = values.clamp(min=1e-30).sqrt().sqrt().unsqueeze(-2)
    # q a has moments sqrt(values): a = L^-T E values^(1/4), b = L E values^(-1/4).
    a = torch.linalg.solve_triangular(root.mT, vectors, upper=True) * values
    b = root @ vectors / values
    return a.to(q), b.to(q)


def find_limits(q: Tensor, k: Tensor, split: float) -> tuple[Tensor, Tensor] | None:
    """Norms (B, Hq) that all but a share ``split`` keep; None where a split would gain little."""
    q_limit, q_top = _limit(_norm(q), split)
    k_limit, k_top = _limit(_norm(k), split)
    if split and not bool(q_top.amax() * k_top.amax() > 1.2 * q_limit.amax() * k_limit.amax()):
        return None
    margin = 1 + 256 * torch.finfo(q.dtype).eps
    group = q.shape[1] // max(k.shape[1], 1)
    return q_limit * margin, (k_limit * margin).repeat_interleave(group, 1)


def usable(limits: tuple[Tensor, Tensor]) -> bool:
    """Finite, and within what polynomials can do."""
    bounds = limits[0] * limits[1]
    return not bounds.numel() or bool((bounds <= MAX_BOUND / 1.1).all())


def measure(seen: Measured, split: float) -> Limits | None:
    """None where a split would change nothing, or scores are beyond any polynomial."""
    q, k, group = seen.q, seen.k, seen.q.shape[1] // max(seen.k.shape[1], 1)
    found = find_limits(q, k, split)
    if found is None or not usable(found):
        return None
    if split:
        k = k * (_norm(k) <= found[1][:, ::group, None]).unsqueeze(-1)
        q = q * (_norm(q) <= found[0].unsqueeze(-1)).unsqueeze(-1)
    per_key = seen.count if isinstance(seen.count, int) else seen.count.squeeze(-1)
    per_key = max(per_key, 1) if isinstance(per_key, int) else per_key
    squares = (q @ k.repeat_interleave(group, 1).mT).square()
    moments, power = {}, squares
    for order in CONTACTS:
        moments[order] = power.sum(-1) / per_key
        power = power * squares
    norms = _norm(sample(k, SAMPLED_ROWS)).repeat_interleave(group, 1) / found[1].clamp(min=1e-30).unsqueeze(-1)
    tails = {}
    for r in LEADING:
        first = q.shape[3] - r
        if seen.balanced and first > 0:
            low = (q[..., :first] @ k[..., :first].repeat_interleave(group, 1).mT).square().sum(-1) / per_key
            tails[r] = ((moments[2] * low).sqrt(), low)
    return Limits(*found, moments, tails, split, seen.raw_bound, seen.allowed, norms)


def candidates(
    limits: Limits, work: Work, rtol: float, dtype: torch.dtype, exact: float, ceiling: float = math.inf
) -> list[Candidate]:
    """Of every degree, until a higher one cannot be faster than a good one (or ``ceiling``) or err less to any use."""
    found: list[Candidate] = []
    bounds = limits.bounds.tolist()
    for degree in range(2, MAX_DEGREE + 1):
        shapes = [(work.dim, math.comb(work.dim + degree, degree))]
        if degree > 2:
            shapes += [(r, anisotropic_count(work.dim, r, degree)) for r in limits.tails]
        shapes = [(r, count) for r, count in shapes if count <= MAX_FEATURES]
        least = min((c.seconds for c in found if c.good), default=ceiling)
        shapes = [(r, count) for r, count in shapes if polynomial_seconds(work, count) < least]
        if not shapes:
            break
        for contact in CONTACTS:
            if contact > degree:
                continue
            fits = [[fit_exponential(degree, contact, round_up_bound(b)) for b in heads] for heads in bounds]
            worst = _absolute(fits, limits)
            for leading, count in shapes:
                if leading < work.dim and contact != 2:
                    continue
                rounding = rounding_of(work, count, dtype) * worst + 8 * torch.finfo(dtype).eps * limits.raw_bound
                rows = _errors(fits, limits, contact, leading, work.dim)
                kept = rows <= rtol - ROUNDING_PARTS * rounding
                failing = 1 - float(kept.double().mean()) if rows.numel() else 0.0
                top = float(rows.max()) if rows.numel() else 0.0
                error = float(rows[kept].max()) if rows.numel() and failing < 1 else top
                # A split computes its share of rows and of keys exactly, a failing row all its pairs.
                share = min(1.0, 2 * limits.split + failing)
                found.append(
                    Candidate(
                        degree,
                        contact,
                        leading,
                        count,
                        fits,
                        limits,
                        error,
                        top,
                        failing,
                        rounding,
                        polynomial_seconds(work, count) + share * exact * 1.5,
                    )
                )
        if any(c.worst <= 1e-3 * rtol and c.leading == work.dim for c in found):
            break
    return found


def _absolute(fits: list[list[Fit]], limits: Limits) -> float:
    """Mean over keys of sum_m |a_m| (limit |k_j|)^m, what the terms of a row's sums add up to without signs."""
    a = torch.tensor([[f.coefficients for f in heads] for heads in fits], dtype=torch.float64).abs()
    if not a.numel() or not limits.key_norms.numel():
        return 1.0
    x = limits.bounds.cpu().unsqueeze(-1) * limits.key_norms.double().cpu()
    total = torch.zeros_like(x)
    for m in reversed(range(a.shape[-1])):
        total = total * x + a[..., m : m + 1]
    return float(total.mean(-1).max())


def _errors(fits: list[list[Fit]], limits: Limits, contact: int, leading: int, dim: int) -> Tensor:
    """Certificates of the sampled rows, (B, Hq, rows)."""
    moments = limits.moments[contact]

    def per_head(values: list[list[float]]) -> Tensor:
        return torch.tensor(values, dtype=moments.dtype, device=moments.device).reshape(*moments.shape[:2], 1)

    share = per_head([[f.error for f in heads] for heads in fits]) * moments
    if leading < dim:
        mixed, tail = limits.tails[leading]
        factors = [[tail_factors(f) for f in heads] for heads in fits]
        share = share + per_head([[f[0] for f in heads] for heads in factors]) * mixed
        share = share + per_head([[f[1] for f in heads] for heads in factors]) * tail
    # The true normaliser is at least the sum of the weights, since keys are centred; kernels divide by theirs.
    return torch.where(share < 0.5, share / (1 - 2 * share), torch.inf)


def tail_factors(fit: Fit) -> tuple[float, float]:
    """Of sqrt(mean s^2 mean t^2) and of mean t^2 in the error of dropping tails above degree 2; see the reference."""
    a, b = [abs(x) for x in fit.coefficients], fit.bound
    first = sum(a[i] * i * b ** (i - 2) for i in range(3, len(a)))
    return first, sum(a[i] * b ** (i - 2) for i in range(3, len(a)))


def anisotropic_count(dim: int, leading: int, degree: int) -> int:
    return math.comb(dim + 2, 2) + math.comb(leading + degree, degree) - math.comb(leading + 2, 2)


def rounding_of(work: Work, features: int, dtype: torch.dtype) -> float:
    """Relative error of a sum of the kernels: probabilistic bound (Higham and Mary 2019, lambda = 6) for its longest
    chain of additions: within a panel of keys, over panels, over features by blocks."""
    chain = 60 + work.keys / 240 + min(features, 4 * work.dim + features / max(1, work.dim))
    return 6 * math.sqrt(chain) * torch.finfo(dtype).eps / 2


def _norm(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=-1)


def _limit(norms: Tensor, split: float) -> tuple[Tensor, Tensor]:
    """The norm that all but a share ``split`` of the tokens keep, and the largest, (B, H)."""
    if norms.shape[-1] == 0:
        return norms.new_zeros(norms.shape[:-1]), norms.new_zeros(norms.shape[:-1])
    if not split:
        return norms.amax(-1), norms.amax(-1)
    top = norms.topk(min(norms.shape[-1], math.ceil(split * norms.shape[-1]) + 1), -1).values
    return top[..., -1], top[..., 0]
