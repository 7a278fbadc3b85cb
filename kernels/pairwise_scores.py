"""Triton kernels of norm_sim, neg_clip_loss and clip_loss.

A program owns BLOCK_N left rows, goes over all right rows in tiles, and keeps what it reduces in registers. Column sums
are left as one log-sum-exp a program and column, and joined by torch. In backward passes a kernel writes the weights of
as many left rows as WORKSPACE holds, and the two products with them are those of torch's BLAS.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmkern.kernels._pairs import pair_tile, pairs_entry, similarity_tile
from llmkern.kernels._tiles import INF, architecture, device_guard, lowest, unit_stride
from llmkern.ops.pairwise_scores.neg_clip_loss import negatives_by
from llmkern.ops.pairwise_scores.norm_sim import norm_sim_max_backward_reference as norm_sim_max_bwd  # noqa: F401
from llmkern.ops.pairwise_scores.norm_sim import norm_sim_power_backward_reference, norm_sim_reference
from llmkern.ops.pairwise_scores.paired_dot import paired_dot_reference as paired_dot  # noqa: F401
from llmkern.ops.pairwise_scores.two_way_lse import in_two, two_way_lse_backward_reference, two_way_lse_reference

# Weights (fp32) that a backward pass holds at once.
WORKSPACE = 2**24


@triton.jit
def norm_sim_fwd_kernel(
    out,
    winners,
    left,
    right,
    n,
    m,
    left_stride,
    right_stride,
    D,
    p,
    MAXIMUM: tl.constexpr,
    BF16: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """p-norm of the similarities of BLOCK_N left rows; where MAXIMUM, the largest and the first row that has it."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    top = tl.zeros((BLOCK_N,), tl.float32)
    winner = tl.zeros((BLOCK_N,), tl.int64)
    total = tl.zeros((BLOCK_N,), tl.float32)
    # Zero, or NaN from the first tile on that holds any: comparisons would pass over it.
    odd = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, m, BLOCK_M):
        columns = start + tl.arange(0, BLOCK_M).to(tl.int64)
        s = similarity_tile(
            left, right, rows, columns, n, m, left_stride, right_stride, D, BF16, BLOCK_N, BLOCK_M, BLOCK_D
        )
        size = tl.where((columns < m)[None, :], tl.abs(s), 0.0)
        odd += tl.sum(tl.where(size == size, 0.0, size), 1)
        best = tl.max(tl.where(size == size, size, 0.0), 1)
        if MAXIMUM:
            at = tl.where((size == best[:, None]) & (columns < m)[None, :], columns[None, :], m)
            winner = tl.where(best > top, tl.min(at, 1), winner)
            top = tl.maximum(top, best)
        else:
            higher = tl.maximum(top, best)
            unit = tl.where(higher > 0, higher, 1.0)
            total = total * tl.where(higher > top, tl.exp(p * tl.log(top / unit)), 1.0)
            q = size / unit[:, None]
            total += tl.sum(tl.where(q > 0, tl.exp(p * tl.log(q)), 0.0), 1)
            top = higher
    if not MAXIMUM:
        top = tl.where(top > 0, top * tl.exp(tl.log(total) / p), 0.0)
    tl.store(out + rows, top + odd, rows < n)
    tl.store(winners + rows, winner, rows < n)


@triton.jit
def store_in_two(to, apart, top, log, inside):
    """top + log, and ``apart`` behind it what rounding took from it."""
    first = top + log
    rest = (top - first) + log
    tl.store(to, first, inside)
    tl.store(to + apart, tl.where(tl.abs(rest) < 1.0, rest, 0.0), inside)


@triton.jit
def expm1(x):
    """For x of at most zero: a series near zero, where the difference would lose what counts."""
    series = x * (1 + x * (1 / 2 + x * (1 / 6 + x * (1 / 24 + x * (1 / 120 + x * (1 / 720 + x / 5040))))))
    return tl.where(tl.abs(x) < 0.35, series, tl.exp(x) - 1.0)


