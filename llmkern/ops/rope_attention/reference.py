r"""Plain torch reference of polynomial attention, forward and backward: dense, in blocks of rows.

Per query head, with logits s_ij = q_i.k_j and key weights w_j = exp(bias_j - max bias):

    o_i = sum_j A_ij v_j / Z_i,    Z_i = sum_j A_ij,    A_ij = w_j p(s_ij)    or    w_j e^{s_ij} where the pair is exact

A pair is exact where |k_j| exceeds the limit of the table, and under a causal mask within a chunk of rows. A row is
exact as a whole (softmax of s + bias) where |q_i| exceeds its limit, or where its certificate fails. The certificate,
with D_i >= sum_j w_j |p(s_ij) - e^{s_ij}| over the pairs that are not exact:

    |o_i - exact_i|  <=  D_i / (Z_i - D_i) max_j |v_j - exact_i|        D_i = M sum_j w_j s_ij^m

and it follows from o_i - exact_i = (1 / Z_i) sum_j w_j (p - e^s)(s_ij) (v_j - exact_i). With fewer leading variables
than all, l_ij the part of s_ij in the leading ones, p holds l in place of s above degree 2, and with t = s - l

    D_i += tail1 sqrt(sum_j w_j s_ij^2 sum_j w_j t_ij^2) + tail0 sum_j w_j t_ij^2

A table row is [a_0 .. a_g, M, tail1, tail0, |q| limit, |k| limit, rounding], see ``Table``.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from llmkern.polynomial import Monomials, monomials

# Entries of a table row after the coefficients.
TABLE_TAIL = 6
ROWS = 1024
# Parts of the rounding budget of a row: normaliser, certificate and three in the output.
ROUNDING_PARTS = 5


class Segment(NamedTuple):
    """Queries [q0, q1) attend to keys [k0, k1) of batch entry ``batch``; ``number`` counts tables and states."""

    number: int
    batch: int
    q0: int
    q1: int
    k0: int
    k1: int


class Table(NamedTuple):
    """One row of the table, named."""

    polynomial: Tensor
    error: Tensor
    tail1: Tensor
    tail0: Tensor
    q_limit: Tensor
    k_limit: Tensor
    rounding: Tensor


def unpack_table(row: Tensor) -> Table:
    return Table(row[:-TABLE_TAIL], *row[-TABLE_TAIL:].unbind())


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def rope_attention_norms_reference(x: Tensor, shift: Tensor | None, maps: Tensor | None) -> Tensor:
    """|(x - shift) map| of each token (B, H, N), in the dtype of computation; shift (B, H, 1, D), maps (B, H, D, D)."""
    x = x.to(compute_dtype(x.dtype))
    x = x if shift is None else x - shift.to(x)
    return torch.linalg.vector_norm(x if maps is None else x @ maps.to(x), dim=-1)


def rope_attention_rotate_reference(x: Tensor, cos: Tensor, sin: Tensor, back: bool) -> Tensor:
    """x (B, H, N, D) turned by tables (1 or B, N, d), d <= D, in the dtype of computation: x cos + roll(x, d / 2) sin
    of the first d numbers. ``back``: by the opposite angle, which is the gradient."""
    size = cos.shape[-1]
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    turning = x[..., :size].to(cos.dtype)
    other = turning.roll(size // 2, -1) * sin
    turned = torch.addcmul(other.neg_() if back else other, turning, cos).to(x.dtype)
    return torch.cat([turned, x[..., size:]], -1).contiguous()


def segments(q: Tensor, k: Tensor, cu_q: Tensor | None, cu_k: Tensor | None) -> list[Segment]:
    if cu_q is None or cu_k is None:
        return [Segment(b, b, 0, q.shape[2], 0, k.shape[2]) for b in range(q.shape[0])]
    bounds_q, bounds_k = cu_q.tolist(), cu_k.tolist()
    return [Segment(i, 0, *rows, *keys) for i, (rows, keys) in enumerate(zip(pairwise(bounds_q), pairwise(bounds_k)))]


def key_weights(bias: Tensor | None, k: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """w_j = exp(bias_j - max) of one head (M,), and the maximum; no key with weight: zeros and 0."""
    if bias is None:
        return torch.ones(k.shape[0], dtype=dtype, device=k.device), torch.zeros((), dtype=dtype, device=k.device)
    bias = bias.to(dtype)
    top = bias.amax() if bias.numel() else bias.new_zeros(())
    top = torch.where(top == -torch.inf, torch.zeros_like(top), top)
    return (bias - top).exp(), top


class Pairs(NamedTuple):
    """Of a block of rows: weights A, their derivatives by s and by l, and the row sums Z and D; (rows, keys)."""

    a: Tensor
    da: Tensor
    da_leading: Tensor | None
    z: Tensor
    d: Tensor
    weight: Tensor


def _power_sum(terms: Iterator[Tensor]) -> Tensor:
    return torch.stack(list(terms)).sum(0)


def polynomial_pairs(
    q: Tensor, k: Tensor, w: Tensor, table: Table, contact: int, leading: int, visible: Tensor, exact: Tensor
) -> Pairs:
    """Rows q (n, D) against keys k (M, D); visible, exact: (n, M) bool."""
    s = q @ k.t()
    wv = torch.where(visible, w, torch.zeros_like(w))
    poly = torch.where(exact, torch.zeros_like(wv), wv)
    a, degree, whole = table.polynomial, len(table.polynomial) - 1, leading >= q.shape[1]
    split = degree if whole else 2
    p = _power_sum(a[i] * s**i for i in range(split + 1))
    dp = _power_sum(i * a[i] * s ** (i - 1) for i in range(1, split + 1))
    d = table.error * (poly * s**contact).sum(-1)
    da_leading = None
    if not whole:
        low = q[:, q.shape[1] - leading :] @ k[:, k.shape[1] - leading :].t()
        t2 = (poly * (s - low).square()).sum(-1)
        s2 = (poly * s.square()).sum(-1)
        d = d + table.tail1 * (s2 * t2).sqrt() + table.tail0 * t2
        p = p + _power_sum(a[i] * low**i for i in range(3, degree + 1))
        da_leading = poly * _power_sum(i * a[i] * low ** (i - 1) for i in range(3, degree + 1))
    # Of exact pairs alone: elsewhere e^s may overflow, and what is not visible must not turn zeros into NaN.
    e = torch.where(exact & visible, s, torch.full_like(s, -torch.inf)).exp() * w
    weights = torch.where(poly > 0, poly * p, e)
    slopes = torch.where(poly > 0, poly * dp, e)
    return Pairs(weights, slopes, da_leading, weights.sum(-1), d, poly.sum(-1))


def certified(pairs: Pairs, table: Table, rtol: float) -> Tensor:
    """(n,) bool: the certificate of the row, rounding included, is at most rtol; no sum of it overflows."""
    slack = table.rounding * pairs.weight
    low = pairs.z - pairs.d - 2 * slack
    return (low > 0) & low.isfinite() & (pairs.d + ROUNDING_PARTS * slack <= rtol * low)


def masks(
    rows: slice, segment_rows: int, keys: int, heavy: Tensor, is_causal: bool, chunk: int
) -> tuple[Tensor, Tensor]:
    """visible and exact, (rows, keys) bool, for rows counted within the segment."""
    i = torch.arange(segment_rows, device=heavy.device)[rows, None]
    j = torch.arange(keys, device=heavy.device)[None, :]
    visible = j <= i if is_causal else torch.ones_like(i + j, dtype=torch.bool)
    exact = heavy.expand_as(visible)
    return visible, exact | (j >= i // chunk * chunk) if is_causal else exact


def blocks(segment: Segment) -> Iterator[slice]:
    for begin in range(0, segment.q1 - segment.q0, ROWS):
        yield slice(begin, min(begin + ROWS, segment.q1 - segment.q0))


def rope_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_bias: Tensor | None,
    table: Tensor,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    is_causal: bool,
    degree: int,
    contact: int,
    leading: int,
    chunk: int,
    rtol: float,
    top_bf16: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output (B, Hq, N, Dv); normaliser (B, Hq, N): Z_i, or of exact rows the log-sum-exp of s + bias; which rows are
    exact, bool (B, Hq, N); state (B, Hkv, R + 1, Dv + 1).

    The state holds m!/alpha! sum_j w_j k_j^alpha [v_j - mean, 1], m the degree of alpha, and in its last row the mean
    and the maximum of the bias. ``top_bf16`` lets kernels round operands of the highest degree, which is not done here.
    """
    dtype, heads = compute_dtype(q.dtype), q.shape[1]
    group = heads // k.shape[1]
    tables = monomials(q.shape[3], degree, leading)
    out = v.new_zeros((*q.shape[:3], v.shape[3]))
    normalizer = torch.zeros(q.shape[:3], dtype=dtype, device=q.device)
    exact_rows = torch.zeros(q.shape[:3], dtype=torch.bool, device=q.device)
    state = torch.zeros((table.shape[0], k.shape[1], tables.count + 1, v.shape[3] + 1), dtype=dtype, device=q.device)
    for segment in segments(q, k, cu_q, cu_k):
        for h in range(heads):
            at = table[segment.number, h].to(dtype)
            keys = slice(segment.k0, segment.k1)
            kh, vh = k[segment.batch, h // group, keys].to(dtype), v[segment.batch, h // group, keys].to(dtype)
            bias = None if key_bias is None else key_bias[segment.batch, h // group, keys]
            w, top = key_weights(bias, kh, dtype)
            row = unpack_table(at)
            heavy = ~(kh.square().sum(-1).sqrt() <= row.k_limit)
            if h % group == 0:
                state[segment.number, h // group] = _state(
                    kh, vh, torch.where(heavy, torch.zeros_like(w), w), top, tables
                )
            for rows in blocks(segment):
                qh = q[segment.batch, h, segment.q0 : segment.q1][rows].to(dtype)
                visible, exact = masks(rows, segment.q1 - segment.q0, len(kh), heavy, is_causal, chunk)
                pairs = polynomial_pairs(qh, kh, w, row, contact, leading, visible, exact)
                good = certified(pairs, row, rtol) & (qh.square().sum(-1).sqrt() <= row.q_limit)
                scores = qh @ kh.t() if bias is None else qh @ kh.t() + bias.to(dtype)
                scores = torch.where(visible, scores, torch.full_like(scores, -torch.inf))
                lse = scores.logsumexp(-1) if len(kh) else scores.new_full((len(qh),), -torch.inf)
                softmax = torch.where((lse == -torch.inf).unsqueeze(-1), 0.0, scores.softmax(-1))
                z = torch.where(good, pairs.z, torch.ones_like(pairs.z))
                share = torch.where(good.unsqueeze(-1), pairs.a / z.unsqueeze(-1), softmax)
                span = slice(segment.q0 + rows.start, segment.q0 + rows.stop)
                out[segment.batch, h, span] = (share @ vh).to(v.dtype)
                normalizer[segment.batch, h, span] = torch.where(good, pairs.z, lse)
                exact_rows[segment.batch, h, span] = ~good
    return out, normalizer, exact_rows, state


def _state(k: Tensor, v: Tensor, w: Tensor, top: Tensor, tables: Monomials) -> Tensor:
    total = w.sum()
    mean = torch.where(total > 0, (w.unsqueeze(-1) * v).sum(0) / total, torch.zeros_like(v[:1].sum(0)))
    columns = torch.cat([v - mean, torch.ones_like(v[:, :1])], -1) * w.unsqueeze(-1)
    moments = k.new_zeros(tables.count, columns.shape[1])
    for begin in range(0, len(k), ROWS):
        moments += tables.features(k[begin : begin + ROWS]).t() @ columns[begin : begin + ROWS]
    moments *= torch.from_numpy(tables.multiplicity).to(moments).unsqueeze(-1)
    return torch.cat([moments, torch.cat([mean, top.reshape(1)]).unsqueeze(0)])


def rope_attention_backward_reference(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_bias: Tensor | None,
    table: Tensor,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    out: Tensor,
    normalizer: Tensor,
    exact_rows: Tensor,
    state: Tensor,
    is_causal: bool,
    degree: int,
    contact: int,
    leading: int,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and key_bias (empty where there is none), the table held fixed.

    With G_ij = (do_i.v_j - do_i.o_i) / Z_i:  ds_ij = A'_ij G_ij,  dbias_j = sum_i A_ij G_ij,
    dv_j = sum_i A_ij do_i / Z_i.
    """
    dtype, heads = compute_dtype(q.dtype), q.shape[1]
    group = heads // k.shape[1]
    dq, dk, dv = (torch.zeros(t.shape, dtype=dtype, device=q.device) for t in (q, k, v))
    dbias = torch.zeros(k.shape[:3], dtype=dtype, device=q.device)
    for segment in segments(q, k, cu_q, cu_k):
        for h in range(heads):
            row = unpack_table(table[segment.number, h].to(dtype))
            keys, head = slice(segment.k0, segment.k1), (segment.batch, h // group)
            kh, vh = k[head][keys].to(dtype), v[head][keys].to(dtype)
            bias = None if key_bias is None else key_bias[head][keys]
            w, _ = key_weights(bias, kh, dtype)
            heavy = ~(kh.square().sum(-1).sqrt() <= row.k_limit)
            for rows in blocks(segment):
                span = slice(segment.q0 + rows.start, segment.q0 + rows.stop)
                qh, g = q[segment.batch, h, span].to(dtype), grad[segment.batch, h, span].to(dtype)
                z, good = normalizer[segment.batch, h, span].unsqueeze(-1), ~exact_rows[segment.batch, h, span, None]
                visible, exact = masks(rows, segment.q1 - segment.q0, len(kh), heavy, is_causal, chunk)
                pairs = polynomial_pairs(qh, kh, w, row, contact, leading, visible, exact)
                scores = qh @ kh.t() if bias is None else qh @ kh.t() + bias.to(dtype)
                scores = torch.where(visible, scores, torch.full_like(scores, -torch.inf))
                softmax = torch.where(z == -torch.inf, 0.0, scores.softmax(-1))
                share = torch.where(good, pairs.a / z, softmax)
                slope = torch.where(good, pairs.da / z, softmax)
                pull = g @ vh.t()
                # do.o of the result before it was rounded: of a row that looks at one key that is most of the gradient.
                pull = pull - (share * pull).sum(-1, keepdim=True)
                ds = slope * pull
                dq[segment.batch, h, span] = ds @ kh
                dk[head][keys] += ds.t() @ qh
                if pairs.da_leading is not None:
                    first = q.shape[3] - leading
                    dl = torch.where(good, pairs.da_leading / z, torch.zeros_like(ds)) * pull
                    dq[segment.batch, h, span, first:] += dl @ kh[:, first:]
                    dk[head][keys][:, first:] += dl.t() @ qh[:, first:]
                dv[head][keys] += share.t() @ g
                dbias[head][keys] += (share * pull).sum(0)
    empty = grad.new_empty(0)
    return (
        dq.to(q.dtype),
        dk.to(k.dtype),
        dv.to(v.dtype),
        empty if key_bias is None else dbias.to(key_bias.dtype),
    )


def rope_attention_exact_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_bias: Tensor | None,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Softmax attention, and the log-sum-exp of the logits of each row: the op above where every row is exact."""
    table = _no_table(q, cu_q)
    x = q.to(compute_dtype(q.dtype)) * scale
    out, normalizer, _, _ = rope_attention_reference(
        x, k.to(x.dtype), v, key_bias, table, cu_q, cu_k, is_causal, 1, 0, q.shape[3], 1, 1.0
    )
    return out, normalizer


def rope_attention_exact_backward_reference(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_bias: Tensor | None,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    out: Tensor,
    normalizer: Tensor,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    x = q.to(normalizer.dtype) * scale
    exact_rows = torch.ones(normalizer.shape, dtype=torch.bool, device=q.device)
    options = (table := _no_table(q, cu_q), cu_q, cu_k, out, normalizer, exact_rows, table, is_causal, 1, 0)
    dq, dk, dv, _ = rope_attention_backward_reference(grad, x, k.to(x.dtype), v, key_bias, *options, q.shape[3], 1)
    return (dq * scale).to(q.dtype), dk.to(k.dtype), dv


def _no_table(q: Tensor, cu_q: Tensor | None) -> Tensor:
    """Under which no query is within its limit."""
    table = q.new_zeros(
        (q.shape[0] if cu_q is None else len(cu_q) - 1, q.shape[1], 2 + TABLE_TAIL), dtype=torch.float64
    )
    table[..., -3] = -1.0
    return table
