"""Fits and monomials: what holds by mathematics."""

from __future__ import annotations

import math

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmkern.polynomial import Fit, fit_exponential, monomials, round_up_bound

DEGREES = st.integers(1, 8)


def exact_residual(fit: Fit, s: float) -> float:
    """|p(s) - e^s| to 40 digits."""
    with mpmath.workdps(40):
        return float(abs(mpmath.polyval(list(fit.coefficients[::-1]), mpmath.mpf(s)) - mpmath.exp(s)))


@settings(max_examples=150, deadline=None)
@given(degree=DEGREES, half_contact=st.integers(0, 3), bound=st.floats(0.01, 12), place=st.floats(-1, 1))
def test_the_error_of_a_fit_is_proven_everywhere(degree: int, half_contact: int, bound: float, place: float) -> None:
    contact = min(2 * half_contact, degree // 2 * 2)
    fit = fit_exponential(degree, contact, round_up_bound(bound))
    s = place * fit.bound
    scale = math.exp(s) if contact == 0 else s**contact
    # Coefficients below the contact are stored as doubles, so that contact holds to their rounding.
    assert exact_residual(fit, s) <= fit.error * scale + np.finfo(float).eps


@pytest.mark.parametrize(
    ("degree", "contact", "bound"), [(2, 2, 1.0), (4, 2, 2.0), (5, 4, 2.0), (3, 0, 1.0), (7, 0, 4.0)]
)
def test_a_fit_is_minimax(degree: int, contact: int, bound: float) -> None:
    """The residual reaches its bound with alternating signs at degree - contact + 2 places: none can be better."""
    fit = fit_exponential(degree, contact, bound)
    s = bound * np.cos(np.linspace(0, np.pi, 4001))
    s = s[s != 0]
    residual = np.polynomial.polynomial.polyval(s, fit.coefficients) - np.exp(s)
    residual /= np.exp(s) if contact == 0 else s**contact
    peaks = [residual[0]]
    for value in residual[np.abs(residual) > 0.98 * fit.error]:
        if value * peaks[-1] < 0:
            peaks.append(value)
    assert len(peaks) >= degree - contact + 2


def test_bounds_are_rounded_up_and_little() -> None:
    for bound in (0.01, 0.25, 0.9999, 1.0, 3.3):
        assert bound <= round_up_bound(bound) <= max(bound, 2.0**-8) * 2**0.125


@pytest.mark.parametrize(("degree", "contact", "bound"), [(2, 1, 1.0), (2, 4, 1.0), (2, 2, 0.0), (2, 2, 17.0)])
def test_refuses_fits_that_are_none(degree: int, contact: int, bound: float) -> None:
    with pytest.raises(ValueError, match=r"contact is even|bound is in"):
        fit_exponential(degree, contact, bound)


@settings(max_examples=60, deadline=None)
@given(dim=st.integers(1, 7), degree=st.integers(1, 5), leading=st.integers(1, 7), seed=st.integers(0, 100))
def test_monomials_add_up_to_the_polynomial_of_the_product(dim: int, degree: int, leading: int, seed: int) -> None:
    tables = monomials(dim, degree, leading)
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(2, 5, dim, generator=generator, dtype=torch.float64)
    a = torch.randn(degree + 1, generator=generator, dtype=torch.float64)
    got = (tables.features(x) * tables.features(y)) @ tables.coefficients(a)
    s, first = (x * y).sum(-1), dim - tables.leading
    low = (x[:, first:] * y[:, first:]).sum(-1)
    terms = [a[m] * (s if m <= 2 else low) ** m for m in range(degree + 1)]
    size = (tables.features(x) * tables.features(y)).abs() @ tables.coefficients(a).abs()
    assert ((got - sum(terms)).abs() <= 64 * torch.finfo(torch.float64).eps * size).all()


@pytest.mark.parametrize(("dim", "degree"), [(1, 1), (3, 2), (4, 4), (8, 3), (64, 2)])
def test_each_monomial_stands_once(dim: int, degree: int) -> None:
    tables = monomials(dim, degree)
    assert len({tuple(row) for row in tables.exponents}) == tables.count == math.comb(dim + degree, degree)
    assert tables.panel == (math.comb(dim + degree - 1, degree - 1))
    assert (tables.exponents.sum(1) == tables.degrees).all()
