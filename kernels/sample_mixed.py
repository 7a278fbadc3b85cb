"""Triton kernels of sample_mixed.

    sample_draw_kernel     one pass over the inputs, several programs a row: the race z - T log E of every token, and
                           the log-sum-exp; a row with filters leaves its z in a workspace instead of racing
    sample_finish_kernel   one program a row: combines these; for a row with filters finds the thresholds in the
                           workspace without sorting, and races among the tokens that are kept

The token of the smallest E / p, E exponential, is that of the largest z - T log E, where the temperature T may be zero
(greedy) and z may lack its normaliser. Thresholds are exact: each pass over z weighs what lies above 7 pivots between
two keys, integers in the order of the numbers, until nothing lies between the two.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmkern.kernels import _tiles
from llmkern.kernels._mix import load_lses, load_tail, mix_tile, open_row, read_tile
from llmkern.kernels._mix_stats import AotMix, Mix, find_stats
from llmkern.kernels._tiles import (
    INF,
    add_lanes,
    join_lanes,
    load_partials,
    log_sum_exp_of_partials,
    lowest,
    twice_atanh,
)

PIVOTS = tl.constexpr(8)
# Keeps 1 / T and T log E finite; a temperature beyond these limits is greedy or uniform all the same.
LARGEST_TEMPERATURE = tl.constexpr(1e30)
SMALLEST_TEMPERATURE = tl.constexpr(1e-30)


@triton.jit
def philox_words(draws, row, start, QUARTER: tl.constexpr):
    """Random bits of tokens start ... start + 4 QUARTER - 1, start a multiple of 64: lane j of word w is that of token
    start + 64 (j // 16) + 16 w + j % 16."""
    seed = tl.load(draws + row * 3)
    stream = tl.load(draws + row * 3 + 1)
    step = tl.load(draws + row * 3 + 2)
    zero = tl.zeros((QUARTER,), tl.uint32)
    return tl.philox(
        seed,
        (start // 4 + tl.arange(0, QUARTER)).to(tl.uint32),
        zero + (stream & 0xFFFFFFFF).to(tl.uint32),
        zero + (step & 0xFFFFFFFF).to(tl.uint32),
        zero + ((step >> 32) & 0xFFFFFFFF).to(tl.uint32),
    )


@triton.jit
def uniform(word):
    """In fp32, as the reference has it; held below one so that every token has a finite time."""
    return tl.minimum(word.to(tl.float32) * (2.0**-32) + 2.0**-33, 1.0 - 2.0**-24)


@triton.jit
def log_time(word, COMPUTE: tl.constexpr):
    """log E for E = -log(1 - u)."""
    u = uniform(word).to(COMPUTE)
    return tl.log(tl.where(u < 0.5, twice_atanh(u / (2.0 - u)), -tl.log(1.0 - u)))


@triton.jit
def order_key(z):
    """An unsigned integer in the order of z; -0 counts as 0."""
    z = tl.where(z == 0, 0.0, z)
    if z.dtype.is_fp64():
        bits = z.to(tl.uint64, bitcast=True)
        return tl.where((bits >> 63) != 0, bits ^ 0xFFFFFFFFFFFFFFFF, bits | 0x8000000000000000)
    else:
        bits = z.to(tl.uint32, bitcast=True)
        return tl.where((bits >> 31) != 0, bits ^ 0xFFFFFFFF, bits | 0x80000000)


@triton.jit
def value_of_key(key):
    if key.dtype.primitive_bitwidth == 64:
        return tl.where((key >> 63) != 0, key ^ 0x8000000000000000, key ^ 0xFFFFFFFFFFFFFFFF).to(
            tl.float64, bitcast=True
        )
    else:
        return tl.where((key >> 31) != 0, key ^ 0x80000000, key ^ 0xFFFFFFFF).to(tl.float32, bitcast=True)


@triton.jit
def load_filters(filters, row, COMPUTE: tl.constexpr):
    at = filters + row * 4
    temperature = tl.minimum(tl.load(at).to(COMPUTE), LARGEST_TEMPERATURE)
    return temperature, tl.load(at + 1).to(COMPUTE), tl.load(at + 2).to(COMPUTE), tl.load(at + 3).to(COMPUTE)


@triton.jit
def is_filtered(temperature, top_k, top_p, min_p, V):
    return (temperature > 0) & (((top_k > 0) & (top_k < V)) | (top_p < 1) | (min_p > 0))


@triton.jit
def race(best, best_id, best_z, z, ids, log_e, temperature):
    """The better of the best so far and z, lane by lane; ids ascend from call to call, so the lowest wins a tie."""
    score = z - temperature * log_e
    wins = score > best
    return tl.where(wins, score, best), tl.where(wins, ids, best_id), tl.where(wins, z, best_z)


@triton.jit
def join_race(best, best_id, best_z, V):
    """Score, id and z of the winner over all lanes; id V where nobody runs."""
    top = tl.max(best, 0)
    winner = tl.min(tl.where(best == top, best_id, V), 0)
    return top, winner, tl.max(tl.where(best_id == winner, best_z, -INF), 0)


@triton.jit
def sample_draw_kernel(
    partials,
    winners,
    workspace,
    stats,
    filters,
    draws,
    rows,
    strides,
    weights,
    carry,
    V,
    chunk,
    M: tl.constexpr,
    HAS_REFERENCE: tl.constexpr,
    DIVERGENCE: tl.constexpr,
    ALPHA: tl.constexpr,
    EXACT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Partials (B, 4, splits): maximum and sum of exponentials of z, score and z of the winner; winners (B, splits)."""
    COMPUTE: tl.constexpr = weights.dtype.element_ty
    QUARTER: tl.constexpr = BLOCK // 4
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if DIVERGENCE == "reverse_kl" and EXACT:
        opened = open_row(rows, strides, weights, None, None, row, V, M, HAS_REFERENCE, DIVERGENCE, False)
    else:
        lses = load_lses(stats, row, M, HAS_REFERENCE)
        opened = open_row(rows, strides, weights, carry, lses, row, V, M, HAS_REFERENCE, DIVERGENCE, False)
    tail = load_tail(stats, row, M)
    temperature, top_k, top_p, min_p = load_filters(filters, row, COMPUTE)
    filtered = is_filtered(temperature, top_k, top_p, min_p, V)
    top = tl.zeros((QUARTER,), COMPUTE) + lowest(COMPUTE)
    total = tl.zeros((QUARTER,), COMPUTE)
    best = tl.zeros((QUARTER,), COMPUTE) - INF
    best_id = tl.zeros((QUARTER,), tl.int32) + V
    best_z = tl.zeros((QUARTER,), COMPUTE) - INF
    lanes = tl.arange(0, QUARTER)
    for start in range(split * chunk, tl.minimum(V, (split + 1) * chunk), BLOCK):
        w0 = tl.zeros((QUARTER,), tl.uint32)
        w1, w2, w3 = w0, w0, w0
        if (temperature > 0) & (filtered == 0):
            w0, w1, w2, w3 = philox_words(draws, row, start, QUARTER)
        words = (w0, w1, w2, w3)
        for w in tl.static_range(4):
            ids = start + 64 * (lanes // 16) + 16 * w + lanes % 16
            a, r = read_tile(opened, ids, M, HAS_REFERENCE)
            z = tl.where(ids < V, mix_tile(opened, a, r, tail, M, DIVERGENCE, ALPHA, EXACT), -INF)
            top, total = add_lanes(top, total, z)
            if filtered:
                tl.store(workspace + row * V + ids, z, ids < V)
            else:
                log_e = log_time(words[w], COMPUTE)
                best, best_id, best_z = race(best, best_id, best_z, z, ids, log_e, temperature)
    highest, mass = join_lanes(top, total)
    score, winner, z_of_winner = join_race(best, best_id, best_z, V)
    splits = tl.num_programs(1)
    at = partials + row * 4 * splits + split
    tl.store(at, highest)
    tl.store(at + splits, mass)
    tl.store(at + 2 * splits, score)
    tl.store(at + 3 * splits, z_of_winner)
    tl.store(winners + row * splits + split, winner)


@triton.jit
def weights_above(key, z, floor, top, inverse_temperature, COUNT: tl.constexpr):
    """What a token counts in the search: 1, or its probability relative to the largest; 0 below floor."""
    live = (key >= floor) & (z > -INF)
    if COUNT:
        return tl.where(live, 1.0, 0.0).to(z.dtype)
    else:
        return tl.where(live, tl.exp((z - top) * inverse_temperature), 0.0)


@triton.jit
def measure(z_row, V, low, floor, top, inverse_temperature, BLOCK: tl.constexpr):
    """Mass of the tokens whose key is at least low."""
    total = tl.zeros((BLOCK,), top.dtype)
    for start in range(0, V, BLOCK):
        ids = start + tl.arange(0, BLOCK)
        z = tl.load(z_row + ids, ids < V, other=-INF)
        key = order_key(z)
        total += tl.where(key >= low, weights_above(key, z, floor, top, inverse_temperature, False), 0.0)
    return tl.sum(total, 0)


@triton.jit
def find_key(z_row, V, low, high, target, floor, top, inverse_temperature, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """Smallest key in (low, high] whose larger keys weigh less than target together; high is taken to be such a key."""
    while high - low > 1:
        step = (high - low - 1) // PIVOTS + 1
        pivots = low + step * (tl.arange(0, PIVOTS) + 1).to(low.dtype)
        above = tl.zeros((BLOCK, PIVOTS), top.dtype)
        for start in range(0, V, BLOCK):
            ids = start + tl.arange(0, BLOCK)
            z = tl.load(z_row + ids, ids < V, other=-INF)
            key = order_key(z)
            weight = weights_above(key, z, floor, top, inverse_temperature, COUNT)
            above += tl.where(key[:, None] > pivots[None, :], weight[:, None], 0.0)
        enough = tl.sum(above, 0) < target
        high = tl.minimum(high, tl.min(tl.where(enough, pivots, high), 0))
        low = tl.minimum(tl.maximum(low, tl.max(tl.where(enough, low, pivots), 0)), high - 1)
    return high


@triton.jit
def last_tie(z_row, V, threshold, above, target, each, BLOCK: tl.constexpr):
    """Largest id of the tokens at the threshold that top-p keeps: of n equal ones the first whose mass is wanted."""
    seen = tl.zeros((), tl.int32)
    last = tl.zeros((), tl.int32) - 1
    for start in range(0, V, BLOCK):
        ids = start + tl.arange(0, BLOCK)
        tie = (order_key(tl.load(z_row + ids, ids < V, other=-INF)) == threshold).to(tl.int32)
        count = tl.sum(tie, 0)
        if count > 0:
            before = seen + tl.cumsum(tie, 0) - 1
            kept = (tie > 0) & ((above + before.to(each.dtype) * each < target) | (before == 0))
            last = tl.maximum(last, tl.max(tl.where(kept, ids, -1), 0))
            seen += count
    return last


@triton.jit
def sample_finish_kernel(
    tokens,
    log_probs,
    partials,
    winners,
    workspace,
    filters,
    draws,
    V,
    splits,
    LINEAR: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Token and log-probability of a row; LINEAR: z lacks its log-sum-exp. Token -1 and NaN without a distribution."""
    COMPUTE: tl.constexpr = partials.dtype.element_ty
    QUARTER: tl.constexpr = BLOCK // 4
    row = tl.program_id(0).to(tl.int64)
    top, lse = log_sum_exp_of_partials(partials, row, 0, splits, 4, SPLITS)
    scores = load_partials(partials, row, 2, splits, 4, SPLITS, -INF)
    zs = load_partials(partials, row, 3, splits, 4, SPLITS, -INF)
    _, token, z_of_token = join_race(scores, load_partials(winners, row, 0, splits, 1, SPLITS, V), zs, V)
    temperature, top_k, top_p, min_p = load_filters(filters, row, COMPUTE)
    if is_filtered(temperature, top_k, top_p, min_p, V) & (lse == lse):
        z_row = workspace + row * V
        inverse = 1.0 / tl.maximum(temperature, SMALLEST_TEMPERATURE)
        top_key = order_key(top)
        floor = tl.zeros_like(top_key)
        if (top_k > 0) & (top_k < V):
            floor = find_key(z_row, V, floor, top_key, top_k, floor, top, inverse, True, BLOCK)
        threshold = floor
        last = tl.zeros((), tl.int32) + V
        if top_p < 1:
            target = top_p * measure(z_row, V, floor, floor, top, inverse, BLOCK)
            below = tl.maximum(floor, 1) - 1
            threshold = find_key(z_row, V, below, top_key, target, floor, top, inverse, False, BLOCK)
            above = measure(z_row, V, threshold + 1, floor, top, inverse, BLOCK)
            each = tl.exp((value_of_key(threshold) - top) * inverse)
            last = last_tie(z_row, V, threshold, above, target, each, BLOCK)
        best = tl.zeros((QUARTER,), COMPUTE) - INF
        best_id = tl.zeros((QUARTER,), tl.int32) + V
        best_z = tl.zeros((QUARTER,), COMPUTE) - INF
        lanes = tl.arange(0, QUARTER)
        for start in range(0, V, BLOCK):
            runners = ()
            count = tl.zeros((QUARTER,), tl.int32)
            for w in tl.static_range(4):
                ids = start + 64 * (lanes // 16) + 16 * w + lanes % 16
                z = tl.load(z_row + ids, ids < V, other=-INF)
                key = order_key(z)
                kept = (key > threshold) | ((key == threshold) & (ids <= last))
                kept = kept & (z > -INF) & (tl.exp((z - top) * inverse) >= min_p)
                count += kept.to(tl.int32)
                runners += (tl.where(kept, z, -INF),)
            if tl.max(count, 0) > 0:
                words = philox_words(draws, row, start, QUARTER)
                for w in tl.static_range(4):
                    ids = start + 64 * (lanes // 16) + 16 * w + lanes % 16
                    log_e = log_time(words[w], COMPUTE)
                    best, best_id, best_z = race(best, best_id, best_z, runners[w], ids, log_e, temperature)
        _, token, z_of_token = join_race(best, best_id, best_z, V)
    tl.store(tokens + row, tl.where(lse == lse, token, -1))
    tl.store(log_probs + row, tl.where(lse == lse, z_of_token - (lse if LINEAR else 0.0), float("nan")))


# Launcher -------------------------------------------------------------------------------------------------------------


def sample_mixed(
    logits: Sequence[Tensor],
    weights: Tensor,
    reference: Tensor | None,
    carry: Tensor | None,
    divergence: str,
    alpha: float,
    exact: bool,
    filters: Tensor,
    draws: Tensor,
) -> tuple[Tensor, Tensor]:
    """Tokens (B,) int64, log-probs (B,), as ``sample_mixed_reference``; -1 and NaN for a row without distribution."""
    n_rows, vocabulary = logits[0].shape
    tokens = torch.empty(n_rows, dtype=torch.int64, device=weights.device)
    log_probs = weights.new_empty(n_rows)
    if n_rows == 0:
        return tokens, log_probs
    with _tiles.device_guard(weights):
        mix = Mix(logits, weights, reference, carry, divergence, alpha, exact)
        stats = mix.empty(n_rows, mix.models + 4)
        if not mix.is_linear:
            find_stats(mix, stats)
        filters, draws = filters.contiguous(), draws.contiguous()
        partials = mix.empty(n_rows, 4, mix.splits)
        winners = torch.empty((n_rows, mix.splits), dtype=torch.int32, device=weights.device)
        # Touched only in rows with filters, which the host cannot see without waiting for the GPU.
        workspace = mix.empty(n_rows, vocabulary)
        sample_draw_kernel[mix.grid](
            partials,
            winners,
            workspace,
            stats,
            filters,
            draws,
            carry=mix.carry,
            EXACT=exact,
            **mix.shared(),
            **mix.rule(),
            **mix.streaming(),
        )
        sample_finish_kernel[(n_rows,)](
            tokens,
            log_probs,
            partials,
            winners,
            workspace,
            filters,
            draws,
            V=vocabulary,
            splits=mix.splits,
            LINEAR=mix.is_linear,
            SPLITS=mix.padded_splits,
            BLOCK=mix.tile.search_block,
            num_warps=mix.tile.row_warps,
        )
    return tokens, log_probs


AOT = [
    AotMix("bf16", 2, reference=False, carry=False).sharing(sample_draw_kernel),
    AotMix("fp16", 3, "jsd", long=False).sharing(sample_draw_kernel),
    AotMix("fp64", 3).sharing(sample_draw_kernel),
    AotMix("fp32", 6, "alpha").sharing(sample_draw_kernel),
    AotMix("fp32", 2).searching(sample_finish_kernel),
    AotMix("fp64", 2, "jsd", long=False).searching(sample_finish_kernel),
    AotMix("fp64", 2).searching(sample_finish_kernel),
]
