"""What rope_attention and plan_attention accept, in one form; refusal of the rest."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from llmkern._library import bad_type, bad_value
from llmkern.ops.rope_attention.rotary import Rotary

METHODS = ("auto", "exact", "polynomial")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MAX_HEAD_DIM = 256


class Arguments(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    key_mask: Tensor | None
    cu_q: Tensor | None
    cu_k: Tensor | None


def check_arguments(
    op: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rotary: Rotary | None,
    scale: float | None,
    enable_gqa: bool,
    rtol: float,
    method: str,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | tuple[Tensor, Tensor] | None,
) -> Arguments:
    """Checked, with rotary applied; nothing here reads the data."""
    check_tensors(op, q, k, v, enable_gqa)
    if not rtol > 0:
        raise bad_value(op, "rtol above 0", rtol, "1e-2 is the default, method='exact' has no error")
    if method not in METHODS:
        raise bad_value(op, f"method as one of {', '.join(METHODS)}", repr(method))
    if key_mask is not None:
        if key_mask.dtype != torch.bool:
            raise bad_type(op, "key_mask of dtype bool, True where a key takes part", key_mask.dtype)
        if key_mask.shape != (k.shape[0], k.shape[2]):
            raise bad_value(op, f"key_mask of shape {(k.shape[0], k.shape[2])}, (B, M)", tuple(key_mask.shape))
    cu_q, cu_k = _check_cu_seqlens(op, q, k, cu_seqlens)
    if rotary is not None:
        if not isinstance(rotary, Rotary):
            raise bad_type(op, "rotary as a Rotary or None", type(rotary).__name__)
        if rotary.head_dim > q.shape[3]:
            raise bad_value(op, f"rotary.head_dim of at most D = {q.shape[3]}", rotary.head_dim)
        q, k = (rotary(x, _positions(x, cu)) for x, cu in ((q, cu_q), (k, cu_k)))
    return Arguments(q, k, v, q.shape[3] ** -0.5 if scale is None else float(scale), key_mask, cu_q, cu_k)


def check_tensors(op: str, q: Tensor, k: Tensor, v: Tensor, enable_gqa: bool) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise bad_type(op, f"{name} as a tensor", type(x).__name__)
        if x.dim() != 4:
            raise bad_value(op, f"{name} of shape (batch, heads, length, head size)", tuple(x.shape))
        if x.dtype not in DTYPES:
            raise bad_type(op, f"{name} as float32, bfloat16, float16 or float64", x.dtype)
        if x.dtype != q.dtype or x.device != q.device:
            raise bad_type(
                op, f"{name} of the dtype and device of q, {q.dtype} on {q.device}", f"{x.dtype} on {x.device}"
            )
    if k.shape[0] != q.shape[0] or k.shape[3] != q.shape[3]:
        raise bad_value(op, f"k of shape ({q.shape[0]}, heads, length, {q.shape[3]})", tuple(k.shape))
    if v.shape[:3] != k.shape[:3]:
        raise bad_value(op, f"v of shape ({k.shape[0]}, {k.shape[1]}, {k.shape[2]}, head size)", tuple(v.shape))
    if not 1 <= q.shape[3] <= MAX_HEAD_DIM or not 1 <= v.shape[3] <= MAX_HEAD_DIM:
        raise bad_value(op, f"head sizes of 1 to {MAX_HEAD_DIM}", f"{q.shape[3]} and {v.shape[3]}")
    heads, kv_heads = q.shape[1], k.shape[1]
    if heads != kv_heads and not enable_gqa:
        raise bad_value(op, f"{heads} heads in k and v", kv_heads, "enable_gqa=True shares a key head between queries")
    if kv_heads == 0 or heads % kv_heads:
        raise bad_value(op, "a number of query heads that the key heads divide", f"{heads} and {kv_heads}")


def _check_cu_seqlens(
    op: str, q: Tensor, k: Tensor, cu_seqlens: Tensor | tuple[Tensor, Tensor] | None
) -> tuple[Tensor | None, Tensor | None]:
    if cu_seqlens is None:
        return None, None
    pair = (cu_seqlens, cu_seqlens) if isinstance(cu_seqlens, Tensor) else tuple(cu_seqlens)
    if len(pair) != 2:
        raise bad_value(op, "cu_seqlens as one tensor, or a pair for queries and keys", f"{len(pair)} of them")
    if q.shape[0] != 1:
        raise bad_value(op, "a batch of 1 with cu_seqlens, the sequences side by side", q.shape[0])
    for cu, x, name in ((pair[0], q, "queries"), (pair[1], k, "keys")):
        if cu.dim() != 1 or cu.numel() < 1 or cu.dtype not in (torch.int32, torch.int64):
            raise bad_value(op, "cu_seqlens as int32 or int64 of shape (S + 1,)", f"{cu.dtype} {tuple(cu.shape)}")
        ends = cu.tolist()
        if ends[0] != 0 or ends[-1] != x.shape[2] or any(b < a for a, b in pairwise(ends)):
            raise bad_value(op, f"cu_seqlens of the {name} rising from 0 to {x.shape[2]}", _short(ends))
    if pair[0].shape != pair[1].shape:
        raise bad_value(op, "as many sequences of queries as of keys", f"{len(pair[0]) - 1} and {len(pair[1]) - 1}")
    return pair[0].long(), pair[1].long()


def _short(values: list[int]) -> str:
    return str(values) if len(values) <= 8 else f"[{', '.join(map(str, values[:6]))}, .., {values[-1]}]"


def _positions(x: Tensor, cu: Tensor | None) -> Tensor | None:
    """Count from 0 in every sequence; None for one sequence."""
    if cu is None:
        return None
    positions, cu = torch.arange(x.shape[2], device=x.device), cu.to(x.device)
    return positions - cu[torch.searchsorted(cu, positions, right=True) - 1]
