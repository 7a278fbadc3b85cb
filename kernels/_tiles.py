"""What all kernels share: sizes of tiles, accurate elementary functions, streaming log-sum-exp, partial results.

A row of the vocabulary is read in tiles of BLOCK tokens. One row is either one program's, or is split over several that
each leave a partial result, which the next kernel combines in a fixed order; so results depend on shapes alone.
"""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

# Sizes ----------------------------------------------------------------------------------------------------------------


class Tile(NamedTuple):
    """Tokens a step and warps: of programs that share a row, and of programs that own one; tokens a step of a search.

    Blocks are multiples of 64, in which random numbers come.
    """

    block: int
    warps: int
    row_block: int
    row_warps: int
    search_block: int


# (architecture, bytes an element, whether the vocabulary is long). Chosen ahead of time, by registers: as many tokens a
# thread as four rows of logits allow without spilling.
TILES = {
    (architecture, size, long): tile
    for architecture in ("sm_80", "sm_90", "gfx942")
    for size, long, tile in (
        (2, False, Tile(512, 4, 512, 4, 512)),
        (2, True, Tile(2048, 8, 4096, 16, 2048)),
        (4, False, Tile(512, 4, 512, 4, 512)),
        (4, True, Tile(2048, 8, 4096, 16, 2048)),
        (8, False, Tile(256, 4, 256, 4, 256)),
        (8, True, Tile(512, 8, 1024, 16, 1024)),
    )
}
LONG_VOCABULARY = 8192
ROWS_IN_REGISTERS = 4
# Programs that fill the largest of the supported GPUs about four times over; above it rows are not split further.
PROGRAMS = 512
MAX_SPLITS = 64


def architecture(x: torch.Tensor) -> str:
    """Key of the table for the device of x; an architecture without entries uses those of the nearest older one."""
    if torch.version.hip:
        return "gfx942"
    return "sm_90" if x.is_cuda and torch.cuda.get_device_capability(x.device)[0] >= 9 else "sm_80"


def tile_for(x: torch.Tensor, rows: int) -> Tile:
    """Sizes for kernels that read so many rows like x at once."""
    return shrink(TILES[architecture(x), x.element_size(), x.shape[1] > LONG_VOCABULARY], rows)


def shrink(tile: Tile, rows: int) -> Tile:
    """More rows than the table is made for take smaller steps, down to what random numbers and warps ask for."""
    by = triton.next_power_of_2(triton.cdiv(rows, ROWS_IN_REGISTERS))
    return tile._replace(block=max(128, tile.block // by), row_block=max(128, tile.row_block // by))


def split_rows(n_rows: int, vocabulary: int, block: int) -> tuple[int, int]:
    """Programs a row, and the tokens (a multiple of block) that each of them takes."""
    blocks = triton.cdiv(vocabulary, block)
    splits = max(1, min(blocks, MAX_SPLITS, PROGRAMS // n_rows))
    chunk = triton.cdiv(blocks, splits) * block
    return triton.cdiv(vocabulary, chunk), chunk


def device_guard(x: torch.Tensor) -> contextlib.AbstractContextManager:
    return torch.cuda.device_of(x) if x.is_cuda else contextlib.nullcontext()


def unit_stride(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


# Elementary functions -------------------------------------------------------------------------------------------------

INF = tl.constexpr(float("inf"))
LOG2 = tl.constexpr(0.6931471805599453)
EPS32 = tl.constexpr(2.0**-23)


@triton.jit
def expm1(x):
    """exp(x) - 1 to full relative accuracy: a Taylor series near zero, where the difference would cancel."""
    TERMS: tl.constexpr = 14 if x.dtype.is_fp64() else 8
    series = tl.zeros_like(x) + 1.0
    for i in tl.static_range(TERMS):
        series = 1.0 + series * x / (TERMS + 1 - i)
    return tl.where(tl.abs(x) < 0.35, x * series, tl.exp(x) - 1.0)


@triton.jit
def twice_atanh(s):
    """log((1 + s) / (1 - s)) for |s| <= 1/3, by its series: tl.log is not accurate near one on every device."""
    TERMS: tl.constexpr = 16 if s.dtype.is_fp64() else 8
    square = s * s
    series = tl.zeros_like(s) + 1.0 / (2 * TERMS + 1)
    for i in tl.static_range(TERMS):
        series = series * square + 1.0 / (2 * (TERMS - i) - 1)
    return 2.0 * s * series


@triton.jit
def softplus(x):
    """log(1 + exp(x))."""
    t = tl.exp(-tl.abs(x))
    return tl.where(x > 0, x, 0.0) + twice_atanh(t / (2.0 + t))


@triton.jit
def finite_or_zero(x):
    return tl.where(tl.abs(x) < INF, x, 0.0)


# Log-sum-exp in lanes: each lane keeps the largest value that it met and the sum relative to it -----------------------


@triton.jit
def lowest(COMPUTE: tl.constexpr):
    """The smallest finite number; as a starting maximum it keeps -inf minus -inf out of the recurrence."""
    return -1.7976931348623157e308 if COMPUTE.is_fp64() else -3.4028234663852886e38


@triton.jit
def add_lanes(top, total, x):
    apart = x - top
    small = tl.exp(-tl.abs(apart))
    return tl.where(apart > 0, x, top), tl.where(apart > 0, total * small + 1.0, total + small)


@triton.jit
def join_lanes(top, total):
    highest = tl.max(top, 0)
    return highest, tl.sum(total * tl.exp(top - highest), 0)


@triton.jit
def load_partials(partials, row, channel, splits, CHANNELS: tl.constexpr, SPLITS: tl.constexpr, other):
    """Partial results of one quantity, (B, CHANNELS, splits) in memory, as a block of SPLITS >= splits."""
    lanes = tl.arange(0, SPLITS)
    return tl.load(partials + (row * CHANNELS + channel) * splits + lanes, lanes < splits, other=other)


@triton.jit
def sum_partials(partials, row, channel, splits, CHANNELS: tl.constexpr, SPLITS: tl.constexpr):
    return tl.sum(load_partials(partials, row, channel, splits, CHANNELS, SPLITS, 0.0), 0)


@triton.jit
def log_sum_exp_of_partials(partials, row, channel, splits, CHANNELS: tl.constexpr, SPLITS: tl.constexpr):
    """Largest value and log-sum-exp from channels (maximum, sum); NaN where there is no distribution."""
    COMPUTE: tl.constexpr = partials.dtype.element_ty
    top = load_partials(partials, row, channel, splits, CHANNELS, SPLITS, lowest(COMPUTE))
    total = load_partials(partials, row, channel + 1, splits, CHANNELS, SPLITS, 0.0)
    highest, mass = join_lanes(top, total)
    lse = highest + tl.log(mass)
    return highest, tl.where(tl.abs(lse) < INF, lse, float("nan"))


# Ahead-of-time compilation --------------------------------------------------------------------------------------------


def ahead_of_time(kernel: Any, types: dict[str, Any], constants: dict[str, Any], warps: int) -> tuple[Any, ...]:
    """Entry of a module's AOT list: kernel, signature, constexprs, warps, stages; types and constants may name more."""
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    constexprs = {name: constants[name] for name, type_ in signature.items() if type_ == "constexpr"}
    return kernel, signature, constexprs, warps, 3
