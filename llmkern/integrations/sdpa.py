"""``llmkern.rope_attention`` under the signature of ``torch.nn.functional.scaled_dot_product_attention``."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from llmkern._library import bad_value
from llmkern.ops.rope_attention import rope_attention
from llmkern.ops.rope_attention.arguments import DTYPES, MAX_HEAD_DIM

NAME = "scaled_dot_product_attention"


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    rtol: float = 1e-2,
    method: str = "auto",
) -> Tensor:
    r"""Attention that is as fast as its scores allow: torch's function, with a certified error where that is faster.

    .. math::  o_i = \sum_j \mathrm{softmax}_j(\mathrm{scale}\, q_i \cdot k_j) v_j

    Arguments, shapes, dtypes and gradients are those of ``torch.nn.functional.scaled_dot_product_attention``; heads are
    (B, H, N, D), or (B, N, D) for one. ``rtol`` and ``method`` are those of ``llmkern.rope_attention``: each row of the
    result errs by at most rtol max_j |v_j - o_i|, or is exact. Exact, by torch's own kernel, is in any case what
    rope_attention does not take: dropout, masks other than one over keys alone (bool, of size 1 in heads and rows),
    single queries, other layouts and head sizes above 256. With ``method="polynomial"`` those are refused.
    """
    reason = only_exact(query, key, value, attn_mask, dropout_p, is_causal, enable_gqa)
    if reason is None:
        heads = [x if x.dim() == 4 else x.unsqueeze(1) for x in (query, key, value)]
        out = rope_attention(
            *heads,
            is_causal=is_causal,
            scale=scale,
            enable_gqa=enable_gqa,
            rtol=rtol,
            method=method,
            key_mask=None if attn_mask is None else attn_mask[:, 0, 0].expand(heads[1].shape[0], heads[1].shape[2]),
        )
        return out if query.dim() == 4 else out.squeeze(1)
    if method == "polynomial":
        raise bad_value(NAME, "attention that rope_attention takes, with method='polynomial'", reason, "use 'auto'")
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )


def only_exact(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    enable_gqa: bool,
) -> str | None:
    """Why torch's own kernel is to serve, bad input included, which it then refuses itself; None where it need not."""
    if dropout_p:
        return f"dropout_p={dropout_p:g}"
    shapes = [tuple(x.shape) for x in (query, key, value)]
    rank = len(shapes[0])
    if rank not in (3, 4) or any(len(shape) != rank or shape[0] != shapes[0][0] for shape in shapes):
        return f"tensors of shapes {', '.join(map(str, shapes))}"
    if shapes[0][-2] == 1:
        return "a single query"
    if any(x.dtype not in DTYPES or x.dtype != query.dtype for x in (query, key, value)):
        return f"tensors of {query.dtype}, {key.dtype} and {value.dtype}"
    if not all(1 <= x.shape[-1] <= MAX_HEAD_DIM for x in (query, value)) or shapes[0][-1] != shapes[1][-1]:
        return f"head sizes {', '.join(str(shape[-1]) for shape in shapes)}"
    if shapes[1][:-1] != shapes[2][:-1]:
        return f"keys of shape {shapes[1]} and values of shape {shapes[2]}"
    if rank == 4 and shapes[0][1] != shapes[1][1] and not (enable_gqa and shapes[1][1]):
        return f"{shapes[0][1]} heads of queries and {shapes[1][1]} of keys"
    if attn_mask is None:
        return None
    if is_causal or attn_mask.dtype != torch.bool or rank != 4 or attn_mask.dim() != 4:
        return f"attn_mask of {attn_mask.dtype} and shape {tuple(attn_mask.shape)} with is_causal={is_causal}"
    if (
        attn_mask.shape[1:3] != (1, 1)
        or attn_mask.shape[3] != shapes[1][2]
        or attn_mask.shape[0]
        not in (
            1,
            shapes[0][0],
        )
    ):
        return f"attn_mask of shape {tuple(attn_mask.shape)}"
    return None
