r"""Monomials of d variables up to degree g, in the order in which features are built and states are stored.

    (x.y)^m = sum_{|alpha|=m} m!/alpha! x^alpha y^alpha

Within a degree monomials are ordered by their lowest variable l: those with lowest variable l are x_l times all
monomials of one degree less whose lowest variable is at least l, and these are a suffix of that degree. So the features
of degree g never need to be built: block l of them is x_l times a slice of degree g - 1.

``leading`` = r < d keeps all monomials of degree 2, and above it only those in the last r variables (the directions of
largest variance are to be put last): again suffixes.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Block:
    """State rows [row, row + count) belong to the features panel[start : start + count], times x[dim] if dim >= 0."""

    dim: int
    start: int
    count: int
    row: int


@dataclass(frozen=True, eq=False)
class Monomials:
    """Index tables of the monomials; rows are those of a state.

    Attributes:
        panel_parent, panel_dim: feature p of the panel is panel[panel_parent[p]] * x[panel_dim[p]], p >= 1; the panel
            is all that is ever built. Feature 0 is 1.
        levels: where the degrees 1, 2, .. of the panel begin, and its end.
        blocks: the first is the panel itself (dim -1), the others are products that are never built.
        degrees: (R,) degree of each row.
        multiplicity: (R,) m!/alpha!.
        tail: (R,) whether the row is of degree 2 with both variables outside the leading ones.
    """

    dim: int
    degree: int
    leading: int
    panel_parent: np.ndarray
    panel_dim: np.ndarray
    levels: tuple[int, ...]
    blocks: tuple[Block, ...]
    exponents: np.ndarray
    degrees: np.ndarray
    multiplicity: np.ndarray
    tail: np.ndarray

    @property
    def panel(self) -> int:
        return len(self.panel_parent)

    @property
    def count(self) -> int:
        return len(self.degrees)

    def features(self, x: Tensor) -> Tensor:
        """(.., d) -> (.., R): every monomial, in the order of the rows; differentiable."""
        return self.rows(x.mT).mT

    def rows(self, x: Tensor) -> Tensor:
        """The same with tokens last, (.., d, n) -> (.., R, n): one row a monomial."""
        if torch.is_grad_enabled() and x.requires_grad:
            return self._rows_with_gradient(x)
        made = x.new_empty(*x.shape[:-2], self.count, x.shape[-1])
        made[..., 0, :] = 1
        if len(self.levels) > 1:
            made[..., 1 : self.levels[1], :] = x
        for begin, end in zip(self.levels[1:-1], self.levels[2:]):
            parent, dim = self.panel_parent[begin:end], self.panel_dim[begin:end]
            made[..., begin:end, :] = made[..., parent, :] * x[..., dim, :]
        for b in self.blocks[1:]:
            of_panel = made[..., b.start : b.start + b.count, :]
            torch.mul(of_panel, x[..., b.dim : b.dim + 1, :], out=made[..., b.row : b.row + b.count, :])
        return made

    def _rows_with_gradient(self, x: Tensor) -> Tensor:
        panel = torch.ones_like(x[..., :1, :])
        for begin, end in zip(self.levels[:-1], self.levels[1:]):
            parent, dim = self.panel_parent[begin:end], self.panel_dim[begin:end]
            level = x if begin == 1 else panel[..., parent, :] * x[..., dim, :]
            panel = torch.cat([panel, level], -2)
        products = [panel[..., b.start : b.start + b.count, :] * x[..., b.dim : b.dim + 1, :] for b in self.blocks[1:]]
        return torch.cat([panel, *products], -2)

    def pull(self, x: Tensor, slope: Tensor) -> Tensor:
        """(d, n), and the gradient of its rows (R, n) -> that of x."""
        rows = self.rows(x)
        pulled = torch.zeros_like(x)
        for variable, (has, less) in enumerate(self._without):
            times = torch.from_numpy(self.exponents[has, variable]).to(x)
            pulled[variable] = (slope[has] * rows[less]).mT @ times
        return pulled

    @functools.cached_property
    def _without(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """By variable, the monomials that have it and those with one factor of it less."""
        row_of = {tuple(e): row for row, e in enumerate(self.exponents.tolist())}
        found = []
        for variable in range(self.dim):
            has = self.exponents[:, variable].nonzero()[0]
            less = self.exponents[has].copy()
            less[:, variable] -= 1
            found.append((has, np.array([row_of[tuple(e)] for e in less.tolist()], np.int64)))
        return found

    def coefficients(self, polynomial: Tensor) -> Tensor:
        """(.., g + 1) coefficients of p -> (.., R) those of the monomials in p(x.y)."""
        degrees = torch.from_numpy(self.degrees).to(polynomial.device)
        return polynomial[..., degrees] * torch.from_numpy(self.multiplicity).to(polynomial)


@functools.lru_cache(maxsize=64)
def monomials(dim: int, degree: int, leading: int | None = None) -> Monomials:
    """Tables for ``dim`` variables to ``degree`` >= 1, the last ``leading`` of them to that degree (default all)."""
    r = dim if leading is None or degree <= 2 else min(leading, dim)
    first = dim - r
    parents, dims = [0], [-1]
    # Of the degree last built: where it begins, and where its monomials with lowest variable >= l begin.
    previous_start, suffix = 0, [0] * dim
    levels = [(0, 1)]
    for level in range(1, degree):
        begin = len(parents)
        starts = [0] * dim
        for low in range(0 if level == 1 else first, dim):
            starts[low] = len(parents)
            for parent in range(suffix[low] if level > 1 else previous_start, levels[-1][1]):
                parents.append(parent)
                dims.append(low)
        levels.append((begin, len(parents)))
        suffix = starts
        if level == 1:
            linear_starts = list(starts)
    blocks = [Block(-1, 0, len(parents), 0)]
    row = len(parents)

    def add(dim_: int, start: int, end: int) -> None:
        nonlocal row
        blocks.append(Block(dim_, start, end - start, row))
        row += end - start

    if degree == 1:
        for low in range(dim):
            add(low, 0, 1)
    else:
        if degree > 2:
            for low in range(first):
                add(low, linear_starts[low], levels[1][1])
        for low in range(first, dim):
            add(low, suffix[low], levels[-1][1])
    panel_exponents = np.zeros((len(parents), dim), np.int64)
    for p in range(1, len(parents)):
        panel_exponents[p] = panel_exponents[parents[p]]
        panel_exponents[p, dims[p]] += 1
    exponents = np.zeros((row, dim), np.int64)
    for block in blocks:
        rows = slice(block.row, block.row + block.count)
        exponents[rows] = panel_exponents[block.start : block.start + block.count]
        if block.dim >= 0:
            exponents[rows, block.dim] += 1
    degrees = exponents.sum(1)
    factorial = np.cumprod(np.r_[1.0, np.arange(1, degree + 1)])
    multiplicity = factorial[degrees] / factorial[exponents].prod(1)
    tail = (degrees == 2) & (exponents[:, first:].sum(1) == 0)
    return Monomials(
        dim,
        degree,
        r,
        np.array(parents),
        np.array(dims),
        tuple(end for _, end in levels),
        tuple(blocks),
        exponents,
        degrees,
        multiplicity,
        tail,
    )
