"""What kernels over pairs of rows share: a tile of similarities, its sizes, and entries of AOT lists."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

# (architecture, bytes an element of a row): left rows, right rows, depth of a step, warps, stages. Chosen ahead of
# time, by registers and shared memory; no such machine has measured them yet. Two stages of narrow rows would spill on
# sm_80.
PAIR_TILES = {
    (architecture, size): (64, 32, 32, 8, size // 2) for architecture in ("sm_80", "sm_90", "gfx942") for size in (2, 4)
}


def pair_tile(x: torch.Tensor, architecture: str) -> dict[str, int]:
    """Sizes as launch arguments."""
    n, m, depth, warps, stages = PAIR_TILES[architecture, x.element_size()]
    return {"BLOCK_N": n, "BLOCK_M": m, "BLOCK_D": depth, "num_warps": warps, "num_stages": stages}


@triton.jit
def load_rows(base, rows, n, stride, k, D, BLOCK_D: tl.constexpr):
    """(rows, BLOCK_D) of a matrix with contiguous rows, zero outside of it."""
    columns = k + tl.arange(0, BLOCK_D)
    live = (rows < n)[:, None] & (columns < D)[None, :]
    return tl.load(base + rows[:, None] * stride + columns[None, :], live, other=0.0)


@triton.jit
def similarity_tile(
    left,
    right,
    rows,
    columns,
    n,
    m,
    left_stride,
    right_stride,
    D,
    BF16: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Products of left rows and right rows, in fp32."""
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for k in range(0, D, BLOCK_D):
        a = load_rows(left, rows, n, left_stride, k, D, BLOCK_D)
        b = load_rows(right, columns, m, right_stride, k, D, BLOCK_D)
        if BF16:
            a = a.to(tl.bfloat16)
            b = b.to(tl.bfloat16)
        total = tl.dot(a, tl.trans(b), total, input_precision="ieee")
    return total


def pairs_entry(
    kernel: Any, storage: str, types: dict[str, str], constants: dict[str, Any] | None = None
) -> tuple[Any, ...]:
    """Entry of an AOT list: rows stored as ``storage``; types and constants beyond those of all kernels over pairs."""
    size = {"fp16": 2, "bf16": 2, "fp32": 4}[storage]
    n, m, depth, warps, stages = PAIR_TILES["sm_80", size]
    integers = dict.fromkeys(("n", "m", "D", "left_stride", "right_stride", "offset"), "i64")
    known = {"left": f"*{storage}", "right": f"*{storage}", **integers, **types}
    values = {"BLOCK_N": n, "BLOCK_M": m, "BLOCK_D": depth, "BF16": False, **(constants or {})}
    signature = {name: known.get(name, "constexpr") for name in kernel.arg_names}
    constexprs = {name: values[name] for name, kind in signature.items() if kind == "constexpr"}
    return kernel, signature, constexprs, warps, stages
