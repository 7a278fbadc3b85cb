"""Blocks of tokens, and interpolation within them: a smooth symbol between two far blocks is a small matrix.

Blocks of C tokens; between block I of queries and block J of keys the distance is t = (I - J) C + u - w. Blocks whose
numbers differ by one at most are near: pairs of them are computed exactly. For the others a symbol is read at few nodes
x_a of each block only, and interpolated by Lagrange's polynomials L_a:

    symbol(t)  ~  sum_ab L_a(u) symbol((I - J) C + x_a - x_b) L_b(w)

Distances of far blocks are at least C from zero, where tables of positions have their corner, so that the error falls
by a factor of about four a node where the table is smooth like log |t| or a power of |t|.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

# Tables that end within the last block go on as polynomials of this degree; see ``extended``.
EXTENSION_DEGREE = 5
# Entries of an interpolated symbol that are compared at a time, so few that they stay in the cache, and every how many
# tokens where few are enough.
COMPARED, SPARSE = 2**18, 4


@dataclass(frozen=True)
class Layout:
    """``count`` blocks of ``size`` tokens."""

    size: int
    count: int
    is_causal: bool

    @staticmethod
    def of(tokens: int, size: int, is_causal: bool) -> Layout:
        """Blocks of at most ``size``, a multiple of 16, and few tokens in excess."""
        count = math.ceil(tokens / size)
        return Layout(math.ceil(tokens / count / 16) * 16, count, is_causal)

    @property
    def tokens(self) -> int:
        return self.size * self.count

    @property
    def near(self) -> tuple[int, ...]:
        """Differences I - J of the blocks that are computed exactly."""
        return (0, 1) if self.is_causal else (-1, 0, 1)

    def far(self, device: torch.device) -> Tensor:
        """(2 count - 1,) bool: which differences -(count - 1) .. count - 1 are interpolated."""
        lags = torch.arange(1 - self.count, self.count, device=device)
        return lags > 1 if self.is_causal else lags.abs() > 1

    def split(self, x: Tensor) -> Tensor:
        """(B, H, tokens, D) -> (B, count, H, size, D)."""
        return x.unflatten(2, (self.count, self.size)).transpose(1, 2)

    def join(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2).flatten(2, 3)


@functools.lru_cache(maxsize=64)
def nodes_of(size: int, nodes: int) -> tuple[Tensor, Tensor]:
    """Chebyshev's nodes in 0 .. size - 1, rounded to tokens, and the polynomials of Lagrange at all tokens, (size,
    nodes), in double."""
    angles = math.pi * (torch.arange(nodes, dtype=torch.float64) + 0.5) / nodes
    places = ((size - 1) / 2 * (1 - angles.cos())).round()
    between = places[:, None] - places[None, :]
    between.fill_diagonal_(1.0)
    away = torch.arange(size, dtype=torch.float64)[:, None, None] - places
    # Row a leaves out the factor of its own node.
    away = torch.where(torch.eye(nodes, dtype=torch.bool), torch.ones_like(away), away.expand(-1, nodes, -1))
    return places.long(), (away / between).prod(-1)


def node_places(layout: Layout, nodes: int, device: torch.device) -> Tensor:
    """(2 count - 1, nodes, nodes): where symbols of all distances -(tokens - 1) .. tokens - 1 hold those of nodes."""
    places = nodes_of(layout.size, nodes)[0].to(device)
    lags = torch.arange(1 - layout.count, layout.count, device=device)[:, None, None] * layout.size
    return lags + (places[:, None] - places[None, :]) + layout.tokens - 1


def interpolation_errors(symbols: Tensor, layout: Layout, nodes: int, sparsely: bool = False) -> Tensor:
    """(S, 2 count - 1): the largest error of each symbol between blocks of each difference, 0 where they are near.

    symbols: (S, 2 tokens - 1), contiguous. Every pair of tokens is looked at; ``sparsely``: every fourth token, and
    of differences the powers of two, which stand for the ones that follow.
    """
    size, count = layout.size, layout.count
    stride = SPARSE if sparsely else 1
    whole = nodes_of(size, nodes)[1].to(symbols)
    left, right = whole[::stride], whole.flip(0)[::stride].mT
    lags = torch.arange(1 - count, count, device=symbols.device)
    if sparsely:
        lags = lags.sign() * 2 ** lags.abs().clamp(min=1).log2().floor().long()
    far = layout.far(symbols.device)
    looked_at = (lags[far] + count - 1).unique()
    places = node_places(layout, nodes, symbols.device)
    errors = symbols.new_zeros(symbols.shape[0], 2 * count - 1)
    step = max(1, COMPARED // size**2)
    for row, symbol in zip(errors, symbols):
        # Entry [I - J, u, size - 1 - w] is the symbol at (I - J) size + u - w.
        truth = symbol.as_strided((2 * count - 1, size, size), (size, 1, 1), symbol.storage_offset())
        truth = truth[:, ::stride, ::stride]
        for lags_of_part in looked_at.split(step):
            first, last = int(lags_of_part[0]), int(lags_of_part[-1])
            # A view where it can be one.
            part = slice(first, last + 1) if last - first + 1 == len(lags_of_part) else lags_of_part
            between = left @ symbol[places[part]] @ right
            row[part] = between.sub_(truth[part]).abs_().flatten(1).amax(-1)
    return errors[:, lags + count - 1] * far


def lag_magnitudes(symbols: Tensor, layout: Layout) -> Tensor:
    """(S, 2 count - 1): the largest |symbol| between far blocks of each difference."""
    between = symbols.abs().unfold(1, 2 * layout.size - 1, layout.size).amax(-1)
    return between * layout.far(symbols.device)


def sums_over_far(of_lags: Tensor, layout: Layout) -> Tensor:
    """(S, 2 count - 1) by I - J -> (S, count): for each block I of queries the sum over the blocks J of keys."""
    total = torch.nn.functional.pad(of_lags.cumsum(-1), (1, 0))
    return total[..., layout.count :] - total[..., : layout.count]


def cut(relative: Tensor, rows: int, keys: int) -> Tensor:
    """(.., 2 L - 1) -> (.., rows + keys - 1): the distances -(keys - 1) .. rows - 1."""
    length = (relative.shape[-1] + 1) // 2
    return relative[..., length - keys : length + rows - 1]


def extended(relative: Tensor, tokens: int) -> Tensor:
    """(.., 2 L - 1) -> (.., 2 tokens - 1): cut, or continued by the polynomial that fits either end best.

    What is beyond L no pair of tokens sees; but nodes of the last block may lie there, and want a smooth continuation.
    """
    length = (relative.shape[-1] + 1) // 2
    more = tokens - length
    if more <= 0:
        return cut(relative, tokens, tokens)
    window = min(length, 4 * more + 8 * EXTENSION_DEGREE)
    continued = relative[..., -window:] @ _continuation(window, more).to(relative)
    before = relative[..., :window].flip(-1) @ _continuation(window, more).to(relative)
    return torch.cat([before.flip(-1), relative, continued], -1)


@functools.lru_cache(maxsize=16)
def _continuation(window: int, more: int) -> Tensor:
    """(window, more): the values that follow, as sums of those of the window."""
    grid = torch.linspace(-1, 1, window, dtype=torch.float64)
    beyond = 1 + (grid[-1] - grid[0]) / max(1, window - 1) * torch.arange(1, more + 1, dtype=torch.float64)
    degree = min(EXTENSION_DEGREE, window - 1)
    inside, outside = (torch.stack([x**m for m in range(degree + 1)], -1) for x in (grid, beyond))
    return (outside @ torch.linalg.pinv(inside)).mT.contiguous()
