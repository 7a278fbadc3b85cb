"""What a plan knows of the data: norms, moments, directions; and the polynomials that these allow."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from llmkern.ops.rope_attention.cost import Work, polynomial_seconds
from llmkern.polynomial import Fit, fit_exponential, round_up_bound
from llmkern.polynomial.fit import MAX_BOUND

SAMPLE = 1024
SAMPLED_ROWS = 32
MAX_DEGREE = 10
MAX_FEATURES = 120_000
CONTACTS = (2, 4, 6)
LEADING = (4, 8, 16, 32)


@dataclass(frozen=True)
class Measured:
    """Queries (B, Hq, n, D) scaled and keys (B, Hkv, m, D) shifted, in the basis ``balanced`` or their own.

    ``count``: keys that take part; ``raw_bound``: of the scores before the shift, which inputs are rounded with.
    """

    q: Tensor
    k: Tensor
    shift: Tensor
    count: Tensor | int
    raw_bound: float
    balanced: bool


@dataclass(frozen=True)
class Limits:
    """Of one split: limits of the norms (B, Hq), maxima over rows of the moments of the scores, by order (B, Hq), and
    for leading directions r the maxima of mean s^2, of mean t^2 and of the root of their product."""

    q: Tensor
    k: Tensor
    bounds: list[list[float]]
    moments: dict[int, list[list[float]]]
    tails: dict[int, tuple[list[list[float]], list[list[float]]]]
    split: float
    raw_bound: float


@dataclass(frozen=True)
class Candidate:
    degree: int
    contact: int
    leading: int
    features: int
    fits: list[list[Fit]]
    limits: Limits
    error: float
    rounding: float
    seconds: float

    @property
    def split(self) -> float:
        return self.limits.split

    @property
    def total(self) -> float:
        return self.error + 5 * self.rounding

    def tail(self, fit: Fit) -> tuple[float, float]:
        return tail_factors(fit)


def sample(x: Tensor) -> Tensor:
    """Up to SAMPLE tokens (dimension 2), evenly."""
    if x.shape[2] <= SAMPLE:
        return x
    return x[:, :, torch.linspace(0, x.shape[2] - 1, SAMPLE, device=x.device).long()]


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


def measure(seen: Measured, split: float) -> Limits | None:
    """None where a split would change nothing, or norms are not finite."""
    q, k, group = seen.q, seen.k, seen.q.shape[1] // max(seen.k.shape[1], 1)
    q_limit, q_top = _limit(_norm(q), split)
    k_limit, k_top = _limit(_norm(k), split)
    if split and not bool((q_top.amax() * k_top.amax() > 1.2 * q_limit.amax() * k_limit.amax()).item()):
        return None
    margin = 1 + 256 * torch.finfo(q.dtype).eps
    q_limit, k_limit = q_limit * margin, (k_limit * margin).repeat_interleave(group, 1)
    bounds = (q_limit * k_limit).double()
    if not bool(torch.isfinite(bounds).all()) or (bounds.numel() and float(bounds.max()) > MAX_BOUND / 1.1):
        return None
    if q.shape[2] == 0 or k.shape[2] == 0:
        zero = bounds.tolist()
        return Limits(q_limit, k_limit, zero, dict.fromkeys(CONTACTS, zero), {}, split, 0.0)
    if split:
        k = k * (_norm(k) <= k_limit[:, ::group, None]).unsqueeze(-1)
        q = q * (_norm(q) <= q_limit.unsqueeze(-1)).unsqueeze(-1)
    second_moment = (k.mT @ k / seen.count).repeat_interleave(group, 1)
    image = q @ second_moment
    second = (image * q).sum(-1).clamp(min=0)
    moments = {2: second.amax(-1)}
    # Higher moments of the rows that have the largest second one, and of some others.
    some = torch.linspace(0, q.shape[2] - 1, min(q.shape[2], SAMPLED_ROWS), device=q.device).long()
    rows = torch.cat([second.topk(min(q.shape[2], SAMPLED_ROWS), -1).indices, some.expand(*q.shape[:2], -1)], -1)
    picked = q.gather(2, rows.unsqueeze(-1).expand(-1, -1, -1, q.shape[3]))
    squares = (picked @ k.repeat_interleave(group, 1).mT).square()
    per_key = seen.count if isinstance(seen.count, int) else seen.count.squeeze(-1)
    for order in CONTACTS[1:]:
        moments[order] = ((squares ** (order // 2)).sum(-1) / per_key).amax(-1)
    tails = {}
    for r in LEADING:
        first = q.shape[3] - r
        if seen.balanced and first > 0:
            tail_moment = second_moment[..., :first, :first]
            tail = ((q[..., :first] @ tail_moment) * q[..., :first]).sum(-1).clamp(min=0)
            tails[r] = ((second * tail).sqrt().amax(-1).tolist(), tail.amax(-1).tolist())
    return Limits(
        q_limit, k_limit, bounds.tolist(), {m: x.tolist() for m, x in moments.items()}, tails, split, seen.raw_bound
    )


def candidates(limits: Limits, work: Work, rtol: float, dtype: torch.dtype) -> list[Candidate]:
    found: list[Candidate] = []
    bounds = limits.bounds
    for degree in range(2, MAX_DEGREE + 1):
        shapes = [(work.dim, math.comb(work.dim + degree, degree))]
        if degree > 2:
            shapes += [(r, anisotropic_count(work.dim, r, degree)) for r in limits.tails]
        shapes = [(r, count) for r, count in shapes if count <= MAX_FEATURES]
        if not shapes:
            break
        for contact in CONTACTS:
            if contact > degree:
                continue
            fits = [[fit_exponential(degree, contact, round_up_bound(b)) for b in heads] for heads in bounds]
            worst = max((f.absolute for heads in fits for f in heads), default=1.0)
            for leading, count in shapes:
                if leading < work.dim and contact != 2:
                    continue
                error = _error(fits, limits, contact, leading, work.dim)
                rounding = rounding_of(work, count, dtype) * worst + 8 * torch.finfo(dtype).eps * limits.raw_bound
                seconds = polynomial_seconds(work, count, 2 * limits.split)
                found.append(Candidate(degree, contact, leading, count, fits, limits, error, rounding, seconds))
        if any(c.error <= 1e-3 * rtol and c.leading == work.dim for c in found):
            break
    return found


def _error(fits: list[list[Fit]], limits: Limits, contact: int, leading: int, dim: int) -> float:
    worst = 0.0
    for b, heads in enumerate(fits):
        for h, fit in enumerate(heads):
            share = fit.error * limits.moments[contact][b][h]
            if leading < dim:
                mixed, tail = limits.tails[leading]
                tail1, tail0 = tail_factors(fit)
                share += tail1 * mixed[b][h] + tail0 * tail[b][h]
            # The true normaliser is at least the sum of the weights, since keys are centred; kernels divide by theirs.
            worst = max(worst, share / (1 - 2 * share) if share < 0.5 else math.inf)
    return worst


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
    return x.square().sum(-1).sqrt()


def _limit(norms: Tensor, split: float) -> tuple[Tensor, Tensor]:
    """The norm that all but a share ``split`` of the tokens keep, and the largest, (B, H)."""
    if norms.shape[-1] == 0:
        return norms.new_zeros(norms.shape[:-1]), norms.new_zeros(norms.shape[:-1])
    top = norms.topk(min(norms.shape[-1], math.ceil(split * norms.shape[-1]) + 1), -1).values
    return top[..., -1], top[..., 0]
