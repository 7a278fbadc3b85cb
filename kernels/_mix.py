"""The mix of one tile of one row, from the logits of all models: device functions of mix_logits and sample_mixed.

Formulas: llmkern/ops/mix_logits/reference.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from llmkern.kernels._tiles import EPS32, INF, LOG2, expm1, finite_or_zero, softplus

# rows and strides are tuples over the M models and, last, the reference where there is one. An open row is the tuple
# (pointers, weights, shifts, counts): entry M of the weights is 1 - W, that of the reference under reverse KL; a shift
# turns a logit into a log-probability with carry; a count is the vocabulary, or zero for what is not to be read.


@triton.jit
def load_lses(stats, row, M: tl.constexpr, HAS_REFERENCE: tl.constexpr):
    """Log-sum-exps of the models and of the reference, in which shifts are counted."""
    lses = ()
    for i in tl.static_range(M + HAS_REFERENCE):
        lses += (tl.load(stats + row * (M + 4) + i),)
    return lses


@triton.jit
def open_row(
    rows,
    strides,
    weights,
    carry,
    lses,
    row,
    V,
    M: tl.constexpr,
    HAS_REFERENCE: tl.constexpr,
    DIVERGENCE: tl.constexpr,
    READ_ALL: tl.constexpr,
):
    """lses of None leaves the logits as they are, without carry."""
    COMPUTE: tl.constexpr = weights.dtype.element_ty
    pointers = ()
    loaded = ()
    shifts = ()
    counts = ()
    total = tl.zeros((), COMPUTE)
    size = tl.zeros((), COMPUTE)
    for i in tl.static_range(M):
        weight = tl.load(weights + row * M + i)
        total += weight
        size += tl.abs(weight)
        shift = tl.zeros((), COMPUTE)
        if lses is not None:
            shift -= lses[i]
            if carry is not None:
                shift += tl.load(carry + row * M + i)
        pointers += (rows[i] + row * strides[i],)
        loaded += (weight,)
        shifts += (shift,)
        # Counts and not masks: a scalar comparison of floats cannot be broadcast by Triton's interpreter.
        counts += (V if READ_ALL else V * (weight != 0).to(tl.int32),)
    rest = 1.0 - total
    rest = tl.where(tl.abs(rest) <= size * (M * EPS32), 0.0, rest)
    loaded += (rest,)
    if HAS_REFERENCE:
        shift = tl.zeros((), COMPUTE)
        if lses is not None:
            shift -= lses[M]
        pointers += (rows[M] + row * strides[M],)
        shifts += (shift,)
        counts += (V if READ_ALL or DIVERGENCE != "reverse_kl" else V * (rest != 0).to(tl.int32),)
    else:
        shifts += (-tl.log(tl.zeros((), COMPUTE) + V),)
    return pointers, loaded, shifts, counts, total


@triton.jit
def read_tile(opened, ids, M: tl.constexpr, HAS_REFERENCE: tl.constexpr):
    """Log-probabilities (or logits) of the models as a tuple, and of the reference."""
    pointers, weights, shifts, counts, _ = opened
    COMPUTE: tl.constexpr = weights[0].dtype
    a = ()
    for i in tl.static_range(M):
        a += (tl.load(pointers[i] + ids, ids < counts[i], other=0.0).to(COMPUTE) + shifts[i],)
    r = tl.zeros(ids.shape, COMPUTE) + shifts[M]
    if HAS_REFERENCE:
        r += tl.load(pointers[M] + ids, ids < counts[M], other=0.0).to(COMPUTE)
    return a, r


@triton.jit
def take_away(x, weight):
    """Of a model without weight nothing may reach a sum, not even as 0 * -inf or 0 * NaN."""
    return tl.where(weight == 0, finite_or_zero(x), x)


@triton.jit
def dead_tokens(opened, a, r, M: tl.constexpr, DIVERGENCE: tl.constexpr):
    """Where a model of positive weight, or the reference that counts, gives -inf."""
    weights = opened[1]
    dead = r == -INF
    if DIVERGENCE == "reverse_kl":
        dead = tl.where(weights[M] > 0, r, 0.0) == -INF
    for i in tl.static_range(M):
        dead = dead | (tl.where(weights[i] > 0, a[i], 0.0) == -INF)
    return dead


@triton.jit
def power_sum(opened, a, r, M: tl.constexpr, DIVERGENCE: tl.constexpr, ALPHA: tl.constexpr, EXACT: tl.constexpr):
    """log|g| and a number of the sign of g, where g = sum_i w_i x_i^-alpha (+ 1 - W for alpha with Z = 0)."""
    weights = opened[1]
    top = tl.zeros_like(r) - INF
    for i in tl.static_range(M):
        top = tl.maximum(top, tl.where(weights[i] != 0, ALPHA * (r - a[i]), -INF))
    WITH_REST: tl.constexpr = DIVERGENCE == "alpha" and not EXACT
    if WITH_REST:
        top = tl.where(weights[M] != 0, tl.maximum(top, 0.0), top)
    g = tl.zeros_like(r)
    for i in tl.static_range(M):
        g += tl.where(weights[i] != 0, weights[i] * tl.exp(ALPHA * (r - a[i]) - top), 0.0)
    if WITH_REST:
        g += tl.where(weights[M] != 0, weights[M] * tl.exp(-top), 0.0)
    return top + tl.log(tl.abs(g)), g


@triton.jit
def jsd_sum(opened, a, r, M: tl.constexpr):
    """u = (W - 1) log 2 - sum_i w_i log(1 + 1 / x_i)."""
    weights = opened[1]
    u = tl.zeros_like(r) + (opened[4] - 1.0) * LOG2
    for i in tl.static_range(M):
        u -= tl.where(weights[i] != 0, weights[i] * softplus(r - a[i]), 0.0)
    return u


@triton.jit
def solver_terms(opened, a, r, anchor, anchor_sign, M: tl.constexpr, DIVERGENCE: tl.constexpr, ALPHA: tl.constexpr):
    """b, h, e of each token, with which log mix = b - log(h + d e) / alpha for the root d."""
    if DIVERGENCE == "jsd":
        low = jsd_sum(opened, a, r, M) - anchor
        return r + low, -expm1(low), tl.zeros_like(r) + 1.0
    else:
        log_g, g = power_sum(opened, a, r, M, DIVERGENCE, ALPHA, True)
        low = anchor - log_g
        e = tl.exp(low)
        sign = tl.where(g > 0, 1.0, tl.where(g < 0, -1.0, 0.0))
        return r - log_g / ALPHA, tl.where(anchor_sign > 0, -expm1(low), sign - anchor_sign * e), e


@triton.jit
def mix_tile(
    opened,
    a,
    r,
    tail,
    M: tl.constexpr,
    DIVERGENCE: tl.constexpr,
    ALPHA: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Log-probabilities of a tile; under exact reverse KL the mixed logits, which lack the log-sum-exp of the row.

    tail holds anchor, its sign and the root, read only where the divergence needs them.
    """
    weights = opened[1]
    dead = dead_tokens(opened, a, r, M, DIVERGENCE)
    if DIVERGENCE == "reverse_kl":
        z = weights[M] * take_away(r, weights[M])
        for i in tl.static_range(M):
            z += weights[i] * take_away(a[i], weights[i])
        if not EXACT:
            z += opened[4] - 1.0
        return tl.where(dead, -INF, z)
    elif EXACT:
        anchor, anchor_sign, root = tail
        b, h, e = solver_terms(opened, a, r, anchor, anchor_sign, M, DIVERGENCE, ALPHA)
        # A root of NaN marks a row without distribution, and has to show in its dead tokens too.
        return tl.where(dead, -INF, b - tl.log(h + root * e) / ALPHA) + 0.0 * root
    elif DIVERGENCE == "jsd":
        u = jsd_sum(opened, a, r, M)
        y = r + u - tl.log(-expm1(tl.where(u < 0, u, 0.0)))
        return tl.where(dead | (u >= 0), -INF, tl.where(u < 0, y, u))
    else:
        log_g, g = power_sum(opened, a, r, M, DIVERGENCE, ALPHA, EXACT)
        return tl.where(dead | (g <= 0), -INF, r - log_g / ALPHA)


@triton.jit
def load_tail(stats, row, M: tl.constexpr):
    at = stats + row * (M + 4) + M + 1
    return tl.load(at), tl.load(at + 1), tl.load(at + 2)
