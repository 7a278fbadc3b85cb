"""Triton kernel of vas_score. Sums of outer products are plain products, which torch's BLAS does; in float64 and on
integers, as the second moment needs it, any order of the sum gives the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmkern.kernels._pairs import load_rows, pair_tile, pairs_entry
from llmkern.kernels._tiles import architecture, device_guard, unit_stride
from llmkern.ops.vas_score.moment import second_moment_sum_reference as second_moment_sum  # noqa: F401
from llmkern.ops.vas_score.score import gram_reference as gram  # noqa: F401
from llmkern.ops.vas_score.score import vas_score_backward_reference as vas_score_bwd  # noqa: F401
from llmkern.ops.vas_score.score import vas_score_reference
from llmkern.ops.vas_score.screen import vas_screen_reference as vas_screen  # noqa: F401


@triton.jit
def vas_score_fwd_kernel(
    out,
    left,
    right,
    sigma,
    n,
    left_stride,
    right_stride,
    D,
    TRIANGLE: tl.constexpr,
    BF16: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """sum_j (sum_k x_k sigma_kj) y_j of BLOCK_N rows; sigma (D, D) is zero for k > j where TRIANGLE."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_N,), tl.float32)
    for j in range(0, D, BLOCK_M):
        columns = j + tl.arange(0, BLOCK_M)
        z = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        for k in range(0, tl.minimum(D, j + BLOCK_M) if TRIANGLE else D, BLOCK_D):
            steps = k + tl.arange(0, BLOCK_D)
            a = load_rows(left, rows, n, left_stride, k, D, BLOCK_D)
            inside = (steps < D)[:, None] & (columns < D)[None, :]
            b = tl.load(sigma + steps[:, None] * D + columns[None, :], inside, other=0.0)
            if BF16:
                z = tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16), z, input_precision="ieee")
            else:
                z = tl.dot(a.to(tl.float32), b, z, input_precision="ieee")
        y = load_rows(right, rows, n, right_stride, j, D, BLOCK_M)
        if BF16:
            y = y.to(tl.bfloat16)
        total += tl.sum(z * y.to(tl.float32), 1)
    tl.store(out + rows, total, rows < n)


def vas_score_fwd(x: Tensor, sigma: Tensor, y: Tensor | None, bf16: bool) -> Tensor:
    """As ``vas_score_reference``."""
    if x.dtype == torch.float64 or len(x) == 0:
        return vas_score_reference(x, sigma, y, bf16)
    with device_guard(x):
        left, out = unit_stride(x), torch.empty(len(x), dtype=torch.float32, device=x.device)
        right = left if y is None else unit_stride(y)
        # Rounding to bf16 comes before the fold would, so that case takes the whole matrix.
        triangle = y is None and not bf16
        matrix = (sigma.triu() + sigma.tril(-1).t()) if triangle else sigma
        tile = pair_tile(x, architecture(x))
        vas_score_fwd_kernel[(triton.cdiv(len(x), tile["BLOCK_N"]),)](
            out,
            left,
            right,
            matrix.contiguous(),
            len(x),
            left.stride(0),
            right.stride(0),
            x.shape[1],
            TRIANGLE=triangle,
            BF16=bf16,
            **tile,
        )
    return out


_TYPES = {"out": "*fp32", "sigma": "*fp32"}

AOT = [
    pairs_entry(vas_score_fwd_kernel, "fp16", _TYPES, {"TRIANGLE": True}),
    pairs_entry(vas_score_fwd_kernel, "fp32", _TYPES, {"TRIANGLE": True}),
    pairs_entry(vas_score_fwd_kernel, "bf16", _TYPES, {"TRIANGLE": False}),
    pairs_entry(vas_score_fwd_kernel, "fp16", _TYPES, {"TRIANGLE": False, "BF16": True}),
]
