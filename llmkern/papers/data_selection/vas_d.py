r"""VAS-D: the target of the variance alignment score is the shrinking selection itself (arXiv 2402.02055).

Round by round the lowest c = ceil((n - n_target) / rounds) survivors by x^T S x go, and S is taken anew from the rest.
The naive loop scores every survivor and recounts S in every round. Here S is downdated by the rows that went, exactly
(``llmkern.SecondMoment``), and a score is computed again only where it may matter:

    S_t = a S_ref + D          x^T S_t x = a x^T S_ref x + x^T D x

With the scores under S_ref stored, |x^T D x| <= |D|_F |x|^2 leaves a few rows that may be among the lowest c. For them
the drift is enclosed more closely: with U a basis of r directions, z = U^T x stored, e = x - U z, rho = |e|^2,

    x^T D x  in  z^T D_UU z  +-  2 |D_PU z| sqrt(rho)  +  [lambda_min, lambda_max](D_PP) rho

and those that still straddle the cut are scored in float64. When that has cost as much as scoring everybody, S_ref and
the basis are renewed. Rounding of the stored numbers is part of every interval, so the set is that of the naive loop in
float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llmkern._library import bad_value
from llmkern.ops.vas_score import SecondMoment, vas_score
from llmkern.papers.data_selection.tensors import as_tensor, square_norms

ROWS = 8192
# Renewing costs about as much as this share of the survivors scored in float64.
RENEW = 0.5


@dataclass
class Work:
    """What a run did, in rows: scored in fp32 for a reference, enclosed by the basis, scored in float64."""

    references: int = 0
    referenced: int = 0
    enclosed: int = 0
    rescored: int = 0


def vas_d(
    image: Any,
    count: int,
    rounds: int,
    *,
    first: SecondMoment | None = None,
    ties: np.ndarray | None = None,
    rank: int = 32,
    work: Work | None = None,
    resume: tuple[int, np.ndarray] | None = None,
    checkpoint: Callable[[int, np.ndarray], None] = lambda done, alive: None,
) -> np.ndarray:
    """Indices, ascending, of the ``count`` rows that VAS-D leaves.

    Args:
        image: (N, d) tensor, array or np.memmap in fp32, fp16 or bf16; unit vectors in general.
        count: rows to keep. rounds: R; fewer are made where no rows are left to drop.
        first: the second moment that the first round scores with, that of ``image`` when absent (the paper takes that
            of the pool before the CLIP filter).
        ties: (N,) keys; of equal scores the greater key goes first (default: the index).
        rank: directions of the basis.
        work: filled with what was done.
        resume, checkpoint: ``checkpoint(rounds done, indices left)`` is called after every round, and ``resume`` takes
            the same pair.
    """
    n = len(image)
    if not 0 < count <= n:
        raise bad_value("vas_d", f"count in 1 to {n}, the number of rows", count)
    if rounds < 1:
        raise bad_value("vas_d", "rounds of at least 1", rounds)
    work = Work() if work is None else work
    step = -(-(n - count) // rounds)
    done, alive = resume if resume is not None else (0, np.arange(n))
    moment = SecondMoment(image.shape[1])
    for rows in _chunks(alive):
        moment.add(_take(image, rows))
    sigma = _mean(moment if first is None or done else first)
    reference: _Reference | None = None
    spent = 0
    while len(alive) > count:
        drop = min(step, len(alive) - count)
        if reference is None or spent > RENEW * len(alive):
            reference, spent = _Reference(image, alive, sigma, rank, work), 0
        rows, scores, tried = reference.lowest(image, alive, sigma, drop, work)
        spent += tried
        keys = rows if ties is None else ties[rows]
        gone = np.sort(rows[np.lexsort((-keys.astype(np.int64), scores))[:drop]])
        alive = np.setdiff1d(alive, gone, assume_unique=True)
        for part in _chunks(gone):
            moment.subtract(_take(image, part))
        sigma = _mean(moment) if moment.count else sigma
        done += 1
        checkpoint(done, alive)
    return alive


class _Reference:
    """Scores under one S, and the features that enclose how they drift from it; indexed by row of the whole."""

    def __init__(self, image: Any, alive: np.ndarray, sigma: Tensor, rank: int, work: Work) -> None:
        n, d = image.shape
        self.sigma = sigma
        rank = min(rank, d)
        self.basis, _ = torch.linalg.qr(torch.linalg.eigh(sigma).eigenvectors.flip(1)[:, :rank])
        self.scores = np.full(n, np.nan)
        self.norms = np.zeros(n)
        self.features = np.zeros((n, rank), np.float32)
        s, u = sigma.float(), self.basis.float()
        for rows in _chunks(alive):
            x = _take(image, rows)
            self.scores[rows] = vas_score(x, s).double().numpy()
            self.norms[rows] = square_norms(x).double().numpy()
            self.features[rows] = (x.float() @ u).numpy()
        # Of a sum of d products in fp32, twice, and of S in fp32: relative to |S|_F |x|^2, which bounds them all.
        self.rounding = 4 * (d + 2) * 2.0**-24 * float(torch.linalg.matrix_norm(sigma))
        work.references += 1
        work.referenced += len(alive)

    def lowest(
        self, image: Any, alive: np.ndarray, sigma: Tensor, drop: int, work: Work
    ) -> tuple[np.ndarray, np.ndarray, int]:
        """Rows among which the lowest ``drop`` are, with their scores in float64; and how many were tried."""
        u = self.basis
        scale = _fit(sigma, self.sigma, u)
        drift = sigma - scale * self.sigma
        middle, norms = scale * self.scores[alive], self.norms[alive]
        # The norms are rounded too, hence a little more than one.
        slack = (scale * self.rounding + float(torch.linalg.matrix_norm(drift)) * (1 + 1e-3)) * norms
        rows = alive[middle - slack <= _kth(middle + slack, drop)]
        low, high = self._enclose(rows, drift, scale)
        rows = rows[low <= _kth(high, drop)]
        exact = [vas_score(_take(image, part).double(), sigma).numpy() for part in _chunks(rows)]
        work.enclosed += len(low)
        work.rescored += len(rows)
        return rows, np.concatenate(exact), len(rows)

    def _enclose(self, rows: np.ndarray, drift: Tensor, scale: float) -> tuple[np.ndarray, np.ndarray]:
        u = self.basis
        across = drift @ u
        inside = u.t() @ across
        across = across - u @ inside
        rest = drift - u @ (u.t() @ drift)
        rest = rest - (rest @ u) @ u.t()
        edges = torch.linalg.eigvalsh((rest + rest.t()) / 2)
        # The complement holds the zeros of the basis, too.
        lowest, highest = min(0.0, float(edges[0])), max(0.0, float(edges[-1]))
        z = torch.from_numpy(self.features[rows]).double()
        moved = vas_score(z, (inside + inside.t()) / 2).numpy()
        cross = vas_score(z, across.t() @ across).clamp(min=0).sqrt().numpy()
        norms = self.norms[rows]
        d = self.sigma.shape[0]
        left = np.maximum(norms - z.square().sum(1).numpy(), 0) + 4 * (d + 2) * 2.0**-24 * norms
        # Features in fp32 are off by at most (d + 2) 2^-24 |x| each way.
        slack = (scale * self.rounding + 4 * (d + 2) * 2.0**-24 * float(torch.linalg.matrix_norm(drift))) * norms
        slack = slack + 2 * cross * np.sqrt(left)
        middle = scale * self.scores[rows] + moved
        return middle + lowest * left - slack, middle + highest * left + slack


def _fit(sigma: Tensor, reference: Tensor, basis: Tensor) -> float:
    """The multiple of the reference that leaves the least drift outside the basis."""

    def outside(s: Tensor) -> Tensor:
        s = s - basis @ (basis.t() @ s)
        return s - (s @ basis) @ basis.t()

    left, right = outside(sigma), outside(reference)
    square = float((right * right).sum())
    return max(0.0, float((left * right).sum()) / square) if square > 0 else 1.0


def _kth(values: np.ndarray, count: int) -> float:
    return float(np.partition(values, count - 1)[count - 1])


def _mean(moment: SecondMoment) -> Tensor:
    return moment.mean(torch.float64)


def _take(image: Any, rows: np.ndarray) -> Tensor:
    return image[torch.from_numpy(rows)] if isinstance(image, Tensor) else as_tensor(image[rows])


def _chunks(rows: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(rows), ROWS):
        yield rows[start : start + ROWS]


def vas_d_naive(
    image: Any, count: int, rounds: int, *, first: SecondMoment | None = None, dtype: torch.dtype = torch.float64
) -> np.ndarray:
    """The loop as the paper has it, every round in full: what ``vas_d`` is held to."""
    n, alive = len(image), np.arange(len(image))
    step = -(-(n - count) // rounds)
    while len(alive) > count:
        if first is None or len(alive) < n:
            moment = SecondMoment(image.shape[1])
            for rows in _chunks(alive):
                moment.add(_take(image, rows))
        else:
            moment = first
        sigma = moment.mean(dtype)
        scores = np.concatenate([vas_score(_take(image, rows).to(dtype), sigma).numpy() for rows in _chunks(alive)])
        drop = min(step, len(alive) - count)
        alive = np.sort(alive[np.lexsort((-alive, scores))[drop:]])
    return alive


__all__ = ["Work", "vas_d", "vas_d_naive"]