@triton.jit
def two_way_lse_fwd_kernel(
    row_lse,
    parts,
    pairs,
    left,
    right,
    scale,
    n,
    m,
    left_stride,
    right_stride,
    D,
    offset,
    BF16: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Log-sum-exp in two parts of BLOCK_N rows, and over these rows that of every column: parts (programs, 2, m)."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    tau = tl.load(scale)
    top = tl.zeros((BLOCK_N,), tl.float32) + lowest(tl.float32)
    total = tl.zeros((BLOCK_N,), tl.float32)
    pair = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, m, BLOCK_M):
        columns = start + tl.arange(0, BLOCK_M).to(tl.int64)
        z = tau * similarity_tile(
            left, right, rows, columns, n, m, left_stride, right_stride, D, BF16, BLOCK_N, BLOCK_M, BLOCK_D
        )
        own = columns[None, :] == (rows + offset)[:, None]
        pair += tl.sum(tl.where(own, z, 0.0), 1)
        across = tl.where((columns < m)[None, :], z, -INF)
        higher = tl.maximum(top, tl.max(across, 1))
        total = total * tl.exp(top - higher) + tl.sum(tl.exp(across - higher[:, None]), 1)
        top = higher
        down = tl.where((rows < n)[:, None], z, -INF)
        highest = tl.maximum(tl.max(down, 0), lowest(tl.float32))
        mass = tl.sum(tl.exp(down - highest[None, :]), 0)
        to = parts + tl.program_id(0).to(tl.int64) * 2 * m + columns
        store_in_two(to, m, highest, tl.log(mass), columns < m)
    store_in_two(row_lse + rows, n, top, tl.log(total), rows < n)
    tl.store(pairs + rows, pair, rows < n)


