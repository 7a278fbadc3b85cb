"""The exact route: softmax attention by torch's own kernel."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from llmkern.ops.rope_attention.arguments import Arguments


def exact_attention(args: Arguments, is_causal: bool) -> Tensor:
    q, k, v, scale, key_mask, cu_q, cu_k = args
    if cu_q is not None and cu_k is not None:
        return _by_sequence(args, is_causal)
    gqa = q.shape[1] != k.shape[1]
    if key_mask is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=is_causal, scale=scale, enable_gqa=gqa)
    mask = key_mask[:, None, None, :]
    if is_causal:
        mask = mask & torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
    mask = mask.expand(q.shape[0], 1, q.shape[2], k.shape[2])
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=gqa)


def _by_sequence(args: Arguments, is_causal: bool) -> Tensor:
    assert args.cu_q is not None
    assert args.cu_k is not None
    pieces = []
    rows, keys = args.cu_q.tolist(), args.cu_k.tolist()
    for q0, q1, k0, k1 in zip(rows, rows[1:], keys, keys[1:]):
        mask = None if args.key_mask is None else args.key_mask[:, k0:k1]
        one = args._replace(
            q=args.q[:, :, q0:q1], k=args.k[:, :, k0:k1], v=args.v[:, :, k0:k1], key_mask=mask, cu_q=None, cu_k=None
        )
        pieces.append(exact_attention(one, is_causal))
    if not pieces:
        return args.q.new_zeros((*args.q.shape[:3], args.v.shape[3]))
    return torch.cat(pieces, 2)
