"""Device functions and kernels of moments: sums over tokens of monomials, monomials against a state, their gradients.

    moments    S_a = sum_j x_j^a [u_j, z_j]                  tokens -> state
    apply      N_i = sum_a c_a x_i^a S_a                     state -> tokens
    gradient   dx_i = d/dx_i sum_a c_a x_i^a (S_a . u_i)     state -> tokens

A state is cut into tiles of ROWS monomials that share one factor x_l: their panel is built from at most g - 1 factors,
and x_l multiplies values (or what is read of the state) in its place, so that no feature of the highest degree is
built. One tile at a time is in registers; a state of any size passes through.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmkern.kernels import _tiles
from llmkern.polynomial import Monomials, monomials

# Monomials of a tile and tokens of a step; both are sides of a matrix product.
ROWS = 32
TOKENS = 32
# float32 in three parts of bfloat16, six products of them: on the matrix units of NVIDIA, and as exact as float32. On
# gfx942 they take float32 itself.
PRECISION = "bf16x6"


class Tiles(NamedTuple):
    """heads: (T, 4) int32 factor l or -1, first panel entry, count, first row; factors: (panel, g - 1) int32 or -1."""

    heads: Tensor
    factors: Tensor


@functools.lru_cache(maxsize=64)
def tiles_of(dim: int, degree: int, leading: int, device: torch.device) -> Tiles:
    tables: Monomials = monomials(dim, degree, leading)
    heads = [
        (block.dim, block.start + begin, min(ROWS, block.count - begin), block.row + begin)
        for block in tables.blocks
        for begin in range(0, block.count, ROWS)
    ]
    factors = torch.full((tables.panel, max(degree - 1, 1)), -1, dtype=torch.int32)
    for entry in range(1, tables.panel):
        at, place = entry, 0
        while at > 0:
            factors[entry, place] = int(tables.panel_dim[at])
            at, place = int(tables.panel_parent[at]), place + 1
    return Tiles(torch.tensor(heads, dtype=torch.int32, device=device), factors.to(device))


@triton.jit
def open_tile(heads, tile, ROWS: tl.constexpr):
    """Factor, panel entries, rows and which of them live."""
    dim = tl.load(heads + tile * 4)
    lanes = tl.arange(0, ROWS)
    live = lanes < tl.load(heads + tile * 4 + 2)
    return dim, tl.load(heads + tile * 4 + 1) + lanes, tl.load(heads + tile * 4 + 3) + lanes, live


@triton.jit
def load_factor(x, tokens, seen, factor, live, D):
    """(TOKENS, ROWS): x[token, factor], 1 where there is no factor."""
    some = (factor >= 0) & live
    at = x + tokens[:, None].to(tl.int64) * D + factor[None, :]
    return tl.load(at, seen[:, None] & some[None, :], other=1.0)


@triton.jit
def build_panel(x, tokens, seen, factors, entries, live, D, FACTORS: tl.constexpr, SKIP: tl.constexpr):
    """(TOKENS, ROWS): product of all factors but number SKIP; 1 in places that do not live."""
    product = load_factor(x, tokens, seen, tl.load(factors + entries * FACTORS, live, other=-1), live & (SKIP != 0), D)
    for i in tl.static_range(1, FACTORS):
        if i != SKIP:
            factor = tl.load(factors + entries * FACTORS + i, live, other=-1)
            product *= load_factor(x, tokens, seen, factor, live, D)
    return product


@triton.jit
def load_shared_factor(x, tokens, seen, dim, D):
    """(TOKENS,): x[token, dim], 1 where dim is -1."""
    return tl.load(x + tokens.to(tl.int64) * D + dim, seen & (dim >= 0), other=1.0)


@triton.jit
def polynomial_moments_kernel(
    state,
    x,
    u,
    heads,
    factors,
    n,
    length,
    D,
    V,
    R,
    FACTORS: tl.constexpr,
    BLOCK_V: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of the state (H, segments, R, V + 1) of a segment of ``length`` tokens; x (H, n, D), u (H, n, V + 1)."""
    tile, segment, head = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    x += head * n * D
    u += head * n * (V + 1)
    state += (head * tl.num_programs(1) + segment) * R * (V + 1)
    dim, entries, rows, live = open_tile(heads, tile, ROWS)
    columns = tl.arange(0, BLOCK_V)
    total = tl.zeros((ROWS, BLOCK_V), tl.float32)
    last = tl.zeros((ROWS,), tl.float32)
    for start in range(segment * length, tl.minimum(n, (segment + 1) * length), TOKENS):
        tokens = start + tl.arange(0, TOKENS)
        seen = tokens < tl.minimum(n, (segment + 1) * length)
        panel = build_panel(x, tokens, seen, factors, entries, live, D, FACTORS, -1)
        shared = load_shared_factor(x, tokens, seen, dim, D)
        at = u + tokens.to(tl.int64) * (V + 1)
        values = tl.load(at[:, None] + columns[None, :], seen[:, None] & (columns < V)[None, :], other=0.0)
        ones = tl.load(at + V, seen, other=0.0)
        total = tl.dot(tl.trans(panel), values * shared[:, None], total, input_precision=PRECISION)
        last += tl.sum(panel * (ones * shared)[:, None], 0)
    at = state + rows.to(tl.int64) * (V + 1)
    tl.store(at[:, None] + columns[None, :], total, live[:, None] & (columns < V)[None, :])
    tl.store(at + V, last, live)