@triton.jit
def lse_weights_kernel(
    weights,
    sums,
    left,
    right,
    scale,
    row_lse,
    row_rest,
    column_lse,
    drows,
    dcolumns,
    dpairs,
    n,
    m,
    left_stride,
    right_stride,
    D,
    offset,
    BF16: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """scale w_ij of BLOCK_N left rows, as in two_way_lse, and for each of these rows sum_j w_ij s_ij."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    live = rows < n
    tau = tl.load(scale)
    lse = tl.load(row_lse + rows, live, other=0.0)
    rest = tl.load(row_rest + rows, live, other=0.0)
    upstream = tl.load(drows + rows, live, other=0.0)
    own_upstream = tl.load(dpairs + rows, live, other=0.0)
    total = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, m, BLOCK_M):
        columns = start + tl.arange(0, BLOCK_M).to(tl.int64)
        s = similarity_tile(
            left, right, rows, columns, n, m, left_stride, right_stride, D, BF16, BLOCK_N, BLOCK_M, BLOCK_D
        )
        z = tau * s
        column = tl.load(column_lse + columns, columns < m, other=INF)
        column_rest = tl.load(column_lse + m + columns, columns < m, other=0.0)
        down = tl.load(dcolumns + columns, columns < m, other=0.0)[None, :]
        across = upstream[:, None]
        in_row, in_column = (z - lse[:, None]) - rest[:, None], (z - column[None, :]) - column_rest[None, :]
        w = across * tl.exp(in_row) + down * tl.exp(in_column)
        # Where the pair's own upstream nearly cancels the rest: their sum apart from what exp takes off one.
        own = across * expm1(in_row) + down * expm1(in_column) + ((across + down) + own_upstream[:, None])
        w = tl.where(columns[None, :] == (rows + offset)[:, None], own, w)
        inside = live[:, None] & (columns < m)[None, :]
        total += tl.sum(tl.where(inside, w * s, 0.0), 1)
        tl.store(weights + rows[:, None] * m + columns[None, :], tau * w, inside)
    tl.store(sums + rows, total, live)


@triton.jit
def norm_weights_kernel(
    weights,
    left,
    right,
    norms,
    dout,
    n,
    m,
    left_stride,
    right_stride,
    D,
    p,
    BF16: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """dout_i sign(s_ij) (|s_ij| / norm_i)^(p - 1) of BLOCK_N left rows."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    norm = tl.load(norms + rows, rows < n, other=1.0)
    upstream = tl.load(dout + rows, rows < n, other=0.0)
    for start in range(0, m, BLOCK_M):
        columns = start + tl.arange(0, BLOCK_M).to(tl.int64)
        s = similarity_tile(
            left, right, rows, columns, n, m, left_stride, right_stride, D, BF16, BLOCK_N, BLOCK_M, BLOCK_D
        )
        share = tl.exp((p - 1.0) * tl.log(tl.abs(s) / norm[:, None]))
        w = tl.where(s == 0, 0.0, tl.where(s < 0, -upstream[:, None], upstream[:, None]) * share)
        inside = (rows < n)[:, None] & (columns < m)[None, :]
        tl.store(weights + rows[:, None] * m + columns[None, :], w, inside)


# Launchers ------------------------------------------------------------------------------------------------------------


class Pairs:
    """Left and right rows as launch arguments."""

    def __init__(self, left: Tensor, right: Tensor, bf16: bool) -> None:
        self.left, self.right, self.bf16 = unit_stride(left), unit_stride(right), bf16
        self.tile = pair_tile(left, architecture(left))

    def arguments(self, rows: slice) -> dict[str, object]:
        left = self.left[rows]
        return {
            "left": left,
            "right": self.right,
            "n": left.shape[0],
            "m": self.right.shape[0],
            "left_stride": self.left.stride(0),
            "right_stride": self.right.stride(0),
            "D": left.shape[1],
            "BF16": self.bf16,
            **self.tile,
        }

    def programs(self, n: int) -> tuple[int]:
        return (triton.cdiv(n, self.tile["BLOCK_N"]),)

    def chunks(self) -> Iterator[slice]:
        """Left rows whose weights fit the workspace."""
        n, m = self.left.shape[0], max(1, self.right.shape[0])
        step = max(1, WORKSPACE // m)
        return (slice(start, min(n, start + step)) for start in range(0, n, step))


def norm_sim_fwd(x: Tensor, target: Tensor, p: float, bf16: bool) -> tuple[Tensor, Tensor]:
    """As ``norm_sim_reference``."""
    if x.dtype == torch.float64 or len(x) == 0:
        return norm_sim_reference(x, target, p, bf16)
    with device_guard(x):
        pairs, n = Pairs(x, target, bf16), len(x)
        out = torch.empty(n, dtype=torch.float32, device=x.device)
        winners = torch.empty(n, dtype=torch.int64, device=x.device)
        maximum = p == math.inf
        norm_sim_fwd_kernel[pairs.programs(n)](
            out, winners, p=0.0 if maximum else p, MAXIMUM=maximum, **pairs.arguments(slice(0, n))
        )
    return out, winners


def two_way_lse_fwd(
    image: Tensor, text: Tensor, scale: Tensor, offset: int, bf16: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """As ``two_way_lse_reference``."""
    if image.dtype == torch.float64 or len(image) == 0:
        return two_way_lse_reference(image, text, scale, offset, bf16)
    with device_guard(image):
        pairs, n = Pairs(image, text, bf16), len(image)
        rows, own = scale.new_empty(2, n), scale.new_empty(n)
        parts = scale.new_empty(pairs.programs(n)[0], 2, len(text))
        two_way_lse_fwd_kernel[pairs.programs(n)](
            rows, parts, own, scale=scale, offset=offset, **pairs.arguments(slice(0, n))
        )
        return rows, in_two(parts.sum(1, dtype=torch.float64).logsumexp(0), rows.dtype), own


def negatives(image: Tensor, text: Tensor, scale: Tensor, order: Tensor, bounds: Sequence[int], bf16: bool) -> Tensor:
    """As ``negatives_reference``."""
    return negatives_by(two_way_lse_fwd, image, text, scale, order, bounds, bf16)


def two_way_lse_bwd(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    rows: Tensor,
    columns: Tensor,
    drows: Tensor,
    dcolumns: Tensor,
    dpairs: Tensor,
    offset: int,
    needs: Sequence[bool],
) -> list[Tensor]:
    """As ``two_way_lse_backward_reference``."""
    if image.dtype == torch.float64 or len(image) == 0:
        return two_way_lse_backward_reference(image, text, scale, rows, columns, drows, dcolumns, dpairs, offset, needs)
    with device_guard(image):
        pairs = Pairs(image, text, False)
        products = Products(pairs, needs)
        sums = scale.new_empty(len(image))
        for chunk in pairs.chunks():
            weights = scale.new_empty(chunk.stop - chunk.start, len(text))
            lse_weights_kernel[pairs.programs(len(weights))](
                weights,
                sums[chunk],
                scale=scale,
                row_lse=rows[0, chunk],
                row_rest=rows[1, chunk],
                column_lse=columns.contiguous(),
                drows=drows[chunk],
                dcolumns=dcolumns,
                dpairs=dpairs[chunk],
                offset=offset + chunk.start,
                **pairs.arguments(chunk),
            )
            products.add(chunk, weights)
    return [*products.finish(rows), sums.sum() if needs[2] else rows.new_empty(0)]


def norm_sim_power_bwd(
    dout: Tensor, x: Tensor, target: Tensor, out: Tensor, p: float, needs: Sequence[bool]
) -> list[Tensor]:
    """As ``norm_sim_power_backward_reference``."""
    if x.dtype == torch.float64 or len(x) == 0:
        return norm_sim_power_backward_reference(dout, x, target, out, p, needs)
    with device_guard(x):
        pairs = Pairs(x, target, False)
        products = Products(pairs, needs)
        for chunk in pairs.chunks():
            weights = dout.new_empty(chunk.stop - chunk.start, len(target))
            norm_weights_kernel[pairs.programs(len(weights))](
                weights, norms=out[chunk], dout=dout[chunk], p=p, **pairs.arguments(chunk)
            )
            products.add(chunk, weights)
    return products.finish(dout)


class Products:
    """dleft = W right and dright = W^T left, from chunks of the weights' rows."""

    def __init__(self, pairs: Pairs, needs: Sequence[bool]) -> None:
        self.left, self.right = pairs.left, pairs.right
        self.dleft = torch.empty(self.left.shape, dtype=self.left.dtype, device=self.left.device) if needs[0] else None
        self.dright = self.right.new_zeros(self.right.shape, dtype=torch.float32) if needs[1] else None
        self.wide = self.right.float()

    def add(self, chunk: slice, weights: Tensor) -> None:
        if self.dleft is not None:
            self.dleft[chunk] = (weights @ self.wide).to(self.dleft.dtype)
        if self.dright is not None:
            self.dright.addmm_(weights.t(), self.left[chunk].float())

    def finish(self, like: Tensor) -> list[Tensor]:
        return [
            like.new_empty(0) if self.dleft is None else self.dleft,
            like.new_empty(0) if self.dright is None else self.dright.to(self.right.dtype),
        ]


_ROWS = dict.fromkeys(
    ("out", "row_lse", "row_rest", "parts", "pairs", "scale", "weights", "sums", "norms", "dout"), "*fp32"
)
_UPSTREAM = dict.fromkeys(("column_lse", "drows", "dcolumns", "dpairs"), "*fp32")
_TYPES = {**_ROWS, **_UPSTREAM, "winners": "*i64", "p": "fp32"}

AOT = [
    pairs_entry(norm_sim_fwd_kernel, "fp16", _TYPES, {"MAXIMUM": True}),
    pairs_entry(norm_sim_fwd_kernel, "fp32", _TYPES, {"MAXIMUM": True, "BF16": True}),
    pairs_entry(norm_sim_fwd_kernel, "fp32", _TYPES, {"MAXIMUM": False}),
    pairs_entry(two_way_lse_fwd_kernel, "fp16", _TYPES),
    pairs_entry(two_way_lse_fwd_kernel, "bf16", _TYPES),
    pairs_entry(two_way_lse_fwd_kernel, "fp32", _TYPES),
    pairs_entry(lse_weights_kernel, "bf16", _TYPES),
    pairs_entry(lse_weights_kernel, "fp32", _TYPES),
    pairs_entry(norm_weights_kernel, "fp16", _TYPES),
    pairs_entry(norm_weights_kernel, "fp32", _TYPES),
]
