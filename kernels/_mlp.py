"""What the kernels of shared_lora_mlp share: tiles of weights, plain or packed, low-rank products, activations, sizes.

A weight of the base is (data, scales, channel stride, position stride, group), channels along the inner size and
positions along the hidden one whatever its layout. A low-rank correction is (low, factor, rank, rank stride, column
stride, scaling), low (n, rank). Strides are in entries; of what is absent the rank is zero and no pointer is read.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from llmkern.kernels._pairs import load_rows
from llmkern.kernels._tiles import architecture

# (architecture, bytes an element of x, whether tokens are few, whether weights have scales): tokens, columns, depth of
# a step, warps, stages. Chosen ahead of time, by registers and shared memory; no such machine has measured them yet.
MLP_TILES = {
    (architecture, size, few, scaled): tile
    for architecture in ("sm_80", "sm_90", "gfx942")
    for size, few, scaled, tile in (
        (2, True, False, (16, 32, 64, 4, 3)),
        (2, True, True, (16, 32, 32, 4, 2)),
        (2, False, False, (64, 64, 32, 8, 2)),
        (2, False, True, (64, 32, 32, 8, 2)),
        (4, True, False, (16, 32, 32, 4, 2)),
        (4, True, True, (16, 32, 16, 4, 2)),
        (4, False, False, (64, 32, 32, 8, 2)),
        (4, False, True, (64, 32, 32, 8, 2)),
    )
}
FEW_TOKENS = 16


def mlp_tile(x: torch.Tensor, bits: int) -> dict[str, int]:
    """Sizes as launch arguments."""
    return _arguments(MLP_TILES[architecture(x), x.element_size(), x.shape[0] <= FEW_TOKENS, bits in (4, 8)])


def _arguments(tile: tuple[int, ...]) -> dict[str, int]:
    n, m, depth, warps, stages = tile
    return {"BLOCK_N": n, "BLOCK_M": m, "BLOCK_K": depth, "num_warps": warps, "num_stages": stages}


@triton.jit
def base_tile(base, channels, positions, inner, hidden, BITS: tl.constexpr, DTYPE: tl.constexpr):
    """Weights at channels x positions, index tensors that broadcast, in DTYPE; zero outside of (inner, hidden).

    BITS is zero for a plain weight. Packed ones (see ops/shared_lora_mlp/packed.py) are rounded to DTYPE once, after
    the scale.
    """
    data, scales, channel_stride, position_stride, group = base
    live = (channels < inner) & (positions < hidden)
    if BITS == 0:
        return tl.load(data + channels * channel_stride + positions * position_stride, live, other=0.0)
    row = channels * channel_stride
    if BITS == 16:
        return tl.load(data + row + positions, live, other=0.0).to(DTYPE)
    if BITS == 4:
        at = row // 2 + positions // 32 * 16 + positions % 4 * 4 + positions % 32 // 8
        nibble = (tl.load(data + at, live, other=0).to(tl.int32) >> (positions // 4 % 2 * 4)) & 15
        q = (nibble ^ 8) - 8
    else:
        q = tl.load(data + row + positions, live, other=0)
    scale = tl.load(scales + row // group + positions // group, live, other=0.0)
    return (q.to(tl.float32) * scale.to(tl.float32)).to(DTYPE)


@triton.jit
def low_rank_tile(lora, rows, columns, n, m, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """scaling low factor at BLOCK_N rows and BLOCK_M columns, in fp32."""
    low, factor, rank, rank_stride, column_stride, scaling = lora
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for k in range(0, rank, BLOCK_K):
        steps = k + tl.arange(0, BLOCK_K)
        a = load_rows(low, rows, n, rank, k, rank, BLOCK_K)
        inside = (steps < rank)[:, None] & (columns < m)[None, :]
        b = tl.load(factor + steps[:, None] * rank_stride + columns[None, :] * column_stride, inside, other=0.0)
        total = tl.dot(a, b, total, input_precision="ieee")
    return scaling * total


@triton.jit
def activated(e, ACTIVATION: tl.constexpr):
    """The activation and its slope."""
    if ACTIVATION == "relu":
        # NaN stays NaN.
        return tl.where(e <= 0, 0.0, e), tl.where(e > 0, 1.0, 0.0)
    if ACTIVATION == "gelu":
        below = 0.5 * (1.0 + tl.erf(e * 0.7071067811865476))
        return e * below, below + e * tl.exp(-0.5 * e * e) * 0.3989422804014327
    if ACTIVATION == "silu":
        s = tl.sigmoid(e)
        return e * s, s * (1.0 + e * (1.0 - s))
    # 0.5 (1 + tanh u) = sigmoid(2 u), u = sqrt(2 / pi) (e + 0.044715 e^3)
    s = tl.sigmoid(1.5957691216057308 * e * (1.0 + 0.044715 * e * e))
    return e * s, s + e * s * (1.0 - s) * 1.5957691216057308 * (1.0 + 0.134145 * e * e)


def mlp_entry(kernel: Any, storage: str, *, few: bool = False, bits: int = 0, **changed: Any) -> tuple[Any, ...]:
    """Entry of an AOT list: x as ``storage``, weights of so many bits (0: plain); ``changed`` constants."""
    sizes = _arguments(MLP_TILES["sm_80", {"fp16": 2, "bf16": 2, "fp32": 4}[storage], few, bits in (4, 8)])
    x = f"*{storage}"
    base = ({0: x, 16: "*bf16", 8: "*i8", 4: "*u8"}[bits], "*bf16", "i64", "i64", "i64")
    lora = (x, x, "i64", "i64", "i64", "fp32")
    types: dict[str, Any] = {
        **dict.fromkeys(("h", "kept", "x", "dy", "de", "dg", "out", "left", "left2"), x),
        **dict.fromkeys(("gate", "up", "down", "base", "base2"), base),
        **dict.fromkeys(("lora_gate", "lora_up", "lora_down", "lora", "lora2"), lora),
        **dict.fromkeys(("mask", "mask2"), "*u8"),
        **dict.fromkeys(("n", "inner", "hidden", "x_stride", "dy_stride"), "i64"),
    }
    values = {**sizes, "BITS": bits, "ACTIVATION": "silu", "GATED": True, "KEPT": False, "PARTS": 2, **changed}
    signature = {name: "constexpr" if name in changed else types.get(name, "constexpr") for name in kernel.arg_names}
    constexprs = {name: values[name] for name, kind in signature.items() if kind == "constexpr"}
    return kernel, signature, constexprs, sizes["num_warps"], sizes["num_stages"]
