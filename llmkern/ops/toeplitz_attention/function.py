"""The public function of attention with relative positions."""

from __future__ import annotations

from torch import Tensor

from llmkern.ops.toeplitz_attention.arguments import check_arguments
from llmkern.ops.toeplitz_attention.exact import exact_attention
from llmkern.ops.toeplitz_attention.relative import Relative


def toeplitz_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    relative: Relative,
    is_causal: bool = False,
    scale: float | None = None,
    rtol: float = 1e-2,
    method: str = "auto",
    key_mask: Tensor | None = None,
) -> Tensor:
    r"""Softmax attention with relative positions, without a mask of N x M numbers forward or backward.

    .. math::  o_i = \sum_j e^{s_{ij}} v_j / \sum_j e^{s_{ij}}, \qquad
               s_{ij} = scale \; q_i \cdot k_j + b_{i-j} \quad\text{or}\quad scale \; q_i^T W_{i-j} k_j

    Args:
        q, k, v: (B, Hq, N, D), (B, Hkv, M, D), (B, Hkv, M, Dv), Hkv dividing Hq; float32, bfloat16, float16 (computed
            in float32) or float64; any strides, D and Dv up to 256.
        relative: a ``RelativeBias`` (T5, ALiBi, any table) or a ``RelativeMatrix``, for at least max(N, M) tokens.
        is_causal: row i sees keys j <= i, counted from the first key, as in torch.
        scale: of q.k or q^T W k, by default 1 / sqrt(D); T5 has 1.
        key_mask: (B, M) bool, True where a key takes part. A row that sees no key is zero.

    Returns:
        (B, Hq, N, Dv) in the dtype of v.

    Raises:
        ValueError, TypeError: arguments that do not fit.

    Differentiable once in q, k, v and the table or matrix. It saves these, the result and one number a row.
    """
    args = check_arguments("toeplitz_attention", q, k, v, relative, is_causal, scale, rtol, method, key_mask)
    return exact_attention(args)
