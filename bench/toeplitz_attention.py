"""toeplitz_attention against torch's attention with a dense bias mask, which is what relative positions cost there."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from _harness import Case, measure
from torch import Tensor

import llmkern


def tensors(heads: int, tokens: int, dim: int, device: str) -> tuple[Tensor, ...]:
    """q, k, v (1, heads, tokens, dim) and a table of small random biases."""
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(1, heads, tokens, dim, generator=generator) for _ in range(3)]
    table = torch.randn(heads, 2 * tokens - 1, generator=generator)
    return tuple(x.to(device) for x in (*made, table))


def dense_bias(table: Tensor, tokens: int, is_causal: bool) -> Tensor:
    i = torch.arange(tokens, device=table.device)
    bias = table[:, i[:, None] - i[None, :] + tokens - 1]
    return bias.masked_fill(i[:, None] < i[None, :], -torch.inf) if is_causal else bias


def with_dense_bias(q: Tensor, k: Tensor, v: Tensor, table: Tensor, *, is_causal: bool) -> Tensor:
    """The mask is made from the table, as every step of training has to."""
    bias = dense_bias(table, q.shape[2], is_causal)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias.unsqueeze(0))


def with_kept_bias(is_causal: bool) -> Callable[..., Tensor]:
    """The mask is there before the clock starts."""
    kept: dict[int, Tensor] = {}

    def attend(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
        # By the table's identity, and of its dtype: the truth is computed in float64 first.
        if id(table) not in kept:
            kept.clear()
            kept[id(table)] = dense_bias(table, q.shape[2], is_causal).unsqueeze(0)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=kept[id(table)])

    return attend


def ours(q: Tensor, k: Tensor, v: Tensor, table: Tensor, *, is_causal: bool) -> Tensor:
    return llmkern.toeplitz_attention(
        q, k, v, relative=llmkern.RelativeBias(table), is_causal=is_causal, method="exact"
    )


def exact_case(
    heads: int, tokens: int, dim: int, *, is_causal: bool, mode: str = "forward", sweep: str | None = None
) -> Case:
    pairs = heads * tokens * tokens * (0.5 if is_causal else 1.0)
    peer = functools.partial(with_dense_bias, is_causal=is_causal) if mode == "full" else with_kept_bias(is_causal)
    return Case(
        op="toeplitz_attention",
        name=f"exact-h{heads}-n{tokens}-d{dim}{'-causal' if is_causal else ''}",
        dtype=torch.float32,
        shape={"H": heads, "N": tokens, "D": dim},
        inputs=functools.partial(tensors, heads, tokens, dim),
        providers={"llmkern": functools.partial(ours, is_causal=is_causal), "torch": peer},
        bytes=4 * 4 * heads * tokens * dim * (3 if mode == "full" else 1),
        # Two products of n^2 d forward, five more backward, each of two operations a term.
        flops=pairs * dim * 2 * (7 if mode == "full" else 2),
        mode=mode,
        sweep=sweep,
    )


test_exact = measure(exact_case(2, 4096, 64, is_causal=causal) for causal in (False, True))
test_exact_gradients = measure(exact_case(2, 4096, 64, is_causal=causal, mode="full") for causal in (False, True))
test_t5_base_shape = measure([exact_case(12, 2048, 64, is_causal=False, mode="full")])