@triton.jit
def polynomial_apply_kernel(
    out,
    x,
    state,
    weights,
    heads,
    factors,
    n,
    length,
    segments,
    group,
    n_tiles,
    D,
    V,
    R,
    EXTRA: tl.constexpr,
    FACTORS: tl.constexpr,
    BLOCK_V: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Sums (H, n, V + 1 + EXTRA) of TOKENS rows; weights (H, 1 + EXTRA, R): of all columns, and of the last for extras.

    Tokens [s length, (s + 1) length) read segment s of the state (H / group, segments, R, V + 1).
    """
    start, head = tl.program_id(0) * TOKENS, tl.program_id(1).to(tl.int64)
    x += head * n * D
    out += head * n * (V + 1 + EXTRA)
    weights += head * (1 + EXTRA) * R
    state += ((head // group) * segments + tl.minimum(start // length, segments - 1)) * R * (V + 1)
    tokens = start + tl.arange(0, TOKENS)
    seen = tokens < n
    columns = tl.arange(0, BLOCK_V)
    total = tl.zeros((TOKENS, BLOCK_V), tl.float32)
    last = tl.zeros((TOKENS,), tl.float32)
    first_extra = tl.zeros((TOKENS,), tl.float32)
    second_extra = tl.zeros((TOKENS,), tl.float32)
    third_extra = tl.zeros((TOKENS,), tl.float32)
    for tile in range(n_tiles):
        dim, entries, rows, live = open_tile(heads, tile, ROWS)
        panel = build_panel(x, tokens, seen, factors, entries, live, D, FACTORS, -1)
        shared = load_shared_factor(x, tokens, seen, dim, D)
        at = state + rows.to(tl.int64) * (V + 1)
        values = tl.load(at[:, None] + columns[None, :], live[:, None] & (columns < V)[None, :], other=0.0)
        ones = tl.load(at + V, live, other=0.0)
        weight = tl.load(weights + rows, live, other=0.0)
        total += tl.dot(panel, values * weight[:, None], input_precision=PRECISION) * shared[:, None]
        last += tl.sum(panel * (ones * weight)[None, :], 1) * shared
        if EXTRA > 0:
            weight = tl.load(weights + R + rows, live, other=0.0)
            first_extra += tl.sum(panel * (ones * weight)[None, :], 1) * shared
        if EXTRA > 1:
            weight = tl.load(weights + 2 * R + rows, live, other=0.0)
            second_extra += tl.sum(panel * (ones * weight)[None, :], 1) * shared
        if EXTRA > 2:
            weight = tl.load(weights + 3 * R + rows, live, other=0.0)
            third_extra += tl.sum(panel * (ones * weight)[None, :], 1) * shared
    at = out + tokens.to(tl.int64) * (V + 1 + EXTRA)
    tl.store(at[:, None] + columns[None, :], total, seen[:, None] & (columns < V)[None, :])
    tl.store(at + V, last, seen)
    if EXTRA > 0:
        tl.store(at + V + 1, first_extra, seen)
    if EXTRA > 1:
        tl.store(at + V + 2, second_extra, seen)
    if EXTRA > 2:
        tl.store(at + V + 3, third_extra, seen)


@triton.jit
def polynomial_gradient_kernel(
    dx,
    x,
    u,
    state,
    weights,
    heads,
    factors,
    n,
    length,
    segments,
    group,
    n_tiles,
    D,
    V,
    R,
    BLOCK_D: tl.constexpr,
    FACTORS: tl.constexpr,
    BLOCK_V: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dx (H, n, D) of TOKENS rows; u (H, n, V + 1); the rest as in polynomial_apply_kernel with no extras."""
    start, head = tl.program_id(0) * TOKENS, tl.program_id(1).to(tl.int64)
    x += head * n * D
    dx += head * n * D
    weights += head * R
    state += ((head // group) * segments + tl.minimum(start // length, segments - 1)) * R * (V + 1)
    tokens = start + tl.arange(0, TOKENS)
    seen = tokens < n
    columns = tl.arange(0, BLOCK_V)
    variables = tl.arange(0, BLOCK_D)
    at = u + (head * n + tokens) * (V + 1)
    wanted = tl.load(at[:, None] + columns[None, :], seen[:, None] & (columns < V)[None, :], other=0.0)
    wanted_one = tl.load(at + V, seen, other=0.0)
    total = tl.zeros((TOKENS, BLOCK_D), tl.float32)
    for tile in range(n_tiles):
        dim, entries, rows, live = open_tile(heads, tile, ROWS)
        shared = load_shared_factor(x, tokens, seen, dim, D)
        at = state + rows.to(tl.int64) * (V + 1)
        values = tl.load(at[:, None] + columns[None, :], live[:, None] & (columns < V)[None, :], other=0.0)
        ones = tl.load(at + V, live, other=0.0)
        weight = tl.load(weights + rows, live, other=0.0)
        # (TOKENS, ROWS): what the sum gains with each monomial.
        gain = tl.dot(wanted, tl.trans(values * weight[:, None]), input_precision=PRECISION)
        gain += wanted_one[:, None] * (ones * weight)[None, :]
        panel = build_panel(x, tokens, seen, factors, entries, live, D, FACTORS, -1)
        total += tl.sum(panel * gain, 1)[:, None] * (variables[None, :] == dim)
        gain *= shared[:, None]
        for i in tl.static_range(FACTORS):
            others = build_panel(x, tokens, seen, factors, entries, live, D, FACTORS, i)
            factor = tl.load(factors + entries * FACTORS + i, live, other=-1)
            place = (factor[:, None] == variables[None, :]).to(tl.float32)
            total = tl.dot(gain * others, place, total, input_precision=PRECISION)
    at = dx + tokens.to(tl.int64) * D
    tl.store(at[:, None] + variables[None, :], total, seen[:, None] & (variables < D)[None, :])


# Launchers ------------------------------------------------------------------------------------------------------------


def launch_options(architecture: str, values: int) -> dict[str, Any]:
    """Warps are those with which registers do not spill: on NVIDIA twice as many where there are more columns."""
    if architecture == "gfx942":
        return {"PRECISION": "ieee", "num_warps": 4}
    return {"PRECISION": PRECISION, "num_warps": 8 if values > 64 else 4}


class Moments:
    """Launches the three kernels for one set of monomials; tensors are contiguous and float32."""

    def __init__(self, dim: int, degree: int, leading: int, device: torch.device) -> None:
        self.dim, self.tables = dim, monomials(dim, degree, leading)
        self.tiles = tiles_of(dim, degree, leading, device)
        self.factors = self.tiles.factors.shape[1]

    def _shared(self, values: int) -> dict[str, object]:
        return {
            "heads": self.tiles.heads,
            "factors": self.tiles.factors,
            "D": self.dim,
            "V": values,
            "R": self.tables.count,
            "FACTORS": self.factors,
            "BLOCK_V": max(16, triton.next_power_of_2(values)),
            "ROWS": ROWS,
            "TOKENS": TOKENS,
            **launch_options(_tiles.architecture(self.tiles.heads), values),
        }

    def moments(self, x: Tensor, u: Tensor, length: int) -> Tensor:
        """x (H, n, D), u (H, n, V + 1) -> (H, segments, R, V + 1), a segment every ``length`` tokens."""
        heads, n, width = u.shape
        segments = max(1, triton.cdiv(n, length))
        state = x.new_zeros((heads, segments, self.tables.count, width))
        if heads and n:
            grid = (len(self.tiles.heads), segments, heads)
            polynomial_moments_kernel[grid](state, x, u, n=n, length=length, **self._shared(width - 1))
        return state

    def apply(self, x: Tensor, state: Tensor, weights: Tensor, length: int) -> Tensor:
        """x (H, n, D), state (H / G, segments, R, V + 1), weights (H, 1 + E, R) -> (H, n, V + 1 + E)."""
        extra, width = weights.shape[1] - 1, state.shape[3]
        out = x.new_zeros((*x.shape[:2], width + extra))
        if out.numel():
            polynomial_apply_kernel[self._grid(x)](
                out, x, state, weights, EXTRA=extra, **self._rows(x, state, length), **self._shared(width - 1)
            )
        return out

    def gradient(self, x: Tensor, u: Tensor, state: Tensor, weights: Tensor, length: int) -> Tensor:
        """x (H, n, D), u (H, n, V + 1), weights (H, R) -> (H, n, D)."""
        dx = torch.zeros_like(x)
        if dx.numel():
            block = max(16, triton.next_power_of_2(self.dim))
            common = {**self._rows(x, state, length), **self._shared(state.shape[3] - 1)}
            polynomial_gradient_kernel[self._grid(x)](dx, x, u, state, weights, BLOCK_D=block, **common)
        return dx

    def _grid(self, x: Tensor) -> tuple[int, int]:
        return triton.cdiv(x.shape[1], TOKENS), x.shape[0]

    def _rows(self, x: Tensor, state: Tensor, length: int) -> dict[str, int]:
        counts = {"segments": state.shape[1], "group": x.shape[0] // state.shape[0], "n_tiles": len(self.tiles.heads)}
        return {"n": x.shape[1], "length": length, **counts}


def aot_entries(kernel: object, factors: int, dim: int, values: int, extra: int = 0) -> Iterator[tuple[object, ...]]:
    tensors = dict.fromkeys(("state", "x", "u", "out", "dx", "weights"), "*fp32")
    types = {**tensors, "heads": "*i32", "factors": "*i32"}
    types |= dict.fromkeys(("n", "length", "segments", "group", "n_tiles", "D", "V", "R"), "i32")
    constants = {
        "EXTRA": extra,
        "FACTORS": factors,
        "BLOCK_D": dim,
        "BLOCK_V": values,
        "ROWS": ROWS,
        "TOKENS": TOKENS,
    }
    for targets in (("sm_80", "sm_90"), ("gfx942",)):
        options = launch_options(targets[0], values)
        warps = options.pop("num_warps")
        yield (*_tiles.ahead_of_time(kernel, types, constants | options, warps), targets)


_SIZES = [
    *((polynomial_moments_kernel, f, 16, v) for f, v in ((1, 64), (2, 16), (3, 128))),
    *((polynomial_apply_kernel, f, 16, v, e) for f, v, e in ((1, 64, 1), (2, 16, 1), (3, 128, 3), (2, 64, 0))),
    *((polynomial_gradient_kernel, f, d, v) for f, d, v in ((1, 64, 64), (2, 16, 16), (3, 64, 128))),
]
AOT = [entry for sizes in _SIZES for entry in aot_entries(*sizes)]
