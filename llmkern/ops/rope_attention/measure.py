"""What a plan knows of the data: norms, moments, directions; and the polynomials that these allow."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmkern.ops.rope_attention.cost import Work, polynomial_seconds
from llmkern.ops.rope_attention.reference import ROUNDING_PARTS
from llmkern.polynomial import fit_exponential, round_up_bound
from llmkern.polynomial.fit import MAX_BOUND

Array = NDArray[np.float64]

# Of each head, and of all heads together: more of them need no more to tell a share of rows.
SAMPLED_ROWS, SAMPLED_KEYS = 256, 1024
ALL_ROWS, ALL_KEYS, FEWEST_ROWS, FEWEST_KEYS = 4096, 16384, 32, 256
MAX_DEGREE = 10
MAX_FEATURES = 120_000
CONTACTS = (2, 4, 6)
LEADING = (4, 8, 16, 32)
# What rounding to bfloat16 adds to a product of the highest degree: a feature and a value are rounded on the side of
# the keys, their sum and a feature on the side of the queries, by 2^-8 each. A row's values enter less their mean,
# which is at most twice max_j |v_j - o|: two of the parts that the budget of rounding has.
TOP_ROUNDING = (1 + 2.0**-8) ** 4 - 1
TOP_PARTS = 2
# Powers of norms outside of this would leave bfloat16 products nothing but zeros, and floats their range.
TOP_RANGE = 1e15
# Rows that may fail their certificate, to be computed exactly.
MAX_FAILING = 0.05
# tr(A)^2 / (d tr(A^2)) of A, the product of the second moments: 1 where no direction matters more than another. Above
# this no choice of leading directions pays.
FLAT = 0.5


@dataclass(frozen=True)
class Limits:
    """Of one split: limits of the norms (H,), H heads of the batch; moments of the scores of each sampled row by order
    (H, rows), and for leading directions r the roots of mean s^2 mean t^2 and the means of t^2."""

    q: Array
    k: Array
    moments: dict[int, Array]
    tails: dict[int, tuple[Array, Array]]
    # Means of (|k| / limit)^m by m, (H, MAX_DEGREE + 1).
    powers: Array
    split: float
    raw_bound: float
    allowed: float

    @property
    def bounds(self) -> Array:
        return self.q * self.k

    def grown(self, q: Array, k: Array) -> Limits:
        """The same data under the limits that all tokens have, larger than those of the sample.

        What the sample says of moments stays: rows beyond it are few, and exact where they fail. Where none may fail
        moments grow with the limits.
        """
        shrink = self.k / np.maximum(k, 1e-30)
        grown = replace(self, q=q, k=k, powers=self.powers * shrink[:, None] ** np.arange(MAX_DEGREE + 1))
        if self.allowed:
            return grown
        by = np.maximum(1.0, q * k / np.maximum(self.q * self.k, 1e-30))[:, None]
        moments = {order: x * by**order for order, x in self.moments.items()}
        tails = {r: (a * by**2, b * by**2) for r, (a, b) in self.tails.items()}
        return replace(grown, moments=moments, tails=tails)


class HeadFits(NamedTuple):
    """One polynomial for each head: coefficients (H, degree + 1); error and factors of the tail (H, 1); bounds (H,)."""

    coefficients: Array
    error: Array
    tail1: Array
    tail0: Array
    bounds: Array


@dataclass(frozen=True)
class Candidate:
    """``error``: the largest of the rows that keep rtol (of all, if none does); ``failing``: share of the others;
    ``coarse``: see ``top_rounding``."""

    degree: int
    contact: int
    leading: int
    top_bf16: bool
    features: int
    fits: HeadFits
    limits: Limits
    error: float
    worst: float
    failing: float
    rounding: float
    coarse: float
    seconds: float

    @property
    def good(self) -> bool:
        return self.failing <= self.limits.allowed

    @property
    def split(self) -> float:
        return self.limits.split

    @property
    def total(self) -> float:
        return self.worst + ROUNDING_PARTS * self.rounding + TOP_PARTS * self.coarse

    @property
    def slack(self) -> float:
        """One part of all that rounding may do."""
        return self.rounding + self.coarse * TOP_PARTS / ROUNDING_PARTS


def sample(x: Tensor, most: int, all_heads: int, fewest: int) -> Tensor:
    """Up to ``most`` tokens (dimension 2), evenly; fewer of many heads."""
    count = min(most, max(fewest, all_heads // max(1, x.shape[0] * x.shape[1])))
    if x.shape[2] <= count:
        return x
    return x[:, :, torch.linspace(0, x.shape[2] - 1, count, device=x.device).long()]


def balance(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Maps a, b (B, Hkv, D, D), a b^T = 1, after which q a and k b have equal, diagonal second moments; ascending.

    Scores stay as they are; norms shrink to what the scores need, and the directions that matter are the last.
    """
    moments = second_moments(q, k)
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


