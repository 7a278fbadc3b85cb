r"""Sums over all keys by fast Fourier transforms: for symbols of any shape. One head; terms as in ``blocks.py``.

    N_i = sum_alpha coefficient_alpha x_i^alpha (symbol_alpha * (y^alpha columns))_i

Convolutions are linear: nothing wraps around. In C++ features are made and consumed as transforms read and write them;
what stands here goes by ``torch.fft``, over lengths of at least N + M - 1, products of powers of 2, 3 and 5, and in
batches that stay in the cache: the reference, and what GPUs run. Symbols are transformed once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from llmkern._library import define_op
from llmkern.ops.toeplitz_attention.blocks import Gradients
from llmkern.polynomial import monomials

# Numbers that one batch of features transforms at a time.
BATCH = 2**18
# A transform errs by log2(length) units in the mean square, and three of them make a convolution.
TRANSFORMS = 3.0


def fast_length(least: int) -> int:
    """The least 2^a 3^b 5^c of at least this."""
    best = 2 ** math.ceil(math.log2(max(1, least)))
    for five in range(math.ceil(math.log(best, 5)) + 1):
        for three in range(math.ceil(math.log(best, 3)) + 1):
            odd = 5**five * 3**three
            best = min(best, odd * 2 ** max(0, math.ceil(math.log2(least / odd))))
    return best


class FourierProduct:
    """``rows`` queries, ``keys`` keys; symbols are of the distances -(keys - 1) .. rows - 1, x and y (d, tokens) the
    variables of monomials up to ``degree``."""

    def __init__(self, rows: int, keys: int, degree: int) -> None:
        self.degree = degree
        self.length = fast_length(max(2, rows + keys - 1))

    def forward(
        self, x: Tensor, y: Tensor, columns: Tensor, symbols: Tensor, coefficients: Tensor, moments: Tensor
    ) -> Tensor:
        """(rows, c + 1): N, and beside it its last column with the weights ``moments`` in place of the others."""
        return torch.ops.llmkern.toeplitz_fourier_fwd(x, y, columns, symbols, coefficients, moments, self.degree)

    def backward(
        self,
        grad: Tensor,
        x: Tensor,
        y: Tensor,
        columns: Tensor,
        symbols: Tensor,
        coefficients: Tensor,
        want_symbols: bool,
    ) -> Gradients:
        """Of N (rows, c); to x and y, the variables."""
        inputs = (x, y, columns, symbols, coefficients)
        dx, dy, dcolumns, dsymbols = torch.ops.llmkern.toeplitz_fourier_bwd(grad, *inputs, self.degree, want_symbols)
        return Gradients(dx, dy, dcolumns, dsymbols if want_symbols else None)

    def errors(self, x: Tensor, y: Tensor, orders: Tensor, symbols: Tensor, degrees: Tensor) -> Tensor:
        """(rows,): what the rounding of transforms adds to sums of monomials, at most.

        Rounding is |y^alpha| |symbol_alpha| in the norms of sequences, and by Cauchy and Schwarz, with sum_alpha m! /
        alpha! x^2alpha = |x|^2m, sum_alpha m! / alpha! |x_i^alpha| |y^alpha| <= |x_i|^m (sum_j |y_j|^2m)^1/2.
        """
        unit = TRANSFORMS * math.log2(2 * self.length) * torch.finfo(x.dtype).eps
        norms = torch.linalg.vector_norm(symbols, dim=1)
        of_queries, of_keys = (t.square().sum(0).sqrt() for t in (x, y))
        slack, power = torch.zeros_like(of_queries), torch.ones_like(of_keys)
        weights = []
        for order, weight in enumerate(orders):
            symbol = norms[0] if len(norms) == 1 else norms[degrees == order].amax()
            weights.append(unit * weight * symbol * torch.linalg.vector_norm(power))
            power = power * of_keys
        for weight in reversed(weights):
            slack = slack * of_queries + weight
        return slack


# The products by torch.fft --------------------------------------------------------------------------------------------


def _spectrum(symbols: Tensor, rows: int, length: int) -> Tensor:
    """Of symbols on a circle: distance t stands at t, or at length + t where it is negative."""
    keys = symbols.shape[1] - rows + 1
    circle = F.pad(symbols[:, keys - 1 :], (0, length - rows))
    if keys > 1:
        circle[:, 1 - keys :] = symbols[:, : keys - 1]
    return torch.fft.rfft(circle)


def _batches(spectrum: Tensor, features: int, width: int, length: int) -> Iterator[tuple[slice, Tensor]]:
    """Features, and spectra that fit their transforms (features, c, frequencies)."""
    step = max(1, BATCH // (length * width))
    for begin in range(0, features, step):
        part = slice(begin, begin + step)
        yield part, (spectrum if len(spectrum) == 1 else spectrum[part])[:, None]


def fourier_reference(
    x: Tensor, y: Tensor, columns: Tensor, symbols: Tensor, coefficients: Tensor, moments: Tensor, degree: int
) -> Tensor:
    """x (d, rows), y (d, keys), columns (keys, c), symbols (1 or R, N + M - 1) -> N of ``FourierProduct``."""
    tables = monomials(len(x), degree)
    x, y = tables.rows(x), tables.rows(y)
    rows, length = x.shape[1], fast_length(symbols.shape[1])
    spectrum = _spectrum(symbols, rows, length)
    total = columns.new_zeros(columns.shape[1] + 1, rows)
    for part, symbol in _batches(spectrum, len(x), columns.shape[1], length):
        of_keys = torch.fft.rfft(y[part, None] * columns.mT, n=length)
        seen = torch.fft.irfft(of_keys * symbol, n=length)[..., :rows]
        total[:-1] += ((x[part] * coefficients[part, None])[:, None] * seen).sum(0)
        total[-1] += (x[part] * moments[part, None] * seen[:, -1]).sum(0)
    return total.mT


def fourier_backward_reference(
    grad: Tensor,
    variables: Tensor,
    key_variables: Tensor,
    columns: Tensor,
    symbols: Tensor,
    coefficients: Tensor,
    degree: int,
    want_symbols: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the variables, columns and symbols; the last is empty where it is not wanted."""
    tables = monomials(len(variables), degree)
    x, y = tables.rows(variables), tables.rows(key_variables)
    rows, keys, length = x.shape[1], y.shape[1], fast_length(symbols.shape[1])
    spectrum = _spectrum(symbols, rows, length)
    dx, dy, dcolumns = torch.empty_like(x), torch.empty_like(y), torch.zeros_like(columns.mT)
    dspectrum = torch.zeros_like(spectrum) if want_symbols else None
    for part, symbol in _batches(spectrum, len(x), columns.shape[1], length):
        of_keys = torch.fft.rfft(y[part, None] * columns.mT, n=length)
        of_queries = torch.fft.rfft((x[part] * coefficients[part, None])[:, None] * grad.mT, n=length)
        seen = torch.fft.irfft(of_keys * symbol, n=length)[..., :rows]
        dx[part] = (grad.mT * seen).sum(1) * coefficients[part, None]
        pulled = torch.fft.irfft(of_queries * symbol.conj(), n=length)[..., :keys]
        dy[part] = (columns.mT * pulled).sum(1)
        dcolumns += (y[part, None] * pulled).sum(0)
        if dspectrum is not None:
            pairs = (of_queries * of_keys.conj()).sum(1)
            if len(dspectrum) == 1:
                dspectrum += pairs.sum(0, keepdim=True)
            else:
                dspectrum[part] = pairs
    dx, dy = tables.pull(variables, dx), tables.pull(key_variables, dy)
    if dspectrum is None:
        return dx, dy, dcolumns.mT, symbols.new_empty(0)
    circle = torch.fft.irfft(dspectrum, n=length)
    return dx, dy, dcolumns.mT, torch.cat([circle[:, length - keys + 1 :], circle[:, :rows]], 1)


define_op(
    "toeplitz_fourier_fwd",
    "(Tensor x, Tensor y, Tensor columns, Tensor symbols, Tensor coefficients, Tensor moments, int degree) -> Tensor",
    stem="toeplitz_attention",
    reference=fourier_reference,
    fake=lambda x, y, columns, *_: x.new_empty(columns.shape[1] + 1, x.shape[1]).mT,
)
define_op(
    "toeplitz_fourier_bwd",
    "(Tensor grad, Tensor x, Tensor y, Tensor columns, Tensor symbols, Tensor coefficients, int degree,"
    " bool want_symbols) -> (Tensor, Tensor, Tensor, Tensor)",
    stem="toeplitz_attention",
    reference=fourier_backward_reference,
    fake=lambda grad, x, y, columns, symbols, coefficients, degree, want_symbols: (
        torch.empty_like(x),
        torch.empty_like(y),
        columns.new_empty(columns.shape[::-1]).mT,
        symbols.new_empty(symbols.shape if want_symbols else 0),
    ),
)
