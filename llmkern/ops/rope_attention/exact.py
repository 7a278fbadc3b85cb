"""The exact route: softmax attention by torch's own kernel, or by tiles of this library where they are faster."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from llmkern._library import cpu_build
from llmkern.ops.rope_attention.arguments import Arguments
from llmkern.ops.rope_attention.cost import needs_gradients

# Rows of a block where a mask over keys meets a causal one and tiles are not at hand.
ROWS = 512
# By module. Up to the first mean head size tiles outrun torch's kernel without a causal mask; under one, which torch's
# does not profit much from, at all sizes. Both from so many products and pairs of a head on; below, the call itself is
# what takes time, the more so with gradients, which torch takes without Python.
TILES_WIN = {"avx2": (12, 1.5e7, 0), "avx512": (256, 1e6, 2**16)}
PRODUCTS_WITH_GRADIENTS, PAIRS_WITH_GRADIENTS = 1.5e7, 2**18
# Up to this mean head size also backward; torch's takes fewer products.
SMALL_HEAD_BACKWARD = 12


class _TiledAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        key_bias: Tensor | None,
        cu_q: Tensor | None,
        cu_k: Tensor | None,
        is_causal: bool,
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        return torch.ops.llmkern.rope_attention_exact_fwd(q, k, v, key_bias, cu_q, cu_k, is_causal, scale)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        *tensors, ctx.is_causal, ctx.scale = inputs
        ctx.save_for_backward(*tensors, *output)
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *rest, out, normalizer = ctx.saved_tensors
        # Shares add up to one where torch's gradient rounds logits as the tiles do, by fused multiply-add.
        plain = all(x is None for x in rest) and q.shape[:2] == k.shape[:2] and q.shape[3] == v.shape[3]
        if plain and cpu_build.isa in TILES_WIN and q.shape[3] > SMALL_HEAD_BACKWARD and q.numel() and k.numel():
            grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                grad, q, k, v, out, normalizer, 0.0, ctx.is_causal, scale=ctx.scale
            )
        else:
            grads = torch.ops.llmkern.rope_attention_exact_bwd(
                grad, q, k, v, *rest, out, normalizer, ctx.is_causal, ctx.scale
            )
        return *grads, None, None, None, None, None


def tiles_win(q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> bool:
    """Whether tiles are faster than torch's kernel: from shapes, and from whether gradients will be asked for."""
    if q.device.type != "cpu" or q.dtype == torch.float64 or cpu_build.isa not in TILES_WIN:
        return False
    batch, heads, rows, size = q.shape
    size += v.shape[3]
    head, products, pairs = TILES_WIN[cpu_build.isa]
    if needs_gradients(q, k, v):
        products, pairs = max(products, PRODUCTS_WITH_GRADIENTS), max(pairs, PAIRS_WITH_GRADIENTS)
    seen = rows * k.shape[2]
    if torch.compiler.is_compiling() or batch * heads * seen * size < products or seen < pairs:
        return False
    return is_causal or size <= 2 * head


def tiled_attention(args: Arguments, is_causal: bool) -> Tensor:
    q, k, v, scale, key_mask, cu_q, cu_k = args
    bias = None
    if key_mask is not None:
        bias = torch.zeros(key_mask.shape, dtype=torch.float32, device=q.device).masked_fill(~key_mask, -torch.inf)
        bias = bias.unsqueeze(1).expand(k.shape[:3])
        # What is hidden may be infinite.
        k, v = (x.masked_fill(~key_mask[:, None, :, None], 0) for x in (k, v))
    inputs = (q, k, v, bias, cu_q, cu_k, is_causal, scale)
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return _TiledAttention.apply(*inputs)[0]
    # What autograd's bookkeeping costs is felt by short calls.
    return torch.ops.llmkern.rope_attention_exact_fwd(*inputs)[0]


def exact_attention(args: Arguments, is_causal: bool) -> Tensor:
    q, k, v, scale, key_mask, cu_q, cu_k = args
    if tiles_win(q, k, v, is_causal):
        return tiled_attention(args, is_causal)
    if cu_q is not None and cu_k is not None:
        return _by_sequence(args, is_causal)
    gqa = q.shape[1] != k.shape[1]
    if key_mask is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=is_causal, scale=scale, enable_gqa=gqa)
    if not is_causal:
        mask = key_mask[:, None, None, :].expand(q.shape[0], 1, q.shape[2], k.shape[2])
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=gqa)
    if q.device.type == "cpu" and cpu_build.isa is not None:
        return tiled_attention(args, is_causal)
    # By blocks of rows, so that no mask of all rows by all keys is made.
    pieces = []
    for begin in range(0, q.shape[2], ROWS):
        end = min(begin + ROWS, q.shape[2])
        seen = min(end, k.shape[2])
        causal = torch.ones(end - begin, seen, dtype=torch.bool, device=q.device).tril(begin)
        mask = key_mask[:, None, None, :seen] & causal
        rows = (q[:, :, begin:end], k[:, :, :seen], v[:, :, :seen])
        pieces.append(F.scaled_dot_product_attention(*rows, attn_mask=mask, scale=scale, enable_gqa=gqa))
    return torch.cat(pieces, 2) if pieces else q.new_zeros((*q.shape[:3], v.shape[3]))


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