def second_moments(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Of queries, those of a group together, and of keys: (B, Hkv, D, D), in double."""
    group = q.shape[1] // k.shape[1]
    pooled = q.double().reshape(q.shape[0], k.shape[1], group * q.shape[2], q.shape[3])
    of_q, of_k = (x.mT @ x / max(x.shape[2], 1) for x in (pooled, k.double()))
    return of_q, of_k


def is_flat(q: Tensor, k: Tensor) -> bool:
    """Whether all heads spread their scores over all directions alike."""
    of_q, of_k = second_moments(q, k)
    product = of_q @ of_k
    trace, square = product.diagonal(dim1=-2, dim2=-1).sum(-1), (product * product.mT).sum((-2, -1))
    return bool((trace.square() >= FLAT * q.shape[3] * square).all())


def find_limits(q: Tensor, k: Tensor, split: float, eps: float) -> tuple[Array, Array] | None:
    """Of norms (B, Hq, n) and (B, Hkv, m), what all but a share ``split`` keep, (H,); None where that gains little."""
    q_limit, q_top = _limit(q, split)
    k_limit, k_top = _limit(k, split)
    if split and not q_top.max(initial=0) * k_top.max(initial=0) > 1.2 * q_limit.max(initial=0) * k_limit.max(
        initial=0
    ):
        return None
    margin = 1 + 256 * eps
    group = q.shape[1] // max(k.shape[1], 1)
    return q_limit.ravel() * margin, (k_limit * margin).repeat(group, 1).ravel()


def usable(limits: tuple[Array, Array]) -> bool:
    """Finite, and within what polynomials can do."""
    return bool((limits[0] * limits[1] <= MAX_BOUND / 1.1).all())


def measure(
    q: Tensor, k: Tensor, count: Tensor | int, splits: tuple[float, ...], raw_bound: float, leads: bool, allowed: float
) -> Iterator[Limits]:
    """Limits by split, of sampled queries (B, Hq, n, D) and keys (B, Hkv, m, D) as the polynomial is to see them.

    ``count``: keys that take part, (B, Hkv or 1, 1); ``raw_bound``: of the scores before the shift, which inputs are
    rounded with; ``leads``: directions are in order; ``allowed``: share of the rows that may fail. Left out are splits
    that would change nothing, and scores beyond any polynomial.
    """
    heads, group, dim = q.shape[0] * q.shape[1], q.shape[1] // max(k.shape[1], 1), q.shape[3]
    q_norms, k_norms = (torch.linalg.vector_norm(x, dim=-1) for x in (q, k))
    found = [(s, find_limits(q_norms, k_norms, s, torch.finfo(q.dtype).eps)) for s in splits]
    kept = [(s, limits) for s, limits in found if limits is not None and usable(limits)]
    if not kept:
        return
    q_limits, k_limits = (
        torch.from_numpy(np.stack([limits[i] for _, limits in kept], -1)).to(q).reshape(*q.shape[:2], len(kept), 1)
        for i in (0, 1)
    )
    q_live = q_norms.unsqueeze(-1) <= q_limits.mT
    k_norms = k_norms.repeat_interleave(group, 1)
    # One split after the other: products of a few columns side by side are four times as slow.
    k_live = (k_norms.unsqueeze(-2) <= k_limits).to(q.dtype)
    many = count if isinstance(count, int) else count.unsqueeze(-1)

    def means(squares: Tensor) -> Array:
        """Over the keys within the limits, of the rows within them: (splits, H, rows)."""
        sums = squares @ k_live.mT / many * q_live
        return sums.double().cpu().numpy().reshape(heads, q.shape[2], len(kept)).transpose(2, 0, 1)

    squares = (q @ k.repeat_interleave(group, 1).mT).square()
    moments, power = {CONTACTS[0]: means(squares)}, squares
    for order in CONTACTS[1:]:
        power = power * squares
        moments[order] = means(power)
    low = {}
    for r in LEADING:
        first = dim - r
        if leads and first > 0:
            low[r] = means((q[..., :first] @ k[..., :first].repeat_interleave(group, 1).mT).square())
    lengths = k_norms.double().cpu().numpy().reshape(heads, k.shape[2])
    for i, (split, limits) in enumerate(kept):
        share = lengths / np.maximum(limits[1], 1e-30)[:, None]
        share = np.where(share <= 1, share, 0.0)
        powers = np.ones((len(share), MAX_DEGREE + 1))
        power_of = share
        for m in range(1, MAX_DEGREE + 1):
            powers[:, m] = power_of.mean(-1) if power_of.size else 0.0
            power_of = power_of * share
        tails = {r: (np.sqrt(moments[2][i] * t2[i]), t2[i]) for r, t2 in low.items()}
        yield Limits(*limits, {m: x[i] for m, x in moments.items()}, tails, powers, split, raw_bound, allowed)


def candidates(
    limits: Limits,
    work: Work,
    rtol: float,
    dtype: torch.dtype,
    exact: float,
    ceiling: float = math.inf,
    least_features: int = 0,
) -> list[Candidate]:
    """From the fewest features on, until more cannot be faster than a good candidate (or ``ceiling``)."""
    found: list[Candidate] = []
    bounds = tuple(round_up_bound(b) for b in limits.bounds.tolist())
    least, settled = ceiling, MAX_DEGREE
    for features, degree, leading in shapes(work.dim, tuple(limits.tails)):
        ways = [(False, polynomial_seconds(work, features))]
        if work.pairs and leading == work.dim:
            ways.append((True, polynomial_seconds(work, features, math.comb(work.dim + degree - 1, degree))))
        if min(seconds for _, seconds in ways) >= least:
            break
        if features < least_features or degree > settled:
            continue
        for contact in CONTACTS:
            if contact > degree or (leading < work.dim and contact != 2):
                continue
            for top_bf16, seconds in ways:
                candidate = _candidate(
                    limits, bounds, degree, contact, leading, top_bf16, features, seconds, work, rtol, dtype, exact
                )
                found.append(candidate)
                if candidate.good:
                    least = min(least, candidate.seconds)
                if candidate.worst <= 1e-3 * rtol and leading == work.dim:
                    settled = degree
    return found


@functools.lru_cache(maxsize=64)
def shapes(dim: int, leading: tuple[int, ...]) -> list[tuple[int, int, int]]:
    """(features, degree, leading) of all polynomials that are thought of, fewest features first."""
    every = [(math.comb(dim + degree, degree), degree, dim) for degree in range(2, MAX_DEGREE + 1)]
    every += [(anisotropic_count(dim, r, degree), degree, r) for degree in range(3, MAX_DEGREE + 1) for r in leading]
    return sorted(shape for shape in every if shape[0] <= MAX_FEATURES)


def _candidate(
    limits: Limits,
    bounds: tuple[float, ...],
    degree: int,
    contact: int,
    leading: int,
    top_bf16: bool,
    features: int,
    seconds: float,
    work: Work,
    rtol: float,
    dtype: torch.dtype,
    exact: float,
) -> Candidate:
    fits = head_fits(degree, contact, bounds)
    eps = torch.finfo(dtype).eps
    rounding = rounding_of(work, features, dtype) * _absolute(fits, limits) + 8 * eps * limits.raw_bound
    coarse = top_rounding(fits, limits) if top_bf16 else 0.0
    share = fits.error * limits.moments[contact]
    if leading < work.dim:
        mixed, tail = limits.tails[leading]
        share = share + fits.tail1 * mixed + fits.tail0 * tail
    # The true normaliser is at least the sum of the weights, since keys are centred; kernels divide by theirs: a row
    # errs by share / (1 - 2 share).
    budget = rtol - ROUNDING_PARTS * rounding - TOP_PARTS * coarse
    kept = share <= (budget / (1 + 2 * budget) if budget > 0 else -1.0)
    failing = 1 - float(kept.mean()) if kept.size else 0.0
    worst = _error(float(share.max(initial=0.0)))
    error = _error(float(share[kept].max(initial=0.0))) if failing < 1 else worst
    # A split computes its share of rows and of keys exactly, a failing row all its pairs.
    seconds += min(1.0, 2 * limits.split + failing) * exact * 1.5
    return Candidate(
        degree, contact, leading, top_bf16, features, fits, limits, error, worst, failing, rounding, coarse, seconds
    )


def _error(share: float) -> float:
    return share / (1 - 2 * share) if share < 0.5 else math.inf


@functools.lru_cache(maxsize=1024)
def head_fits(degree: int, contact: int, bounds: tuple[float, ...]) -> HeadFits:
    fits = [fit_exponential(degree, contact, bound) for bound in bounds]
    a = np.array([fit.coefficients for fit in fits]).reshape(len(fits), degree + 1)
    b = np.array(bounds).reshape(len(fits), 1)
    # Of sqrt(mean s^2 mean t^2) and of mean t^2 in the error of dropping tails above degree 2; see the reference.
    orders = np.arange(3, degree + 1)
    tails = np.abs(a[:, 3:]) * b ** (orders - 2.0)
    error = np.array([fit.error for fit in fits]).reshape(len(fits), 1)
    return HeadFits(a, error, (tails * orders).sum(-1, keepdims=True), tails.sum(-1, keepdims=True), b[:, 0])


def _absolute(fits: HeadFits, limits: Limits) -> float:
    """Mean over keys of sum_m |a_m| (limit |k_j|)^m, what the terms of a row's sums add up to without signs."""
    orders = np.arange(fits.coefficients.shape[1])
    terms = np.abs(fits.coefficients) * limits.bounds[:, None] ** orders * limits.powers[:, : len(orders)]
    return float(terms.sum(-1).max(initial=1.0))


def top_rounding(fits: HeadFits, limits: Limits) -> float:
    """Bound, for any data within the limits, of what bfloat16 does to the mean over keys of the highest degree."""
    degree = fits.coefficients.shape[1] - 1
    lengths = np.concatenate([limits.q, limits.k]) ** degree
    if not bool(((lengths <= TOP_RANGE) & (lengths >= 1 / TOP_RANGE)).all()):
        return math.inf
    return float((TOP_ROUNDING * np.abs(fits.coefficients[:, -1]) * limits.bounds**degree).max(initial=0.0))


def anisotropic_count(dim: int, leading: int, degree: int) -> int:
    return math.comb(dim + 2, 2) + math.comb(leading + degree, degree) - math.comb(leading + 2, 2)


def rounding_of(work: Work, features: int, dtype: torch.dtype) -> float:
    """Relative error of a sum of the kernels: probabilistic bound (Higham and Mary 2019, lambda = 6) for its longest
    chain of additions: within a panel of keys, over panels, over features by blocks."""
    chain = 60 + work.keys / 240 + min(features, 4 * work.dim + features / max(1, work.dim))
    return 6 * math.sqrt(chain) * torch.finfo(dtype).eps / 2


def _limit(norms: Tensor, split: float) -> tuple[Array, Array]:
    """The norm that all but a share ``split`` of the tokens keep, and the largest, (B, H)."""
    if norms.shape[-1] == 0:
        empty = np.zeros(norms.shape[:-1])
        return empty, empty
    if not split:
        top = norms.amax(-1).double().cpu().numpy()
        return top, top
    tops = norms.topk(min(norms.shape[-1], math.ceil(split * norms.shape[-1]) + 1), -1).values.double().cpu().numpy()
    return tops[..., -1], tops[..., 0]
