r"""Polynomials p near exp on [-B, B] with a proven error.

Two kinds, by the order ``contact`` of the contact with exp at zero:

    contact m = 2, 4, ..   p(s) = sum_{k<m} s^k / k! + s^m r(s),   |p(s) - e^s| <= error s^m
    contact 0              p minimax for the relative error,       |p(s) - e^s| <= error e^s

r is the minimax polynomial of (e^s - sum_{k<m} s^k / k!) / s^m. Scores of attention are far smaller than the bound that
Cauchy and Schwarz give for them, and there a polynomial with contact is exact to first order, whereas a plain minimax
one has a wrong slope: at equal degree its output errs ten times as much. Kernels take contact of 2 and more; contact 0,
the papers' form, is there to be compared with.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.polynomial import chebyshev, polynomial

Function = Callable[[np.ndarray], np.ndarray]

# Bounds are rounded up to powers of 2^(1/8), so that few fits serve all data.
BOUND_STEPS = 8
MAX_BOUND = 16.0
# The residual is taken for a polynomial of at most this degree: the Chebyshev coefficients of exp on [-16, 16] beyond
# it are below 1e-22 of its largest value. Between the points of a Chebyshev grid it then exceeds them by the factor
# 1 / cos(pi RESIDUAL_DEGREE / (2 GRID)) at most (Ehlich and Zeller).
RESIDUAL_DEGREE = 80
GRID = 4000
# Differences of doubles near one: what is below cannot be told from rounding.
RESOLUTION = 1e-15


@dataclass(frozen=True)
class Fit:
    """p(s) = sum_k coefficients[k] s^k with its certificate: see the module."""

    coefficients: tuple[float, ...]
    contact: int
    bound: float
    error: float

    @property
    def degree(self) -> int:
        return len(self.coefficients) - 1

    @property
    def absolute(self) -> float:
        """sum_k |a_k| B^k: what the terms of p add up to without their signs."""
        return sum(abs(a) * self.bound**k for k, a in enumerate(self.coefficients))


def round_up_bound(bound: float) -> float:
    """The least bound of the table at or above this one (at least 2^-8)."""
    bound = max(bound, 2.0**-8)
    steps = math.ceil(math.log2(bound) * BOUND_STEPS)
    return next(b for b in (2.0 ** ((steps + i) / BOUND_STEPS) for i in (-1, 0, 1)) if b >= bound)


@functools.lru_cache(maxsize=1024)
def fit_exponential(degree: int, contact: int, bound: float) -> Fit:
    """The polynomial of this degree on [-bound, bound]; contact is 0 or an even number of at most ``degree``."""
    if contact % 2 or not 0 <= contact <= degree:
        raise ValueError(f"contact is even and at most the degree {degree}, got {contact}")
    if not 0 < bound <= MAX_BOUND:
        raise ValueError(f"bound is in (0, {MAX_BOUND}], got {bound}")
    taylor = [1 / math.factorial(k) for k in range(contact)]
    r = _minimax(lambda x: _remainder(x, contact), _weight(contact), degree - contact, bound)
    coefficients = np.array([*taylor, *r])
    # The grid checks what is stored, coefficients in powers of s, not what was meant.
    grid = bound * np.cos(np.linspace(0, np.pi, GRID))
    residual = np.abs(polynomial.polyval(grid, r) - _remainder(grid, contact)) * _weight(contact)(grid)
    slack = 1 / math.cos(math.pi * RESIDUAL_DEGREE / (2 * GRID))
    scale = float(np.max(np.abs(r) * bound ** np.arange(len(r)))) * math.exp(bound if contact == 0 else 0)
    error = float(residual.max()) * slack + RESOLUTION * max(1.0, scale)
    return Fit(tuple(float(a) for a in coefficients), contact, bound, error)


def _weight(contact: int) -> Function:
    return (lambda x: np.exp(-x)) if contact == 0 else np.ones_like


def _remainder(x: np.ndarray, contact: int) -> np.ndarray:
    """(e^x - sum_{k<contact} x^k / k!) / x^contact, by its series: no cancellation, also at zero."""
    if contact == 0:
        return np.exp(x)
    total = np.zeros_like(x)
    for k in range(contact + 70, contact - 1, -1):
        total = total * x + 1 / math.factorial(k)
    return total


def _minimax(function: Function, weight: Function, degree: int, bound: float) -> np.ndarray:
    """Coefficients (powers of s) of the Remez exchange from Chebyshev's nodes; it ends where it stops to gain."""
    points = bound * np.cos(np.pi * np.arange(degree + 2) / (degree + 1))
    grid = bound * np.cos(np.linspace(0, np.pi, 1500))
    best, best_error = np.zeros(degree + 1), math.inf
    for _ in range(12):
        signs = (-1.0) ** np.arange(degree + 2) / weight(points)
        matrix = np.column_stack([chebyshev.chebvander(points / bound, degree), signs])
        solution = np.linalg.solve(matrix, function(points))
        residual = (chebyshev.chebval(grid / bound, solution[:-1]) - function(grid)) * weight(grid)
        error = float(np.abs(residual).max())
        if not error < best_error * (1 - 1e-6):
            break
        best, best_error = solution[:-1], error
        extrema = _alternation(residual, degree + 2)
        if extrema is None:
            break
        points = grid[extrema]
    return chebyshev.cheb2poly(best) / bound ** np.arange(degree + 1)


def _alternation(residual: np.ndarray, count: int) -> np.ndarray | None:
    """Places of the extrema between sign changes; None where there are not as many as needed."""
    edges = np.flatnonzero(np.diff(np.sign(residual)) != 0) + 1
    pieces = np.split(np.arange(len(residual)), edges)
    places = np.array([piece[np.abs(residual[piece]).argmax()] for piece in pieces])
    while len(places) > count:
        places = places[1:] if abs(residual[places[0]]) < abs(residual[places[-1]]) else places[:-1]
    return places if len(places) == count else None
