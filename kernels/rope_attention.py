"""Triton kernels of rope_attention.

forward    moments of keys (a state a segment) -> summed over earlier segments -> applied to queries
           -> pairs within the segment -> rope_finish_kernel: output and certificate -> exact rows
backward   gradient of queries from the keys' states; moments of queries with their upstream gradients, summed over
           later segments -> applied to keys and differentiated; pairs and exact rows as in the forward pass

Full attention is one segment whose state everybody reads, computed in parts that are then added.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmkern.kernels import _tiles
from llmkern.kernels._exact_pairs import Rows, add_gradients, blocks, exact_blocks, exact_scores, softmax_of
from llmkern.kernels._monomials import TOKENS, Moments
from llmkern.ops.rope_attention.reference import (
    ROUNDING_PARTS,
    TABLE_TAIL,
    rope_attention_backward_reference,
    rope_attention_exact_backward_reference,
    rope_attention_exact_reference,
    rope_attention_norms_reference,
    rope_attention_reference,
)

# Programs that share the keys of full attention, and the longest segment of causal attention: its pairs are quadratic.
PARTS = 32
LONGEST = 4096


@triton.jit
def rope_finish_kernel(
    out,
    normalizer,
    exact,
    sums,
    mean,
    weight,
    q_norm,
    limits,
    rtol,
    n,
    group,
    V,
    EXTRA: tl.constexpr,
    ROUNDING_PARTS: tl.constexpr,
    BLOCK_V: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Rows of out (H, n, V) from sums (H, n, V + 1 + EXTRA), and whether their certificate exceeds rtol.

    weight (H, n): weights of the keys that went through the polynomial; limits (H, 4): tail1, tail0, |q|, rounding.
    """
    tokens, head = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS), tl.program_id(1).to(tl.int64)
    seen = tokens < n
    columns = tl.arange(0, BLOCK_V)
    row = head * n + tokens
    at = sums + row * (V + 1 + EXTRA)
    z = tl.load(at + V, seen, other=1.0)
    tail1, tail0 = tl.load(limits + head * 4), tl.load(limits + head * 4 + 1)
    d = tl.maximum(tl.load(at + V + 1, seen, other=0.0), 0.0)
    if EXTRA > 1:
        tail = tl.maximum(tl.load(at + V + 2, seen, other=0.0), 0.0)
        d += tail1 * tl.sqrt(tl.maximum(tl.load(at + V + 3, seen, other=0.0), 0.0) * tail) + tail0 * tail
    slack = tl.load(limits + head * 4 + 3) * tl.load(weight + row, seen, other=0.0)
    low = z - d - 2.0 * slack
    good = (low > 0) & (d + ROUNDING_PARTS * slack <= rtol * low) & (z < 1e30)
    good = good & (tl.load(q_norm + row, seen, other=0.0) <= tl.load(limits + head * 4 + 2))
    tl.store(normalizer + row, z, seen)
    tl.store(exact + row, (good == 0).to(tl.int8), seen)
    live = seen[:, None] & (columns < V)[None, :]
    centre = tl.load(mean + (head // group) * V + columns, columns < V, other=0.0)
    y = tl.load(at[:, None] + columns[None, :], live, other=0.0) / z[:, None] + centre[None, :]
    tl.store(out + row[:, None] * V + columns[None, :], y.to(out.dtype.element_ty), live)


@triton.jit
def rope_rotate_kernel(
    y,
    x,
    cos,
    sin,
    heads,
    n,
    D,
    stride_b,
    stride_h,
    stride_n,
    table_b,
    turning,
    BACK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """y (B, heads, n, D) = x turned by tables (B or 1, n, turning), see rope_attention_rotate_reference."""
    tokens, head = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS), tl.program_id(1).to(tl.int64)
    b, tokens = head // heads, tokens.to(tl.int64)
    columns = tl.arange(0, BLOCK_D)
    live = (tokens < n)[:, None] & (columns < D)[None, :]
    turns = live & (columns < turning)[None, :]
    from_row = x + b * stride_b + (head % heads) * stride_h + tokens[:, None] * stride_n
    here = tl.load(from_row + columns[None, :], live, other=0.0).to(cos.dtype.element_ty)
    across = (columns + turning // 2) % turning
    there = tl.load(from_row + across[None, :], turns, other=0.0).to(cos.dtype.element_ty)
    at = b * table_b + tokens[:, None] * turning + columns[None, :]
    c, s = tl.load(cos + at, turns, other=1.0), tl.load(sin + at, turns, other=0.0)
    if BACK:
        s = -s
    tl.store(
        y + (head * n + tokens[:, None]) * D + columns[None, :], (here * c + there * s).to(y.dtype.element_ty), live
    )


class Problem:
    """One batch without cu_seqlens: tensors by head, weights of keys, states' tables."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        key_bias: Tensor | None,
        table: Tensor,
        is_causal: bool,
        degree: int,
        contact: int,
        leading: int,
        chunk: int,
    ) -> None:
        self.is_causal, self.degree = is_causal, degree
        self.moments = Moments(q.shape[3], degree, leading, q.device)
        tables = self.moments.tables
        self.q, self.k, self.v = (x.float().flatten(0, 1).contiguous() for x in (q, k, v))
        rows = table.float().flatten(0, 1)
        polynomial, tail = rows[:, :-TABLE_TAIL], rows[:, -TABLE_TAIL:]
        error, tail1, tail0, q_limit, k_limit, rounding = tail.unbind(1)
        self.limits = torch.stack([tail1, tail0, q_limit, rounding], 1).contiguous()
        self.bias = None if key_bias is None else key_bias.float().flatten(0, 1)
        group = self.q.shape[0] // max(self.k.shape[0], 1)
        self.top = self.k.new_zeros(self.k.shape[0])
        w = torch.ones_like(self.k[..., 0])
        if self.bias is not None and self.bias.shape[1]:
            self.top = self.bias.amax(1)
            self.top = torch.where(self.top == -torch.inf, 0.0, self.top)
            w = (self.bias - self.top[:, None]).exp()
        heavy = ~(self.k.square().sum(-1).sqrt() <= k_limit[::group, None])
        self.light = torch.where(heavy, 0.0, w)
        self.x = torch.where(heavy.unsqueeze(-1), 0.0, self.k)
        total = self.light.sum(1, keepdim=True)
        mean = (self.light.unsqueeze(-1) * self.v).sum(1) / torch.where(total > 0, total, 1.0)
        self.mean = mean.contiguous()
        self.centred = self.v - mean.unsqueeze(1)
        ones = torch.ones_like(self.v[..., :1])
        self.values = torch.cat([self.centred, ones], -1)
        n, m = self.q.shape[1], self.k.shape[1]
        if is_causal:
            unit = math.lcm(chunk, TOKENS)
            self.length = unit * max(1, min(LONGEST // unit, triton.cdiv(tables.count, 2 * unit)))
        else:
            self.length = TOKENS * max(1, triton.cdiv(m, TOKENS * PARTS))
        # What queries ask of a segment: causal rows that of their own place, others the only one.
        self.query_length = self.length if is_causal else max(n, 1)
        self.pairs = Rows(
            self.q, self.k, w, heavy, polynomial, error, contact, leading, self.length if is_causal else 0, chunk
        )
        device = q.device
        degrees = torch.from_numpy(tables.degrees).to(device)
        self.multiplicity = many = torch.from_numpy(tables.multiplicity).to(self.q)
        self.weights = polynomial[:, degrees] * many
        d = error[:, None] * (many * (degrees == contact))
        tails = many * torch.from_numpy(tables.tail).to(self.q), many * (degrees == 2)
        extra = [d, *(x.expand_as(d) for x in tails)]
        # The certificate, and below all leading variables the moments of the rest and of the whole.
        self.extra = 3 if leading < q.shape[3] else 1
        self.all_weights = torch.stack([self.weights, *extra[: self.extra]], 1).contiguous()

    def earlier(self, state: Tensor) -> Tensor:
        """State of each segment's queries: the sum over segments before it, or over all."""
        if not self.is_causal:
            return state.sum(1, keepdim=True)
        segments = triton.cdiv(max(self.q.shape[1], 1), self.length)
        parts, total = [], torch.zeros_like(state[:, 0])
        for s in range(segments):
            parts.append(total)
            total = total + state[:, s] if s < state.shape[1] else total
        return torch.stack(parts, 1)

    def later(self, state: Tensor) -> Tensor:
        """What keys get of the queries' moments (K, segments, R, V + 1): the sum over segments after theirs, or all."""
        if not self.is_causal:
            return state.sum(1, keepdim=True)
        segments = triton.cdiv(max(self.k.shape[1], 1), self.length)
        total = state[:, segments:].sum(1)
        parts = []
        for s in reversed(range(segments)):
            parts.append(total)
            total = total + state[:, s] if s < state.shape[1] else total
        return torch.stack(parts[::-1], 1)

    def weight_of_rows(self) -> Tensor:
        """(H, n): weight of the keys that a row meets through the polynomial, those of its own chunk not among them."""
        n, m = self.q.shape[1], self.k.shape[1]
        if not self.is_causal:
            return self.pairs.of_queries(self.light.sum(1, keepdim=True).expand(-1, n)).contiguous()
        before = torch.cat([torch.zeros_like(self.light[:, :1]), self.light.cumsum(1)], 1)
        at = torch.arange(n, device=self.q.device) // self.pairs.chunk * self.pairs.chunk
        return self.pairs.of_queries(before[:, at.clamp(max=m)]).contiguous()


# Launchers ------------------------------------------------------------------------------------------------------------


# On these devices torch's attention is the exact route: the ops are there for whoever calls them by name.
rope_attention_exact_fwd = rope_attention_exact_reference
rope_attention_exact_bwd = rope_attention_exact_backward_reference
rope_attention_norms = rope_attention_norms_reference


def rope_attention_rotate(x: Tensor, cos: Tensor, sin: Tensor, back: bool) -> Tensor:
    """As ``rope_attention_rotate_reference``."""
    x, cos, sin = x if x.stride(3) == 1 else x.contiguous(), cos.contiguous(), sin.contiguous()
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    batch, heads, n, dim = x.shape
    if y.numel():
        with _tiles.device_guard(x):
            rope_rotate_kernel[(triton.cdiv(n, TOKENS), batch * heads)](
                y,
                x,
                cos,
                sin,
                heads,
                n,
                dim,
                *x.stride()[:3],
                cos.stride(0) if cos.shape[0] > 1 else 0,
                cos.shape[2],
                BACK=back,
                BLOCK_D=triton.next_power_of_2(dim),
                TOKENS=TOKENS,
            )
    return y


def rope_attention_fwd(
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
    """As ``rope_attention_reference``, which serves float64, where these kernels have no matrix products."""
    options = (is_causal, degree, contact, leading, chunk)
    if q.dtype == torch.float64:
        return rope_attention_reference(q, k, v, key_bias, table, cu_q, cu_k, *options, rtol)
    if cu_q is not None and cu_k is not None:
        parts = [
            rope_attention_fwd(*piece, None, None, *options, rtol)
            for piece in _sequences(q, k, v, key_bias, table, cu_q, cu_k)
        ]
        if not parts:
            return rope_attention_reference(q, k, v, key_bias, table, cu_q, cu_k, *options, rtol)
        out, normalizer, exact, state = zip(*parts)
        return torch.cat(out, 2), torch.cat(normalizer, 2), torch.cat(exact, 2), torch.cat(state, 0)
    heads, n, width = q.shape[:2], q.shape[2], v.shape[3]
    with _tiles.device_guard(q):
        at = Problem(q, k, v, key_bias, table, *options)
        state = at.moments.moments(at.x, at.values * at.light.unsqueeze(-1), at.length)
        sums = at.moments.apply(at.q, at.earlier(state), at.all_weights, at.query_length)
        for block in blocks(at.pairs):
            values = at.pairs.of_queries(at.values[:, block.keys])
            sums[:, block.rows, : width + 1] += block.a @ values
            sums[:, block.rows, width + 1] += block.d
            if at.extra > 1:
                sums[:, block.rows, width + 2] += block.tail
                sums[:, block.rows, width + 3] += block.square
        out = torch.empty((*at.q.shape[:2], width), dtype=v.dtype, device=q.device)
        normalizer = torch.empty(at.q.shape[:2], dtype=torch.float32, device=q.device)
        flags = torch.empty(at.q.shape[:2], dtype=torch.int8, device=q.device)
        if flags.numel():
            rope_finish_kernel[(triton.cdiv(n, TOKENS), at.q.shape[0])](
                out,
                normalizer,
                flags,
                sums,
                at.mean,
                at.weight_of_rows(),
                at.q.square().sum(-1).sqrt(),
                at.limits,
                rtol,
                n,
                at.pairs.group,
                width,
                EXTRA=at.extra,
                ROUNDING_PARTS=ROUNDING_PARTS,
                BLOCK_V=max(16, triton.next_power_of_2(width)),
                TOKENS=TOKENS,
            )
        exact = flags.bool()
        for head, rows in exact_blocks(exact):
            share, lse = softmax_of(exact_scores(at.pairs, at.bias, head, rows, is_causal))
            out[head, rows] = (share @ at.v[head // at.pairs.group]).to(v.dtype)
            normalizer[head, rows] = lse
        last = torch.cat([at.mean, at.top.unsqueeze(1)], 1)[:, None]
        state = torch.cat([state.sum(1) * at.multiplicity.unsqueeze(-1), last], 1)
    kept = state.unflatten(0, k.shape[:2])
    return out.unflatten(0, heads), normalizer.unflatten(0, heads), exact.unflatten(0, heads), kept


def rope_attention_bwd(
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
    """As ``rope_attention_backward_reference``."""
    options = (is_causal, degree, contact, leading, chunk)
    saved = (out, normalizer, exact_rows)
    if q.dtype == torch.float64 or (cu_q is not None and table.shape[0] == 0):
        return rope_attention_backward_reference(grad, q, k, v, key_bias, table, cu_q, cu_k, *saved, state, *options)
    if cu_q is not None and cu_k is not None:
        ends = cu_q.tolist()
        parts = []
        for number, piece in enumerate(_sequences(q, k, v, key_bias, table, cu_q, cu_k)):
            rows = slice(ends[number], ends[number + 1])
            kept = (x[:, :, rows] for x in saved)
            parts.append(
                rope_attention_bwd(grad[:, :, rows], *piece, None, None, *kept, state[number : number + 1], *options)
            )
        dq, dk, dv, dbias = zip(*parts)
        return (
            torch.cat(dq, 2),
            torch.cat(dk, 2),
            torch.cat(dv, 2),
            grad.new_empty(0) if key_bias is None else torch.cat(dbias, 2),
        )
    with _tiles.device_guard(q):
        at = Problem(q, k, v, key_bias, table, *options)
        pairs = at.pairs
        do, o = (x.float().flatten(0, 1) for x in (grad, out))
        exact, z = exact_rows.flatten(0, 1), normalizer.flatten(0, 1)
        slack = (do * o).sum(-1, keepdim=True)
        # [do, -do.(o - mean)] / Z: what a row's weights gain, of [v - mean, 1].
        mean = pairs.of_queries(at.mean).unsqueeze(1)
        wanted = torch.cat([do, (do * mean).sum(-1, keepdim=True) - slack], -1)
        wanted = torch.where(exact.unsqueeze(-1), 0.0, wanted / z.unsqueeze(-1)).contiguous()
        # Beyond its limit a row is exact, and its monomials may overflow.
        x = torch.where(exact.unsqueeze(-1), 0.0, at.q)
        values = (at.values * at.light.unsqueeze(-1)).contiguous()
        keys = at.earlier(at.moments.moments(at.x, values, at.length))
        dq = at.moments.gradient(x, wanted, keys, at.weights.contiguous(), at.query_length)
        length = at.length if is_causal else TOKENS * max(1, triton.cdiv(q.shape[2], TOKENS * PARTS))
        gained = at.moments.moments(x, wanted, length) * at.weights[:, None, :, None]
        gained = at.later(pairs.of_keys(gained))
        ones = torch.ones((at.k.shape[0], at.weights.shape[1]), dtype=torch.float32, device=q.device)
        key_length = at.length if is_causal else max(k.shape[2], 1)
        dk = at.moments.gradient(at.x, values, gained, ones, key_length)
        read = at.moments.apply(at.x, gained, ones.unsqueeze(1), key_length)
        dv = read[..., :-1] * at.light.unsqueeze(-1)
        dbias = (read * at.values).sum(-1) * at.light
        inner = pairs._replace(q=x)
        for block in blocks(inner):
            row = wanted[:, block.rows]
            pull = row @ pairs.of_queries(at.values[:, block.keys]).mT
            add_gradients(inner, block, pull, dq, dk)
            dv[:, block.keys] += pairs.of_keys(block.a.mT @ row[..., :-1])
            dbias[:, block.keys] += pairs.of_keys((block.a * pull).sum(1, keepdim=True)).squeeze(1)
        for head, rows in exact_blocks(exact):
            share, _ = softmax_of(exact_scores(pairs, at.bias, head, rows, is_causal))
            key_head = head // pairs.group
            ds = share * (do[head, rows] @ at.v[key_head].mT - slack[head, rows])
            dq[head, rows] = ds @ at.k[key_head]
            dk[key_head] += ds.mT @ at.q[head, rows]
            dv[key_head] += share.mT @ do[head, rows]
            dbias[key_head] += ds.sum(0)
    return (
        dq.unflatten(0, q.shape[:2]).to(q.dtype),
        dk.unflatten(0, k.shape[:2]).to(k.dtype),
        dv.unflatten(0, k.shape[:2]).to(v.dtype),
        grad.new_empty(0) if key_bias is None else dbias.unflatten(0, k.shape[:2]).to(key_bias.dtype),
    )


def _sequences(
    q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor | None, table: Tensor, cu_q: Tensor, cu_k: Tensor
) -> list[tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]]:
    rows, keys = cu_q.tolist(), cu_k.tolist()
    pieces = []
    for number, (q0, q1, k0, k1) in enumerate(zip(rows, rows[1:], keys, keys[1:])):
        bias = None if key_bias is None else key_bias[:, :, k0:k1]
        pieces.append((q[:, :, q0:q1], k[:, :, k0:k1], v[:, :, k0:k1], bias, table[number : number + 1]))
    return pieces


def _aot_finish(dtype: str, values: int, extra: int) -> tuple[object, ...]:
    types = dict.fromkeys(("normalizer", "sums", "mean", "weight", "q_norm", "limits"), "*fp32")
    types |= {"out": f"*{dtype}", "exact": "*i8", "rtol": "fp32", "n": "i32", "group": "i32", "V": "i32"}
    constants = {"EXTRA": extra, "ROUNDING_PARTS": ROUNDING_PARTS, "BLOCK_V": values, "TOKENS": TOKENS}
    return _tiles.ahead_of_time(rope_finish_kernel, types, constants, 4)


def _aot_rotate(dtype: str, size: int) -> tuple[object, ...]:
    types = dict.fromkeys(("cos", "sin"), "*fp32") | dict.fromkeys(("y", "x"), f"*{dtype}")
    types |= dict.fromkeys(("heads", "n", "D", "stride_b", "stride_h", "stride_n", "table_b", "turning"), "i32")
    constants = {"BACK": True, "BLOCK_D": size, "TOKENS": TOKENS}
    return _tiles.ahead_of_time(rope_rotate_kernel, types, constants, 4)


AOT = [_aot_finish("fp32", 64, 1), _aot_finish("bf16", 16, 3), _aot_finish("fp16", 128, 1)]
AOT += [_aot_rotate("fp32", 64), _aot_rotate("bf16", 128)]
