"""Gradients of mix_logits: kernels. Formulas: mix_logits_backward_reference in llmkern/ops/mix_logits/reference.py."""

from __future__ import annotations

import triton
import triton.language as tl

from llmkern.kernels._mix import load_lses, load_tail, mix_tile, open_row, read_tile, take_away
from llmkern.kernels._mix_stats import AotMix
from llmkern.kernels._tiles import INF, LOG2, expm1, softplus, sum_partials


@triton.jit
def open_for_gradients(
    rows,
    strides,
    weights,
    carry,
    stats,
    row,
    V,
    M: tl.constexpr,
    HAS_REFERENCE: tl.constexpr,
    DIVERGENCE: tl.constexpr,
    EXACT: tl.constexpr,
    READ_ALL: tl.constexpr,
):
    """The open row, its tail, and what mix_tile lacks of the log-probability."""
    tail = load_tail(stats, row, M)
    if DIVERGENCE == "reverse_kl" and EXACT:
        opened = open_row(rows, strides, weights, None, None, row, V, M, HAS_REFERENCE, DIVERGENCE, READ_ALL)
        return opened, tail, tail[0]
    else:
        lses = load_lses(stats, row, M, HAS_REFERENCE)
        opened = open_row(rows, strides, weights, carry, lses, row, V, M, HAS_REFERENCE, DIVERGENCE, READ_ALL)
        return opened, tail, tl.zeros_like(tail[0])


@triton.jit
def slope(y, r, DIVERGENCE: tl.constexpr, ALPHA: tl.constexpr):
    """D = d log mix / ds."""
    if DIVERGENCE == "reverse_kl":
        return tl.zeros_like(y) + 1.0
    elif DIVERGENCE == "jsd":
        return 1.0 + tl.exp(y - r)
    else:
        return tl.exp(ALPHA * (y - r))


@triton.jit
def model_slopes(a, r, y, d, DIVERGENCE: tl.constexpr, ALPHA: tl.constexpr, EXACT: tl.constexpr):
    """K = D x f''(x) and T = D f'(x) of one model."""
    log_x = a - r
    if DIVERGENCE == "reverse_kl":
        return d, log_x + (0.0 if EXACT else 1.0)
    elif DIVERGENCE == "jsd":
        below = softplus(-log_x)
        return d * tl.exp(-softplus(log_x)), d * (LOG2 - below)
    else:
        power = tl.exp(ALPHA * (y - a))
        return power, -power if DIVERGENCE == "forward_kl" else d * expm1(-ALPHA * log_x) / -ALPHA


@triton.jit
def gradient_tile(
    dy,
    opened,
    tail,
    lse,
    ids,
    V,
    M: tl.constexpr,
    HAS_REFERENCE: tl.constexpr,
    DIVERGENCE: tl.constexpr,
    ALPHA: tl.constexpr,
    EXACT: tl.constexpr,
):
    """a, r, y, live tokens, upstream gradient g and D of a tile; y, g and D are zero where a token is not live."""
    a, r = read_tile(opened, ids, M, HAS_REFERENCE)
    y = mix_tile(opened, a, r, tail, M, DIVERGENCE, ALPHA, EXACT) - lse
    live = (ids < V) & (y != -INF)
    g = tl.where(live, tl.load(dy + ids, ids < V, other=0.0).to(y.dtype), 0.0)
    d = tl.where(live, slope(y, r, DIVERGENCE, ALPHA), 0.0)
    return a, r, tl.where(live, y, 0.0), live, g, d


