r"""vas_top: the rows of highest score, found by cheap scores with proven bounds and a few exact ones.

Low rank: with eigenpairs (lambda_k, u_k) of the symmetric part of sigma, r of them kept and the others within
[m - h, m + h],

    x^T S x = m |x|^2 + sum_{k<=r} (lambda_k - m) (u_k . x)^2 + e,     |e| <= h (|x|^2 - sum_{k<=r} (u_k . x)^2).

bf16: rounding both factors moves a score by at most (2^-7 + 2^-8 and a little) |x|^T |S| |x| <= that times |S|_F |x|^2.

To either bound comes what rounding can do to the cheap score and to ``vas_score``. A sum of n products in any order
errs by at most g(n) = n u / (1 - n u) times the sum of their sizes, u = 2^-24 in fp32; a projection z_k thus by
g(d) |x|, and sum_k |w_k| |z_k| <= |w| |x|. In units of |x|^2:

    x^T S x, twice a sum of d          2 g(d) |S|_F
    sum_k w_k z_k^2                    2 g(d) |w| + g(r) max_k |w_k|
    m |x|^2                            g(d) |m|
    h (|x|^2 - sum_k z_k^2)            h (2 g(d) sqrt(r) + g(d) + g(r))
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from llmkern._library import bad_value, define_op
from llmkern.ops.embeddings import Embeddings, check_embeddings, compute_dtype, row_blocks, widen
from llmkern.ops.vas_score.score import vas_score

SCREENS = ("low_rank", "bf16")
# Rows that are scored exactly are copied, this many numbers at a time.
COPIED_AT_ONCE = 2**24


def vas_screen_reference(x: Tensor, basis: Tensor, weights: Tensor, middle: float, half: float, slack: float) -> Tensor:
    """Lower and upper bounds (2, N) in float64: middle |x|^2 + sum_k weights_k (basis_k . x)^2 -+ error, with error =
    half (|x|^2 - sum_k (basis_k . x)^2) + slack |x|^2.
    """
    bounds = x.new_empty((2, len(x)), dtype=torch.float64)
    for block in row_blocks(*x.shape):
        f = widen(x[block])
        squares = (f @ basis).square_()
        size = torch.linalg.vector_norm(f, dim=1).double().square()
        score = middle * size + (squares @ weights).double()
        error = half * (size - squares.sum(1).double()).clamp(min=0) + slack * size
        bounds[0, block], bounds[1, block] = score - error, score + error
    return bounds


define_op(
    "vas_screen",
    "(Tensor x, Tensor basis, Tensor weights, float middle, float half, float slack) -> Tensor",
    stem="vas_score",
    reference=vas_screen_reference,
    fake=lambda x, basis, weights, middle, half, slack: x.new_empty((2, x.shape[0]), dtype=torch.float64),
)


class Selection(NamedTuple):
    """Rows that were selected, ascending, and how many rows had to be scored exactly."""

    indices: Tensor
    rescored: int


def vas_top(x: Embeddings, sigma: Tensor, count: int, *, screen: str = "low_rank", rank: int = 64) -> Selection:
    """The ``count`` rows of highest ``vas_score(x, sigma)``; of equal ones the first.

    Every row gets a cheap score and a bound on its error; those that the bounds leave open are scored exactly. The set
    is that of the full scores in every case; what varies is the work.

    Args:
        x: (N, d), finite, as for ``vas_score``.
        sigma: (d, d).
        count: rows to select, between 0 and N.
        screen: ``"low_rank"``: ``rank`` eigenvectors, 2 N d rank flops in place of N d^2, for spectra that fall;
            ``"bf16"``: the full form in bf16, for GPUs and CPUs that multiply bf16.
        rank: eigenvectors kept.

    Returns:
        ``Selection(indices, rescored)``: int64 (count,), and the number of rows scored exactly.

    Raises:
        ValueError, TypeError: shapes, dtypes or options that do not fit, or a row with NaN or infinity.
    """
    op = "vas_top"
    x = check_embeddings(op, "x", x).detach()
    n, d = x.shape
    if not isinstance(sigma, Tensor) or sigma.shape != (d, d):
        raise bad_value(op, f"sigma as a tensor of shape ({d}, {d})", getattr(sigma, "shape", type(sigma).__name__))
    if not 0 <= count <= n:
        raise bad_value(op, f"count between 0 and the number of rows, {n}", count)
    if screen not in SCREENS:
        raise bad_value(op, f"screen to be one of {', '.join(SCREENS)}", repr(screen))
    if rank < 1:
        raise bad_value(op, "rank of at least 1", rank)
    sigma = sigma.detach()
    if not bool(sigma.isfinite().all()):
        raise bad_value(op, "finite sigma", "NaN or infinity", "build it of finite rows")
    lower, upper = _low_rank_bounds(x, sigma, min(rank, d)) if screen == "low_rank" else _bf16_bounds(x, sigma)
    bad = ~(lower.isfinite() & upper.isfinite())
    if bool(bad.any()):
        raise bad_value(op, "finite rows", f"NaN, infinity or overflow at row {int(bad.nonzero()[0])}", "drop it first")
    everyone = torch.arange(n, device=x.device)
    if count in (0, n):
        return Selection(everyone[:count], 0)
    # At least count rows reach the one, and at most count rows can be above the other.
    floor = lower.kthvalue(n - count + 1).values
    ceiling = upper.kthvalue(n - count).values
    sure = lower > ceiling
    # Equal bounds prove nothing of the order, so they stay open.
    opened = everyone[~sure & (upper >= floor)]
    parts = [vas_score(x.index_select(0, part), sigma) for part in opened.split(max(1, COPIED_AT_ONCE // d))]
    scores = torch.cat(parts) if len(opened) else lower[:0]
    wanted = count - int(sure.sum())
    best = scores.argsort(descending=True, stable=True)[:wanted]
    return Selection(torch.cat([everyone[sure], opened[best]]).sort().values, len(opened))


def _low_rank_bounds(x: Tensor, sigma: Tensor, rank: int) -> tuple[Tensor, ...]:
    """Lower and upper bound of each score, in float64."""
    symmetric = 0.5 * (sigma.double() + sigma.double().t())
    values, vectors = torch.linalg.eigh(symmetric)
    # Of all runs of neighbouring eigenvalues to leave out, the shortest interval.
    left_out = len(values) - rank
    spans = values[left_out - 1 :] - values[: rank + 1] if left_out else values.new_zeros(1)
    first = int(spans.argmin()) if left_out else 0
    kept = torch.ones_like(values, dtype=torch.bool)
    kept[first : first + left_out] = False
    middle = 0.5 * (values[first] + values[first + left_out - 1]) if left_out else values.new_zeros(())
    half = 0.5 * spans[first] if left_out else values.new_zeros(())
    compute = compute_dtype(x.dtype)
    basis = vectors[:, kept].to(compute)
    weights = (values[kept] - middle).to(compute)
    of_products, of_squares = _rounding(x.shape[1], compute), _rounding(rank, compute)
    slack = 2 * of_products * (_norm(sigma) + _norm(weights)) + of_squares * float(weights.abs().max())
    slack += of_products * abs(float(middle)) + float(half) * (of_products * (2 * rank**0.5 + 1) + of_squares)
    return torch.ops.llmkern.vas_screen(x, basis, weights, float(middle), float(half), slack).unbind()


def _bf16_bounds(x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    compute = compute_dtype(x.dtype)
    # Three factors rounded by 2^-9 each, compounded, and a quarter on top for sums of products already moved.
    moved = 1.25 * ((1 + 2.0**-9) ** 3 - 1) * _norm(sigma)
    rounding = 4 * _rounding(x.shape[1], compute) * _norm(sigma)
    lower, upper = [], []
    for block in row_blocks(*x.shape):
        size = torch.linalg.vector_norm(widen(x[block]), dim=1).double().square()
        score = vas_score(x[block], sigma, precision="bf16").double()
        error = (moved + rounding) * size
        lower.append(score - error)
        upper.append(score + error)
    return _joined(lower, x), _joined(upper, x)


def _rounding(terms: int, dtype: torch.dtype) -> float:
    """g(terms), with some more for the rounding of factors and of second order."""
    unit = (terms + 16) * 0.5 * torch.finfo(dtype).eps
    return unit / (1 - unit)


def _norm(matrix: Tensor) -> float:
    return float(matrix.double().norm())


def _joined(parts: list[Tensor], x: Tensor) -> Tensor:
    return torch.cat(parts) if parts else x.new_empty(0, dtype=torch.float64)
