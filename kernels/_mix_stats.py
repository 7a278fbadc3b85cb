"""Statistics of a row that a mix starts from: log-sum-exps of the models, and the root for the exact normaliser.

Every pass computes the mix anew from the logits, which the cache holds after the first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from llmkern.kernels import _tiles
from llmkern.kernels._mix import dead_tokens, jsd_sum, open_row, power_sum, read_tile, solver_terms
from llmkern.kernels._tiles import (
    INF,
    add_lanes,
    expm1,
    join_lanes,
    log_sum_exp_of_partials,
    lowest,
    twice_atanh,
)

NEWTON_STEPS = tl.constexpr(40)


@triton.jit
def model_lse_kernel(
    partials,
    rows,
    strides,
    weights,
    V,
    chunk,
    M: tl.constexpr,
    HAS_REFERENCE: tl.constexpr,
    ABSENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Maximum and sum of exponentials of each model and the reference over one chunk: partials (B, 2 (M + 1), splits).

    Only models of weight are read and the reference, or, if ABSENT, only those of weight zero. What is not read counts
    as one token of logit zero, so that its log-sum-exp is zero.
    """
    COMPUTE: tl.constexpr = weights.dtype.element_ty
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    splits = tl.num_programs(1)
    for i in tl.static_range(M + HAS_REFERENCE):
        count = tl.zeros((), tl.int32) + V
        if i < M:
            count *= ((tl.load(weights + row * M + i) == 0) == ABSENT).to(tl.int32)
        elif ABSENT:
            count *= 0
        pointer = rows[i] + row * strides[i]
        top = tl.zeros((BLOCK,), COMPUTE) + lowest(COMPUTE)
        total = tl.zeros((BLOCK,), COMPUTE)
        for start in range(split * chunk, tl.minimum(count, (split + 1) * chunk), BLOCK):
            ids = start + tl.arange(0, BLOCK)
            top, total = add_lanes(top, total, tl.load(pointer + ids, ids < V, other=-INF).to(COMPUTE))
        highest, mass = join_lanes(top, total)
        at = partials + (row * 2 * (M + 1) + 2 * i) * splits + split
        tl.store(at, tl.where(count == 0, 0.0, highest))
        tl.store(at + splits, tl.where(count == 0, (split == 0).to(COMPUTE), mass))


