"""Triton kernels of toeplitz_attention with a bias table.

forward    tiles of rows run over keys, the bias of each pair read from the table: output and log-sum-exp
backward   tiles of rows -> dq; tiles of keys -> dk, dv; block diagonals of the score matrix -> gradient of the table:
           all tiles of one block diagonal add to the same distances, so that their sum needs no atomic addition, and
           no result depends on the order of programs

A RelativeMatrix, float64, and heads beyond 128 entries are served by the references.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from llmkern.kernels import _tiles
from llmkern.kernels._tiles import INF
from llmkern.ops.toeplitz_attention.fourier import fourier_backward_reference, fourier_reference
from llmkern.ops.toeplitz_attention.reference import toeplitz_exact_backward_reference, toeplitz_exact_reference

LARGEST_HEAD = 128

# Transforms are cuFFT's, through torch.fft.
toeplitz_fourier_fwd, toeplitz_fourier_bwd = fourier_reference, fourier_backward_reference


@triton.jit
def load_tile(base, tokens, n, width, BLOCK: tl.constexpr):
    """(tokens, BLOCK) of contiguous rows of ``width``, zero outside."""
    columns = tl.arange(0, BLOCK)
    live = (tokens < n)[:, None] & (columns < width)[None, :]
    return tl.load(base + tokens[:, None] * width + columns[None, :], live, other=0.0)


@triton.jit
def store_tile(base, x, tokens, n, width, BLOCK: tl.constexpr):
    columns = tl.arange(0, BLOCK)
    live = (tokens < n)[:, None] & (columns < width)[None, :]
    tl.store(base + tokens[:, None] * width + columns[None, :], x.to(base.dtype.element_ty), live)


@triton.jit
def logits(q, k, rows, keys, n, m, table, centre, key_bias, scale, CAUSAL: tl.constexpr, MASKED: tl.constexpr):
    """(rows, keys) scores with their bias, -inf where a key is not seen."""
    s = scale * tl.dot(q, tl.trans(k), input_precision="ieee")
    seen = (rows < n)[:, None] & (keys < m)[None, :]
    s += tl.load(table + (centre + rows[:, None] - keys[None, :]), seen, other=0.0)
    if MASKED:
        s += tl.load(key_bias + keys, keys < m, other=0.0)[None, :]
    if CAUSAL:
        seen = seen & (keys[None, :] <= rows[:, None])
    return tl.where(seen, s, -INF)


@triton.jit
def shares(s, lse):
    """exp(s - lse), zero in a row that sees no key."""
    return tl.where((s == -INF) | (lse == -INF)[:, None], 0.0, tl.exp(s - lse[:, None]))


@triton.jit
def toeplitz_forward_kernel(
    out,
    lse,
    q,
    k,
    v,
    table,
    key_bias,
    scale,
    n,
    m,
    D,
    V,
    heads,
    group,
    distances,
    CAUSAL: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    rows, head = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.program_id(1).to(tl.int64)
    key_head, batch = head // group, head // heads
    x = load_tile(q + head * n * D, rows, n, D, BLOCK_D)
    at_table, at_bias = table + (head % heads) * distances, key_bias + batch * m
    top = tl.full((BLOCK,), -INF, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    sums = tl.zeros((BLOCK, BLOCK_V), tl.float32)
    end = tl.minimum(m, (tl.program_id(0) + 1) * BLOCK) if CAUSAL else m
    for begin in range(0, end, BLOCK):
        keys = begin + tl.arange(0, BLOCK)
        y = load_tile(k + key_head * m * D, keys, m, D, BLOCK_D)
        s = logits(x, y, rows, keys, n, m, at_table, (distances - 1) // 2, at_bias, scale, CAUSAL, MASKED)
        highest = tl.maximum(top, tl.max(s, 1))
        base = tl.where(highest == -INF, 0.0, highest)
        shrink, p = tl.exp(top - base), tl.exp(s - base[:, None])
        values = load_tile(v + key_head * m * V, keys, m, V, BLOCK_V)
        total = total * shrink + tl.sum(p, 1)
        sums = tl.dot(p.to(values.dtype), values, sums * shrink[:, None], input_precision="ieee")
        top = highest
    # NaN stays NaN: only a row that sees no key has nothing to divide.
    o = sums / tl.where(total == 0, 1.0, total)[:, None]
    store_tile(out + head * n * V, o, rows, n, V, BLOCK_V)
    tl.store(lse + head * n + rows, top + tl.log(total), rows < n)


@triton.jit
def toeplitz_query_kernel(
    dq,
    grad,
    q,
    k,
    v,
    table,
    key_bias,
    lse,
    slack,
    scale,
    n,
    m,
    D,
    V,
    heads,
    group,
    distances,
    CAUSAL: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    rows, head = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.program_id(1).to(tl.int64)
    key_head, batch = head // group, head // heads
    x = load_tile(q + head * n * D, rows, n, D, BLOCK_D)
    g = load_tile(grad + head * n * V, rows, n, V, BLOCK_V)
    row_lse = tl.load(lse + head * n + rows, rows < n, other=0.0)
    row_slack = tl.load(slack + head * n + rows, rows < n, other=0.0)
    at_table, at_bias = table + (head % heads) * distances, key_bias + batch * m
    sums = tl.zeros((BLOCK, BLOCK_D), tl.float32)
    end = tl.minimum(m, (tl.program_id(0) + 1) * BLOCK) if CAUSAL else m
    for begin in range(0, end, BLOCK):
        keys = begin + tl.arange(0, BLOCK)
        y = load_tile(k + key_head * m * D, keys, m, D, BLOCK_D)
        values = load_tile(v + key_head * m * V, keys, m, V, BLOCK_V)
        s = logits(x, y, rows, keys, n, m, at_table, (distances - 1) // 2, at_bias, scale, CAUSAL, MASKED)
        pull = tl.dot(g, tl.trans(values), input_precision="ieee") - row_slack[:, None]
        ds = shares(s, row_lse) * pull
        sums = tl.dot(ds.to(y.dtype), y, sums, input_precision="ieee")
    store_tile(dq + head * n * D, scale * sums, rows, n, D, BLOCK_D)


@triton.jit
def toeplitz_key_kernel(
    dk,
    dv,
    grad,
    q,
    k,
    v,
    table,
    key_bias,
    lse,
    slack,
    scale,
    n,
    m,
    D,
    V,
    heads,
    group,
    distances,
    CAUSAL: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """dk (H, m, D) and dv (H, m, V) of each head of queries."""
    keys, head = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.program_id(1).to(tl.int64)
    key_head, batch = head // group, head // heads
    y = load_tile(k + key_head * m * D, keys, m, D, BLOCK_D)
    values = load_tile(v + key_head * m * V, keys, m, V, BLOCK_V)
    at_table, at_bias = table + (head % heads) * distances, key_bias + batch * m
    sums_k = tl.zeros((BLOCK, BLOCK_D), tl.float32)
    sums_v = tl.zeros((BLOCK, BLOCK_V), tl.float32)
    first = tl.program_id(0) * BLOCK if CAUSAL else 0
    for begin in range(first, n, BLOCK):
        rows = begin + tl.arange(0, BLOCK)
        x = load_tile(q + head * n * D, rows, n, D, BLOCK_D)
        g = load_tile(grad + head * n * V, rows, n, V, BLOCK_V)
        s = logits(x, y, rows, keys, n, m, at_table, (distances - 1) // 2, at_bias, scale, CAUSAL, MASKED)
        p = shares(s, tl.load(lse + head * n + rows, rows < n, other=0.0))
        row_slack = tl.load(slack + head * n + rows, rows < n, other=0.0)
        ds = p * (tl.dot(g, tl.trans(values), input_precision="ieee") - row_slack[:, None])
        sums_k = tl.dot(tl.trans(ds.to(x.dtype)), x, sums_k, input_precision="ieee")
        sums_v = tl.dot(tl.trans(p.to(g.dtype)), g, sums_v, input_precision="ieee")
    store_tile(dk + head * m * D, scale * sums_k, keys, m, D, BLOCK_D)
    store_tile(dv + head * m * V, sums_v, keys, m, V, BLOCK_V)


@triton.jit
def toeplitz_table_kernel(
    sums,
    grad,
    q,
    k,
    v,
    table,
    key_bias,
    lse,
    slack,
    scale,
    n,
    m,
    D,
    V,
    heads,
    group,
    distances,
    lowest,
    batches,
    CAUSAL: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """sums (heads, block diagonals, BLOCK, BLOCK): the sum of ds over the tiles of a block diagonal, and over batches;
    the first of them has rows lowest BLOCK (below zero) after its keys."""
    offset = (lowest + tl.program_id(0)) * BLOCK
    head = tl.program_id(1).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    first = tl.maximum(0, -offset)
    for batch in range(0, batches):
        query_head = batch * heads + head
        key_head = query_head // group
        at_table, at_bias = table + head * distances, key_bias + batch * m
        for begin in range(first, tl.minimum(m, n - offset), BLOCK):
            rows, keys = offset + begin + lanes, begin + lanes
            x = load_tile(q + query_head * n * D, rows, n, D, BLOCK_D)
            y = load_tile(k + key_head * m * D, keys, m, D, BLOCK_D)
            g = load_tile(grad + query_head * n * V, rows, n, V, BLOCK_V)
            values = load_tile(v + key_head * m * V, keys, m, V, BLOCK_V)
            s = logits(x, y, rows, keys, n, m, at_table, (distances - 1) // 2, at_bias, scale, CAUSAL, MASKED)
            p = shares(s, tl.load(lse + query_head * n + rows, rows < n, other=0.0))
            row_slack = tl.load(slack + query_head * n + rows, rows < n, other=0.0)
            total += p * (tl.dot(g, tl.trans(values), input_precision="ieee") - row_slack[:, None])
    at = sums + (head * tl.num_programs(0) + tl.program_id(0)) * BLOCK * BLOCK
    tl.store(at + lanes[:, None] * BLOCK + lanes[None, :], total)


def distances_of(sums: Tensor, lowest: int, centre: int, count: int) -> Tensor:
    """(heads, block diagonals, n, n) tiles -> (heads, count): sums along diagonals, entry i - j + centre."""
    size = sums.shape[3]
    # With columns turned round, entry (r, c) is for distance r + c + 1 - size; a row longer by one puts r + c in line.
    skewed = F.pad(sums.flip(3), (0, size)).flatten(2)[..., : size * (2 * size - 1)]
    lines = skewed.unflatten(2, (size, 2 * size - 1)).sum(2)
    low, high = lines[..., :size], F.pad(lines[..., size:], (0, 1))
    total = F.pad(low, (0, 0, 0, 1)) + F.pad(high, (0, 0, 1, 0))
    first = lowest * size + 1 - size + centre
    total = total.flatten(1)
    before, after = max(0, -first), max(0, first + total.shape[1] - count)
    total = total[:, before : total.shape[1] - after]
    first = max(0, first)
    return F.pad(total, (first, count - first - total.shape[1]))


class _Call:
    """Tensors of one call by head, contiguous, and the launch arguments that all kernels share."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, relative: Tensor, key_bias: Tensor | None, is_causal: bool, scale: float
    ) -> None:
        self.q, self.k, self.v = (x.contiguous() for x in (q, k, v))
        self.table = relative[:, 0].float().contiguous()
        self.bias = self.table if key_bias is None else key_bias.float().contiguous()
        batch, self.heads, self.n, dim = q.shape
        self.m, value_dim = k.shape[2], v.shape[3]
        self.programs = batch * self.heads
        self.sizes = (self.n, self.m, dim, value_dim, self.heads, self.heads // k.shape[1], self.table.shape[1])
        self.scale = scale
        width, size = max(dim, value_dim), q.element_size()
        self.block = block_for(width, size, _tiles.architecture(q))
        self.constants = {
            "CAUSAL": is_causal,
            "MASKED": key_bias is not None,
            "BLOCK": self.block,
            "BLOCK_D": max(16, triton.next_power_of_2(dim)),
            "BLOCK_V": max(16, triton.next_power_of_2(value_dim)),
            "num_warps": warps_for(width, size),
            "num_stages": STAGES,
        }

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        return self.q, self.k, self.v, self.table, self.bias

    def tiles(self, tokens: int) -> int:
        return triton.cdiv(tokens, self.block)


# Chosen ahead of time, by registers and shared memory; no such machine has measured them yet.
STAGES = 1


def block_for(width: int, element_size: int, architecture: str) -> int:
    """Rows and keys of a tile; larger ones would spill on sm_80 and gfx942."""
    return 64 if width <= 64 and element_size == 2 and architecture == "sm_90" else 32


def warps_for(width: int, element_size: int) -> int:
    return 8 if width > 64 or element_size == 2 else 4


def _served(q: Tensor, k: Tensor, v: Tensor, support: Tensor | None) -> bool:
    return (
        support is None
        and q.dtype != torch.float64
        and q.dtype == v.dtype
        and max(q.shape[3], v.shape[3]) <= LARGEST_HEAD
        and min(q.numel(), k.numel()) > 0
    )


def toeplitz_exact_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    relative: Tensor,
    support: Tensor | None,
    key_bias: Tensor | None,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """As ``toeplitz_exact_reference``."""
    if not _served(q, k, v, support):
        return toeplitz_exact_reference(q, k, v, relative, support, key_bias, is_causal, scale)
    with _tiles.device_guard(q):
        call = _Call(q, k, v, relative, key_bias, is_causal, scale)
        out = q.new_empty((*q.shape[:3], v.shape[3]), dtype=torch.float32)
        lse = q.new_empty(q.shape[:3], dtype=torch.float32)
        grid = (call.tiles(call.n), call.programs)
        toeplitz_forward_kernel[grid](out, lse, *call.inputs, scale, *call.sizes, **call.constants)
    return out, lse


def toeplitz_exact_bwd(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    relative: Tensor,
    support: Tensor | None,
    key_bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    is_causal: bool,
    scale: float,
    want_relative: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As ``toeplitz_exact_backward_reference``."""
    if not _served(q, k, v, support):
        return toeplitz_exact_backward_reference(
            grad, q, k, v, relative, support, key_bias, out, lse, is_causal, scale, want_relative
        )
    with _tiles.device_guard(q):
        call = _Call(q, k, v, relative, key_bias, is_causal, scale)
        slack = (grad.float() * out).sum(-1)
        grad = grad.to(v.dtype).contiguous()
        common = (grad, *call.inputs, lse.contiguous(), slack, scale, *call.sizes)
        dq = torch.empty_like(call.q)
        dk = q.new_empty((*q.shape[:2], k.shape[2], k.shape[3]), dtype=torch.float32)
        dv = q.new_empty((*q.shape[:2], v.shape[2], v.shape[3]), dtype=torch.float32)
        toeplitz_query_kernel[(call.tiles(call.n), call.programs)](dq, *common, **call.constants)
        toeplitz_key_kernel[(call.tiles(call.m), call.programs)](dk, dv, *common, **call.constants)
        drelative = relative.new_empty(0)
        if want_relative:
            lowest = 0 if is_causal else 1 - call.tiles(call.m)
            diagonals = call.tiles(call.n) - lowest
            sums = q.new_empty((call.heads, diagonals, call.block, call.block), dtype=torch.float32)
            toeplitz_table_kernel[(diagonals, call.heads)](sums, *common, lowest, q.shape[0], **call.constants)
            count = relative.shape[2]
            drelative = distances_of(sums, lowest, (count - 1) // 2, count).unsqueeze(1).to(relative.dtype)
    dk, dv = (x.unflatten(1, (k.shape[1], -1)).sum(2) for x in (dk, dv))
    return dq, dk.to(k.dtype), dv.to(v.dtype), drelative


def _aot(kernel: object, dtype: str, dim: int, causal: bool, masked: bool, *targets: str) -> tuple[object, ...]:
    types = dict.fromkeys(("q", "k", "v", "grad", "dq"), f"*{dtype}")
    types |= dict.fromkeys(("out", "lse", "table", "key_bias", "slack", "sums", "dk", "dv"), "*fp32")
    types |= dict.fromkeys(("n", "m", "D", "V", "heads", "group", "distances", "lowest", "batches"), "i32")
    size = 4 if dtype == "fp32" else 2
    block = block_for(dim, size, targets[0])
    constants = {"CAUSAL": causal, "MASKED": masked, "BLOCK": block, "BLOCK_D": dim, "BLOCK_V": dim}
    entry = _tiles.ahead_of_time(kernel, {**types, "scale": "fp32"}, constants, warps_for(dim, size))
    return (*entry[:4], STAGES, targets)


_KERNELS = (toeplitz_forward_kernel, toeplitz_query_kernel, toeplitz_key_kernel, toeplitz_table_kernel)
# Beside the usual size the kernel with the most registers in the widest ones, where registers are fewest.
AOT = [
    *(_aot(kernel, "bf16", 64, False, True, "sm_90") for kernel in _KERNELS),
    *(_aot(kernel, "bf16", 64, True, False, "sm_80", "gfx942") for kernel in _KERNELS),
    _aot(toeplitz_key_kernel, "fp32", 64, True, False, "sm_80"),
    _aot(toeplitz_key_kernel, "fp16", 128, True, False, "sm_80"),
]
