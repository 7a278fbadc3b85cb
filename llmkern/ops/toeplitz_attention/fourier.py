r"""Sums over all keys by fast Fourier transforms: for symbols of any shape. One head; terms as in ``blocks.py``.

    N_i = sum_alpha coefficient_alpha x_i^alpha (symbol_alpha * (y^alpha columns))_i

Convolutions are linear: of length N + M - 1 at least, so that nothing wraps around, and a product of powers of 2, 3 and
5. Symbols are transformed once; features are made and consumed in batches that stay in the cache.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from llmkern.ops.toeplitz_attention.blocks import Gradients

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
    """``rows`` queries, ``keys`` keys; symbols are of the distances -(keys - 1) .. rows - 1."""

    def __init__(self, rows: int, keys: int) -> None:
        self.rows, self.keys = rows, keys
        self.length = fast_length(rows + keys - 1)

    def forward(
        self, x: Tensor, y: Tensor, columns: Tensor, symbols: Tensor, coefficients: Tensor, moments: Tensor
    ) -> Tensor:
        """(rows, c + 1): N, and beside it its last column with the weights ``moments`` in place of the others."""
        spectrum = self._transform_symbols(symbols)
        total = columns.new_zeros(columns.shape[1] + 1, self.rows)
        for part, symbol in self._batches(spectrum, len(x), columns.shape[1]):
            seen = self._inverse(self._transform(y[part, None] * columns.mT) * symbol, self.rows)
            total[:-1] += ((x[part] * coefficients[part, None])[:, None] * seen).sum(0)
            total[-1] += (x[part] * moments[part, None] * seen[:, -1]).sum(0)
        return total.mT

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
        """Of N (rows, c)."""
        spectrum = self._transform_symbols(symbols)
        dx, dy, dcolumns = torch.empty_like(x), torch.empty_like(y), torch.zeros_like(columns.mT)
        dspectrum = torch.zeros_like(spectrum) if want_symbols else None
        for part, symbol in self._batches(spectrum, len(x), columns.shape[1]):
            of_keys = self._transform(y[part, None] * columns.mT)
            of_queries = self._transform((x[part] * coefficients[part, None])[:, None] * grad.mT)
            seen = self._inverse(of_keys * symbol, self.rows)
            dx[part] = (grad.mT * seen).sum(1) * coefficients[part, None]
            pulled = self._inverse(of_queries * symbol.conj(), self.keys)
            dy[part] = (columns.mT * pulled).sum(1)
            dcolumns += (y[part, None] * pulled).sum(0)
            if dspectrum is not None:
                pairs = (of_queries * of_keys.conj()).sum(1)
                if len(dspectrum) == 1:
                    dspectrum += pairs.sum(0, keepdim=True)
                else:
                    dspectrum[part] = pairs
        dsymbols = None if dspectrum is None else self._distances(torch.fft.irfft(dspectrum, n=self.length))
        return Gradients(dx, dy, dcolumns.mT, dsymbols)

    def errors(self, x: Tensor, y: Tensor, weights: Tensor, symbols: Tensor, _: Tensor | None) -> Tensor:
        """(rows, 2): zero, and what the rounding of transforms adds to sums of monomials of these weights."""
        unit = TRANSFORMS * math.log2(2 * self.length) * torch.finfo(x.dtype).eps
        norms = torch.linalg.vector_norm(y, dim=1) * torch.linalg.vector_norm(symbols, dim=1)
        slack = x.abs().mT @ (unit * weights * norms)
        return torch.stack([torch.zeros_like(slack), slack], 1)

    def _batches(self, spectrum: Tensor, features: int, width: int) -> Iterator[tuple[slice, Tensor]]:
        """Features, and spectra that fit their transforms (features, c, frequencies)."""
        step = max(1, BATCH // (self.length * width))
        for begin in range(0, features, step):
            part = slice(begin, begin + step)
            yield part, (spectrum if len(spectrum) == 1 else spectrum[part])[:, None]

    def _transform(self, x: Tensor) -> Tensor:
        return torch.fft.rfft(x, n=self.length)

    def _inverse(self, spectrum: Tensor, count: int) -> Tensor:
        return torch.fft.irfft(spectrum, n=self.length)[..., :count]

    def _transform_symbols(self, symbols: Tensor) -> Tensor:
        """Distance t stands at t, or at length + t where it is negative."""
        circle = symbols.new_zeros(len(symbols), self.length)
        circle[:, : self.rows] = symbols[:, self.keys - 1 :]
        if self.keys > 1:
            circle[:, 1 - self.keys :] = symbols[:, : self.keys - 1]
        return torch.fft.rfft(circle)

    def _distances(self, circle: Tensor) -> Tensor:
        """The transpose of the placing above."""
        symbols = circle.new_zeros(len(circle), self.rows + self.keys - 1)
        symbols[:, self.keys - 1 :] = circle[:, : self.rows]
        if self.keys > 1:
            symbols[:, : self.keys - 1] = circle[:, 1 - self.keys :]
        return symbols
