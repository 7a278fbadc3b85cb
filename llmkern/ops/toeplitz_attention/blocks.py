r"""Sums over far keys by blocks: low rank in the distance, products of matrices in everything else. One head.

    N_i = sum_alpha coefficient_alpha x_i^alpha sum_{j far from i} symbol_alpha(i - j) y_j^alpha columns_j

Within a block of keys J the sum over j is S[J, b] = sum_w L_b(w) y^alpha columns for each node b, R (c + 1) numbers a
node; H[I, a] = sum_{J, b} symbol((I - J) C + x_a - x_b) S[J, b] couples nodes; a block of queries reads H. ``rows`` are
monomials with tokens last, (R, tokens); symbols are of all distances, (1 or R, 2 tokens - 1).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from llmkern.ops.toeplitz_attention.layout import Layout, lag_magnitudes, node_places, nodes_of, sums_over_far

# Numbers in the coupling matrices of a batch of features that have symbols of their own.
COUPLED = 2**22
# Rounding in a sum of n terms: this times sqrt(n) units, a probabilistic bound (Higham and Mary 2019).
ROUNDING = 6.0


class Gradients(NamedTuple):
    x: Tensor
    y: Tensor
    columns: Tensor
    symbols: Tensor | None


class BlockProduct:
    def __init__(self, layout: Layout, nodes: int, like: Tensor) -> None:
        self.layout, self.nodes = layout, nodes
        self.basis = nodes_of(layout.size, nodes)[1].to(like)
        self.places = node_places(layout, nodes, like.device)
        blocks = torch.arange(layout.count, device=like.device)
        self.between = blocks[:, None] - blocks[None, :] + layout.count - 1
        self.far = layout.far(like.device)

    def forward(
        self, x: Tensor, y: Tensor, columns: Tensor, symbols: Tensor, coefficients: Tensor, moments: Tensor
    ) -> Tensor:
        """(tokens, c + 1): N, and beside it its last column with the weights ``moments`` in place of the others."""
        states = self._couple(self._states(y, columns), symbols, transpose=False)
        weighted = torch.cat([states * coefficients[:, None, None], states[..., -1:] * moments[:, None, None]], -1)
        return self._read(x, weighted)

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
        """Of N (tokens, c)."""
        keys = self._states(y, columns)
        queries = self._states(x, grad) * coefficients[:, None, None]
        to_queries = self._couple(keys, symbols, transpose=False) * coefficients[:, None, None]
        to_keys = self._couple(queries, symbols, transpose=True)
        return Gradients(
            self._pull_rows(to_queries, grad),
            self._pull_rows(to_keys, columns),
            self._read(y, to_keys),
            self._pull_symbols(queries, keys, symbols) if want_symbols else None,
        )

    def errors(self, x: Tensor, y: Tensor, weights: Tensor, symbols: Tensor, interpolation: Tensor) -> Tensor:
        """(tokens, 2): what interpolation and rounding add to sums of monomials of these weights, at most; x and y are
        their absolute values.

        ``interpolation`` (1 or R, 2 count - 1): errors of the symbols by difference of blocks.
        """
        size, count = self.layout.size, self.layout.count
        terms = size + count * self.nodes + len(x)
        unit = ROUNDING * terms**0.5 * torch.finfo(x.dtype).eps / 2 * float(self.basis.abs().sum(1).amax()) ** 2
        of_lags = torch.stack([interpolation, unit * lag_magnitudes(symbols, self.layout)])
        # sum_j |y_j^alpha| of the largest block of keys.
        largest = y.unflatten(1, (count, size)).sum(-1).amax(-1) * weights
        reach = sums_over_far(of_lags, self.layout) * largest[:, None]
        blocks = x.unflatten(1, (count, size)).permute(1, 2, 0)
        return (blocks @ reach.permute(2, 1, 0)).flatten(0, 1)

    def _states(self, rows: Tensor, columns: Tensor) -> Tensor:
        """(count, R, nodes, c): sums over each block, weighted by the polynomials of its nodes."""
        count, size = self.layout.count, self.layout.size
        blocks = rows.unflatten(1, (count, size)).transpose(0, 1)
        return (blocks @ self._at_nodes(columns)).unflatten(2, (self.nodes, -1))

    def _at_nodes(self, columns: Tensor) -> Tensor:
        """(count, size, nodes c)."""
        blocks = columns.unflatten(0, (self.layout.count, self.layout.size))
        return (blocks[:, :, None, :] * self.basis[:, :, None]).flatten(2)

    def _read(self, rows: Tensor, states: Tensor) -> Tensor:
        """The transpose of ``_states`` in its first argument's place: (tokens, c)."""
        blocks = rows.unflatten(1, (self.layout.count, self.layout.size)).permute(1, 2, 0)
        at_nodes = (blocks @ states.flatten(2)).unflatten(2, (self.nodes, -1))
        return at_nodes.mul_(self.basis[:, :, None]).sum(2).flatten(0, 1)

    def _pull_rows(self, states: Tensor, columns: Tensor) -> Tensor:
        """Gradient of the rows in ``_states``: (R, tokens)."""
        return (states.flatten(2) @ self._at_nodes(columns).mT).transpose(0, 1).flatten(1)

    def _coupling(self, symbols: Tensor) -> Tensor:
        """(S, count nodes, count nodes), zero between near blocks."""
        at_nodes = symbols[:, self.places] * self.far[:, None, None]
        return at_nodes[:, self.between].transpose(2, 3).flatten(3).flatten(1, 2)

    def _couple(self, states: Tensor, symbols: Tensor, transpose: bool) -> Tensor:
        """(count, R, nodes, c) of one side -> the same of the other."""
        count, features, nodes, width = states.shape
        flat = states.permute(1, 0, 2, 3).reshape(features, count * nodes, width)
        coupled = torch.empty_like(flat)
        for part, symbol in self._batches(symbols, features):
            matrix = self._coupling(symbol)
            coupled[part] = self._product(matrix.mT if transpose else matrix, flat[part])
        return coupled.unflatten(1, (count, nodes)).transpose(0, 1)

    def _batches(self, symbols: Tensor, features: int) -> list[tuple[slice, Tensor]]:
        """Features and their symbols: all at once where they share one."""
        if len(symbols) == 1:
            return [(slice(None), symbols)]
        step = max(1, COUPLED // (self.layout.count * self.nodes) ** 2)
        parts = [slice(begin, begin + step) for begin in range(0, features, step)]
        return [(part, symbols[part]) for part in parts]

    @staticmethod
    def _product(matrix: Tensor, states: Tensor) -> Tensor:
        """(S, m, m) times (R, m, c), as one product of matrices where S is 1."""
        if len(matrix) > 1 or len(states) == 1:
            return matrix @ states
        flat = states.transpose(0, 1).flatten(1)
        return (matrix[0] @ flat).unflatten(1, (states.shape[0], -1)).transpose(0, 1)

    def _pull_symbols(self, queries: Tensor, keys: Tensor, symbols: Tensor) -> Tensor:
        count, features, nodes, width = keys.shape
        left, right = (t.permute(1, 0, 2, 3).reshape(features, count * nodes, width) for t in (queries, keys))
        pulled = torch.zeros_like(symbols)
        for part, symbol in self._batches(symbols, features):
            if len(symbol) == 1:
                pairs = (left.transpose(0, 1).flatten(1) @ right.transpose(0, 1).flatten(1).mT)[None]
            else:
                pairs = left[part] @ right[part].mT
            pairs = pairs.unflatten(2, (count, nodes)).unflatten(1, (count, nodes)).transpose(2, 3)
            of_lags = pairs.new_zeros(len(pairs), 2 * count - 1, nodes, nodes)
            of_lags.index_add_(1, self.between.flatten(), pairs.flatten(1, 2))
            of_lags *= self.far[:, None, None]
            pulled[part].index_add_(1, self.places.flatten(), of_lags.flatten(1))
        return pulled