@triton.jit
def mix_bwd_sums_kernel(
    partials,
    dy,
    dy_stride,
    stats,
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
    READ_ALL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sums of p D and of dy D over one chunk of one row: partials (B, 2, splits)."""
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    opened, tail, lse = open_for_gradients(
        rows, strides, weights, carry, stats, row, V, M, HAS_REFERENCE, DIVERGENCE, True, READ_ALL
    )
    mass = tl.zeros((BLOCK,), weights.dtype.element_ty)
    upstream = tl.zeros((BLOCK,), weights.dtype.element_ty)
    for start in range(split * chunk, tl.minimum(V, (split + 1) * chunk), BLOCK):
        ids = start + tl.arange(0, BLOCK)
        _, _, y, live, g, d = gradient_tile(
            dy + row * dy_stride, opened, tail, lse, ids, V, M, HAS_REFERENCE, DIVERGENCE, ALPHA, True
        )
        mass += tl.where(live, tl.exp(y), 0.0) * d
        upstream += g * d
    at = partials + row * 2 * tl.num_programs(1) + split
    tl.store(at, tl.sum(mass, 0))
    tl.store(at + tl.num_programs(1), tl.sum(upstream, 0))


@triton.jit
def projection(sums, row, splits, EXACT: tl.constexpr, SPLITS: tl.constexpr, COMPUTE: tl.constexpr):
    """c in H = dy - c p: the share of the upstream gradient that the normaliser takes back."""
    if EXACT:
        return sum_partials(sums, row, 1, splits, 2, SPLITS) / sum_partials(sums, row, 0, splits, 2, SPLITS)
    else:
        return tl.zeros((), COMPUTE)


@triton.jit
def mix_bwd_mass_kernel(
    partials,
    sums,
    dy,
    dy_stride,
    stats,
    rows,
    strides,
    weights,
    carry,
    V,
    splits,
    chunk,
    M: tl.constexpr,
    HAS_REFERENCE: tl.constexpr,
    DIVERGENCE: tl.constexpr,
    ALPHA: tl.constexpr,
    EXACT: tl.constexpr,
    READ_ALL: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sums of H K and of H T for each model, and of dr, over one chunk of one row: partials (B, 2M + 1, splits)."""
    COMPUTE: tl.constexpr = weights.dtype.element_ty
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    opened, tail, lse = open_for_gradients(
        rows, strides, weights, carry, stats, row, V, M, HAS_REFERENCE, DIVERGENCE, EXACT, READ_ALL
    )
    taken = projection(sums, row, splits, EXACT, SPLITS, COMPUTE)
    loaded = opened[1]
    masses = ()
    slopes = ()
    for _ in tl.static_range(M):
        masses += (tl.zeros((BLOCK,), COMPUTE),)
        slopes += (tl.zeros((BLOCK,), COMPUTE),)
    to_reference = tl.zeros((BLOCK,), COMPUTE)
    for start in range(split * chunk, tl.minimum(V, (split + 1) * chunk), BLOCK):
        ids = start + tl.arange(0, BLOCK)
        a, r, y, live, g, d = gradient_tile(
            dy + row * dy_stride, opened, tail, lse, ids, V, M, HAS_REFERENCE, DIVERGENCE, ALPHA, EXACT
        )
        h = g - taken * tl.where(live, tl.exp(y), 0.0)
        finite_r = tl.where(r == -INF, 0.0, r)
        if DIVERGENCE == "reverse_kl" and EXACT and not HAS_REFERENCE:
            # Logits less the log-probabilities of a reference that is uniform: a constant of the row, which cancels.
            finite_r = tl.zeros_like(r)
        new_masses = ()
        new_slopes = ()
        weighted = tl.zeros((BLOCK,), COMPUTE)
        for i in tl.static_range(M):
            present = live & (a[i] != -INF)
            log_pi = tl.where(present, take_away(a[i], loaded[i]), finite_r)
            k, t = model_slopes(log_pi, finite_r, y, d, DIVERGENCE, ALPHA, EXACT)
            if DIVERGENCE == "reverse_kl":
                # Where the reference has no mass its weight 1 - W has no finite derivative: no gradient passes there.
                t = tl.where(r == -INF, 0.0, t)
            new_masses += (masses[i] + tl.where(present, h * k, 0.0),)
            new_slopes += (slopes[i] + tl.where(present, h * t, 0.0),)
            weighted += tl.where(loaded[i] != 0, loaded[i] * tl.where(present, k, 0.0), 0.0)
        masses = new_masses
        slopes = new_slopes
        to_reference += h * (loaded[M] if DIVERGENCE == "reverse_kl" else 1.0 - weighted)
    at = partials + row * (2 * M + 1) * splits + split
    for i in tl.static_range(M):
        tl.store(at + i * splits, tl.where(loaded[i] == 0, 0.0, tl.sum(masses[i], 0)))
        tl.store(at + (M + i) * splits, tl.sum(slopes[i], 0))
    tl.store(at + 2 * M * splits, tl.sum(to_reference, 0))


@triton.jit
def mix_bwd_write_kernel(
    outs,
    sums,
    masses,
    dy,
    dy_stride,
    stats,
    rows,
    strides,
    weights,
    carry,
    V,
    splits,
    chunk,
    M: tl.constexpr,
    HAS_REFERENCE: tl.constexpr,
    DIVERGENCE: tl.constexpr,
    ALPHA: tl.constexpr,
    EXACT: tl.constexpr,
    READ_ALL: tl.constexpr,
    WANTED: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gradients of logits and reference over one chunk of one row; bit i of WANTED asks for the i-th of outs.

    masses is None under exact reverse KL, where sum H = 0 makes all of them zero.
    """
    COMPUTE: tl.constexpr = weights.dtype.element_ty
    CHANNELS: tl.constexpr = 2 * M + 1
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    opened, tail, lse = open_for_gradients(
        rows, strides, weights, carry, stats, row, V, M, HAS_REFERENCE, DIVERGENCE, EXACT, READ_ALL
    )
    taken = projection(sums, row, splits, EXACT, SPLITS, COMPUTE)
    loaded = opened[1]
    totals = ()
    carries = ()
    for i in tl.static_range(M):
        total = tl.zeros((), COMPUTE)
        if masses is not None:
            total += sum_partials(masses, row, i, splits, CHANNELS, SPLITS)
        shift = tl.zeros((), COMPUTE)
        if carry is not None:
            shift += tl.load(carry + row * M + i)
        totals += (total,)
        carries += (shift,)
    if masses is not None:
        totals += (sum_partials(masses, row, 2 * M, splits, CHANNELS, SPLITS),)
    for start in range(split * chunk, tl.minimum(V, (split + 1) * chunk), BLOCK):
        ids = start + tl.arange(0, BLOCK)
        a, r, y, live, g, d = gradient_tile(
            dy + row * dy_stride, opened, tail, lse, ids, V, M, HAS_REFERENCE, DIVERGENCE, ALPHA, EXACT
        )
        h = g - taken * tl.where(live, tl.exp(y), 0.0)
        finite_r = tl.where(r == -INF, 0.0, r)
        weighted = tl.zeros((BLOCK,), COMPUTE)
        for i in tl.static_range(M):
            present = live & (a[i] != -INF)
            log_pi = take_away(a[i], loaded[i])
            k, _ = model_slopes(tl.where(present, log_pi, finite_r), finite_r, y, d, DIVERGENCE, ALPHA, EXACT)
            k = tl.where(present, k, 0.0)
            weighted += tl.where(loaded[i] != 0, loaded[i] * k, 0.0)
            if WANTED & (1 << i):
                da = h * k
                if masses is not None:
                    da -= tl.exp(log_pi - carries[i]) * totals[i]
                da = tl.where(loaded[i] != 0, loaded[i] * da, 0.0)
                tl.store(outs[i] + row * V + ids, da, ids < V)
        if WANTED & (1 << M):
            dr = h * (loaded[M] if DIVERGENCE == "reverse_kl" else 1.0 - weighted)
            if masses is not None:
                dr -= tl.exp(r) * totals[M]
            tl.store(outs[M] + row * V + ids, dr, ids < V)


AOT = [
    AotMix("bf16", 3, reference=False, carry=False).sharing(mix_bwd_sums_kernel),
    AotMix("fp32", 6, "jsd").sharing(mix_bwd_sums_kernel),
    AotMix("bf16", 3).sharing(mix_bwd_mass_kernel),
    AotMix("fp16", 3, "jsd").sharing(mix_bwd_mass_kernel),
    AotMix("fp64", 3, "jsd").sharing(mix_bwd_mass_kernel),
    AotMix("fp32", 6, "alpha").sharing(mix_bwd_mass_kernel),
    AotMix("bf16", 3, reference=False, carry=False).sharing(mix_bwd_write_kernel, masses=None),
    AotMix("fp64", 3, "jsd", long=False).sharing(mix_bwd_write_kernel),
    AotMix("fp32", 6, "alpha").sharing(mix_bwd_write_kernel),
    AotMix("fp16", 3, "forward_kl", exact=False).sharing(mix_bwd_write_kernel, sums=None),
]
