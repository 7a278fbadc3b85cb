"""Polynomials in place of the exponential: fits, certificates, monomial features. Knows nothing of attention."""

from llmkern.polynomial.fit import Fit, fit_exponential, round_up_bound
from llmkern.polynomial.monomials import Block, Monomials, monomials

__all__ = ["Block", "Fit", "Monomials", "fit_exponential", "monomials", "round_up_bound"]