@triton.jit
def find_anchor(
    opened,
    V,
    M: tl.constexpr,
    HAS_REFERENCE: tl.constexpr,
    DIVERGENCE: tl.constexpr,
    ALPHA: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """log|g0| and the sign of g0, the smallest g of the row; for JSD the largest u, and 1."""
    COMPUTE: tl.constexpr = opened[1][0].dtype
    smallest = tl.zeros((BLOCK,), COMPUTE) + INF
    largest = tl.zeros((BLOCK,), COMPUTE) - INF
    for start in range(0, V, BLOCK):
        ids = start + tl.arange(0, BLOCK)
        a, r = read_tile(opened, ids, M, HAS_REFERENCE)
        live = (ids < V) & (dead_tokens(opened, a, r, M, DIVERGENCE) == 0)
        if DIVERGENCE == "jsd":
            largest = tl.maximum(largest, tl.where(live, jsd_sum(opened, a, r, M), -INF))
        else:
            log_g, g = power_sum(opened, a, r, M, DIVERGENCE, ALPHA, True)
            smallest = tl.minimum(smallest, tl.where(live, log_g, INF))
            largest = tl.maximum(largest, tl.where(live & (g < 0), log_g, -INF))
    deepest = tl.max(largest, 0)
    if DIVERGENCE == "jsd":
        return deepest, deepest * 0.0 + 1.0
    else:
        return tl.where(deepest > -INF, deepest, tl.min(smallest, 0)), tl.where(deepest > -INF, -1.0, 1.0).to(COMPUTE)


@triton.jit
def find_root(
    opened,
    anchor,
    anchor_sign,
    V,
    M: tl.constexpr,
    HAS_REFERENCE: tl.constexpr,
    DIVERGENCE: tl.constexpr,
    ALPHA: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Newton's method on F^-alpha = 1 from the largest root of a single term, while it climbs; NaN without one."""
    COMPUTE: tl.constexpr = anchor.dtype
    start_lanes = tl.zeros((BLOCK,), COMPUTE)
    for start in range(0, V, BLOCK):
        ids = start + tl.arange(0, BLOCK)
        a, r = read_tile(opened, ids, M, HAS_REFERENCE)
        live = (ids < V) & (dead_tokens(opened, a, r, M, DIVERGENCE) == 0)
        b, h, e = solver_terms(opened, a, r, anchor, anchor_sign, M, DIVERGENCE, ALPHA)
        start_lanes = tl.maximum(start_lanes, tl.where(live, (tl.exp(ALPHA * b) - h) / e, 0.0))
    root = tl.maximum(tl.max(start_lanes, 0), 1e-37)
    climb = root
    mass = root
    steps = 0
    while (climb > 0) & (steps < NEWTON_STEPS):
        masses = tl.zeros((BLOCK,), COMPUTE)
        slopes = tl.zeros((BLOCK,), COMPUTE)
        for start in range(0, V, BLOCK):
            ids = start + tl.arange(0, BLOCK)
            a, r = read_tile(opened, ids, M, HAS_REFERENCE)
            live = (ids < V) & (dead_tokens(opened, a, r, M, DIVERGENCE) == 0)
            b, h, e = solver_terms(opened, a, r, anchor, anchor_sign, M, DIVERGENCE, ALPHA)
            y = h + root * e
            term = tl.where(live, tl.exp(b - tl.log(y) / ALPHA), 0.0)
            masses += term
            slopes += tl.where(live, term * e / y, 0.0)
        mass = tl.sum(masses, 0)
        log_mass = tl.where(mass < 2, twice_atanh((mass - 1.0) / (mass + 1.0)), tl.log(mass))
        climb = mass * expm1(ALPHA * log_mass) / tl.sum(slopes, 0)
        after = tl.where(climb > 0, root + climb, root)
        climb = after - root
        root = after
        steps += 1
    return tl.where(mass > 0, root, float("nan"))


@triton.jit
def row_stats_kernel(
    stats,
    partials,
    rows,
    strides,
    weights,
    carry,
    V,
    splits,
    M: tl.constexpr,
    HAS_REFERENCE: tl.constexpr,
    DIVERGENCE: tl.constexpr,
    ALPHA: tl.constexpr,
    EXACT: tl.constexpr,
    ABSENT: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Log-sum-exps from their partials; where EXACT, anchor and root of the row too: stats (B, M + 4).

    ABSENT fills in only the log-sum-exps of models of weight zero.
    """
    row = tl.program_id(0).to(tl.int64)
    at = stats + row * (M + 4)
    lses = ()
    for i in tl.static_range(M + HAS_REFERENCE):
        _, lse = log_sum_exp_of_partials(partials, row, 2 * i, splits, 2 * (M + 1), SPLITS)
        lses += (lse,)
        if not ABSENT:
            tl.store(at + i, lse)
        elif i < M:
            tl.store(at + i, lse, tl.load(weights + row * M + i) == 0)
    if EXACT and not ABSENT:
        opened = open_row(rows, strides, weights, carry, lses, row, V, M, HAS_REFERENCE, DIVERGENCE, False)
        anchor, anchor_sign = find_anchor(opened, V, M, HAS_REFERENCE, DIVERGENCE, ALPHA, BLOCK)
        root = find_root(opened, anchor, anchor_sign, V, M, HAS_REFERENCE, DIVERGENCE, ALPHA, BLOCK)
        tl.store(at + M + 1, anchor)
        tl.store(at + M + 2, anchor_sign)
        tl.store(at + M + 3, root)


# Launchers ------------------------------------------------------------------------------------------------------------


class Mix:
    """One mix on its way to the kernels: rows, grid, and the arguments that all of them share."""

    def __init__(
        self,
        logits: Sequence[Tensor],
        weights: Tensor,
        reference: Tensor | None,
        carry: Tensor | None,
        divergence: str,
        alpha: float,
        exact: bool,
    ) -> None:
        self.models = len(logits)
        self.rows = tuple(_tiles.unit_stride(row) for row in (*logits, *([] if reference is None else [reference])))
        self.strides = tuple(row.stride(0) for row in self.rows)
        self.n_rows, self.vocabulary = logits[0].shape
        self.weights = weights.contiguous()
        self.carry = None if carry is None else carry.contiguous()
        self.has_reference = reference is not None
        self.divergence, self.alpha, self.exact = divergence, float(alpha), exact
        self.is_linear = divergence == "reverse_kl" and exact
        self.tile = _tiles.tile_for(self.rows[0], len(self.rows))
        self.splits, self.chunk = _tiles.split_rows(self.n_rows, self.vocabulary, self.tile.block)
        self.grid = (self.n_rows, self.splits)
        self.padded_splits = triton.next_power_of_2(self.splits)

    def empty(self, *shape: int) -> Tensor:
        return self.weights.new_empty(shape)

    def shared(self) -> dict[str, Any]:
        return {
            "rows": self.rows,
            "strides": self.strides,
            "weights": self.weights,
            "V": self.vocabulary,
            "M": self.models,
            "HAS_REFERENCE": self.has_reference,
        }

    def rule(self) -> dict[str, Any]:
        return {"DIVERGENCE": self.divergence, "ALPHA": self.alpha}

    def streaming(self) -> dict[str, Any]:
        """Sizes of the kernels that share a row among programs."""
        return {"chunk": self.chunk, "BLOCK": self.tile.block, "num_warps": self.tile.warps}

    def owning(self) -> dict[str, Any]:
        """Sizes of the kernels that give a row to one program."""
        return {"BLOCK": self.tile.row_block, "num_warps": self.tile.row_warps}


def find_stats(mix: Mix, stats: Tensor, absent: bool = False) -> None:
    """Fill stats for anything but exact reverse KL; absent adds what is left out there: models of weight zero."""
    partials = mix.empty(mix.n_rows, 2 * (mix.models + 1), mix.splits)
    model_lse_kernel[mix.grid](partials, **mix.shared(), ABSENT=absent, **mix.streaming())
    row_stats_kernel[(mix.n_rows,)](
        stats,
        partials,
        carry=mix.carry,
        splits=mix.splits,
        EXACT=mix.exact,
        ABSENT=absent,
        SPLITS=mix.padded_splits,
        **mix.shared(),
        **mix.rule(),
        **mix.owning(),
    )


# Ahead-of-time compilation --------------------------------------------------------------------------------------------


class AotMix:
    """Types, constants and tile of one configuration, under the names that all kernels of the mix share."""

    def __init__(
        self,
        dtype: str,
        models: int,
        divergence: str = "reverse_kl",
        *,
        exact: bool = True,
        long: bool = True,
        reference: bool = True,
        carry: bool = True,
    ) -> None:
        compute = "*fp64" if dtype == "fp64" else "*fp32"
        rows = models + reference
        size = {"fp64": 8, "fp32": 4}.get(dtype, 2)
        self.tile = _tiles.shrink(_tiles.TILES["sm_80", size, long], rows)
        self.types = {
            "rows": (f"*{dtype}",) * rows,
            "outs": (f"*{dtype}",) * rows,
            "strides": ("i64",) * rows,
            **dict.fromkeys(("out", "dy"), f"*{dtype}"),
            **dict.fromkeys(("weights", "stats", "partials", "sums", "masses", "workspace", "log_probs"), compute),
            **dict.fromkeys(("V", "chunk", "splits"), "i32"),
            **({"carry": compute} if carry else {}),
            "dy_stride": "i64",
            "winners": "*i32",
            "tokens": "*i64",
            "filters": "*fp64",
            "draws": "*i64",
        }
        self.linear = divergence == "reverse_kl" and exact
        self.constants: dict[str, Any] = {
            "M": models,
            "HAS_REFERENCE": reference,
            "DIVERGENCE": divergence,
            "ALPHA": 0.5,
            "EXACT": exact,
            "ABSENT": False,
            "READ_ALL": True,
            "WANTED": (1 << rows) - 1,
            "LINEAR": self.linear,
            "SPLITS": _tiles.MAX_SPLITS,
            "carry": None,
        }

    def sharing(self, kernel: Any, **constants: Any) -> tuple[Any, ...]:
        """Entry for a kernel whose programs share rows; a constant may replace an argument by None."""
        return self._entry(kernel, self.tile.block, self.tile.warps, constants)

    def owning(self, kernel: Any) -> tuple[Any, ...]:
        return self._entry(kernel, self.tile.row_block, self.tile.row_warps, {})

    def searching(self, kernel: Any) -> tuple[Any, ...]:
        return self._entry(kernel, self.tile.search_block, self.tile.row_warps, {})

    def _entry(self, kernel: Any, block: int, warps: int, constants: dict[str, Any]) -> tuple[Any, ...]:
        types = {name: type_ for name, type_ in self.types.items() if name not in constants}
        return _tiles.ahead_of_time(kernel, types, {**self.constants, "BLOCK": block, **constants}, warps)


AOT = [
    AotMix("bf16", 3).sharing(model_lse_kernel),
    AotMix("fp64", 3, long=False).sharing(model_lse_kernel, ABSENT=True),
    AotMix("bf16", 3, "jsd").owning(row_stats_kernel),
    AotMix("fp16", 3, "alpha", long=False).owning(row_stats_kernel),
    AotMix("fp64", 2, "forward_kl").owning(row_stats_kernel),
    AotMix("fp32", 6, "alpha").owning(row_stats_kernel),
]
