"""toeplitz_attention against torch's attention with a dense bias mask, which is what relative positions cost there."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from _harness import Case, measure
from _t5_encoder import t5_case
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import llmkern
from llmkern.ops.toeplitz_attention.fourier import fast_length

RTOL = 1e-2


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


def by_flex(is_causal: bool) -> Callable[..., Tensor]:
    """flex_attention, whose score_mod reads the table; on CPUs torch has no backward of it."""
    compiled = torch.compile(flex_attention)
    blocks = functools.cache(lambda n, device: create_block_mask(lambda b, h, i, j: i >= j, None, None, n, n, device))

    def attend(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
        n = q.shape[2]
        mask = blocks(n, str(q.device)) if is_causal else None
        return compiled(q, k, v, lambda s, b, h, i, j: s + table[h, i - j + n - 1], mask)

    return attend


def ours(q: Tensor, k: Tensor, v: Tensor, table: Tensor, *, is_causal: bool) -> Tensor:
    return llmkern.toeplitz_attention(
        q, k, v, relative=llmkern.RelativeBias(table), is_causal=is_causal, method="exact"
    )


def exact_case(
    heads: int, tokens: int, dim: int, *, is_causal: bool, mode: str = "forward", sweep: str | None = None
) -> Case:
    pairs = heads * tokens * tokens * (0.5 if is_causal else 1.0)
    peers = {"torch": functools.partial(with_dense_bias, is_causal=is_causal)}
    if mode == "forward":
        peers = {"torch": with_kept_bias(is_causal), "torch flex": by_flex(is_causal)}
    return Case(
        op="toeplitz_attention",
        name=f"exact-h{heads}-n{tokens}-d{dim}{'-causal' if is_causal else ''}",
        dtype=torch.float32,
        shape={"H": heads, "N": tokens, "D": dim},
        inputs=functools.partial(tensors, heads, tokens, dim),
        providers={"llmkern": functools.partial(ours, is_causal=is_causal), **peers},
        bytes=4 * 4 * heads * tokens * dim * (3 if mode == "full" else 1),
        # Two products of n^2 d forward, five more backward, each of two operations a term.
        flops=pairs * dim * 2 * (7 if mode == "full" else 2),
        mode=mode,
        sweep=sweep,
    )


def bounded(tokens: int, dim: int, rough: bool, device: str) -> tuple[Tensor, ...]:
    """q, k, v of one head with scores of at most 1, and a decay that makes its table; or of at most 0.7, for which
    degree 2 is enough at every length, and a rough table."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 1, tokens, dim, generator=generator) for _ in range(3))
    bound = 0.7 if rough else 1.0
    q, k = (bound**0.5 * x / x.norm(dim=-1).max() for x in (q, k))
    table = torch.randn(1, 2 * tokens - 1, generator=generator) if rough else torch.tensor([[0.5]])
    return tuple(x.to(device) for x in (q, k, v, table))


def logarithmic(decay: Tensor, tokens: int) -> Tensor:
    """-decay log(1 + |t| / 20), the shape of KERPLE's: it does not factorise."""
    t = torch.arange(1 - tokens, tokens, device=decay.device, dtype=decay.dtype)
    return -decay * torch.log1p(t.abs() / 20)


def fast(q: Tensor, k: Tensor, v: Tensor, made_of: Tensor, *, is_causal: bool, rough: bool, method: str) -> Tensor:
    relative = llmkern.RelativeBias(made_of if rough else logarithmic(made_of, q.shape[2]))
    return llmkern.toeplitz_attention(
        q, k, v, relative=relative, is_causal=is_causal, scale=1.0, rtol=RTOL, method=method
    )


def smooth_by_torch(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, *, attend: Callable[..., Tensor]) -> Tensor:
    return attend(q * q.shape[3] ** 0.5, k, v, logarithmic(decay, q.shape[2]))


def kept_by_torch(is_causal: bool) -> Callable[..., Tensor]:
    """The mask, as large as all pairs, is there before the clock starts."""
    kept: list[Tensor] = []

    def attend(q: Tensor, k: Tensor, v: Tensor, decay: Tensor) -> Tensor:
        if not kept:
            kept.append(dense_bias(logarithmic(decay, q.shape[2]), q.shape[2], is_causal).unsqueeze(0))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=kept[0], scale=1.0)

    return attend


def agree(results: dict[str, Any], arguments: tuple[Tensor, ...], *, base: str) -> None:
    """The error of each row is held to its certificate in tests/; here max|v - o| is taken for all rows at once."""
    ours, theirs = results["llmkern"], results[base]
    if isinstance(ours, Tensor):
        assert float((ours - theirs).abs().max()) <= RTOL * float(arguments[2].max() - arguments[2].min())
    else:
        for a, b in zip(ours, theirs):
            assert float((a - b).norm()) <= 10 * math.sqrt(RTOL) * float(b.norm())


def smooth_case(tokens: int, dim: int, mode: str = "forward") -> Case:
    """Causal; where gradients are wanted torch makes the mask anew, as training has to."""
    peer = kept_by_torch(True)
    if mode == "full":
        peer = functools.partial(smooth_by_torch, attend=functools.partial(with_dense_bias, is_causal=True))
    ours = functools.partial(fast, is_causal=True, rough=False)
    return Case(
        op="toeplitz_attention",
        name=f"smooth-n{tokens}-d{dim}-causal",
        dtype=torch.float32,
        shape={"H": 1, "N": tokens, "D": dim},
        inputs=functools.partial(bounded, tokens, dim, False),
        providers={
            "llmkern": functools.partial(ours, method="auto"),
            "torch": peer,
            "llmkern exact": functools.partial(ours, method="exact"),
        },
        # What is certified here has no known lower bound but reading and writing.
        bytes=4 * 4 * tokens * dim * (3 if mode == "full" else 1),
        mode=mode,
        agree=functools.partial(agree, base="torch"),
    )


def agree_at_degree_two(results: dict[str, Any], arguments: tuple[Tensor, ...]) -> None:
    q, k, v, table = arguments
    relative = llmkern.RelativeBias(table)
    plan = llmkern.plan_toeplitz_attention(q, k, v, relative=relative, is_causal=True, scale=1.0, method="fft")
    assert plan.degree == 2, "the floor is that of degree 2"
    agree(results, arguments, base="llmkern exact")


def rough_case(tokens: int, dim: int) -> Case:
    """FFT of degree 2, as such.

    The floor counts 16 bytes for each of R (d + 1) sequences of the transform's length: read and written on the way
    there, read and written on the way back, each once, as transforms that do not fit into a cache must at least.
    Planning, q, k, v, the output, the symbol and the monomials are not counted. It is no bound for transforms that
    stay in a cache.
    """
    ours = functools.partial(fast, is_causal=True, rough=True)
    transformed = math.comb(dim + 2, 2) * (dim + 1) * fast_length(2 * tokens - 1)
    return Case(
        op="toeplitz_attention",
        name=f"rough-n{tokens}-d{dim}-causal",
        dtype=torch.float32,
        shape={"H": 1, "N": tokens, "D": dim},
        inputs=functools.partial(bounded, tokens, dim, True),
        providers={
            "llmkern": functools.partial(ours, method="fft"),
            "llmkern exact": functools.partial(ours, method="exact"),
        },
        bytes=4 * 4 * transformed,
        agree=agree_at_degree_two,
        sweep="N",
    )


test_smooth = measure([smooth_case(16384, 8), smooth_case(16384, 16)])
test_smooth_gradients = measure([smooth_case(8192, 8, "full")])
test_rough = measure(rough_case(2**k, 8) for k in range(13, 17))
test_exact = measure(exact_case(2, 4096, 64, is_causal=causal) for causal in (False, True))
test_exact_gradients = measure(exact_case(2, 4096, 64, is_causal=causal, mode="full") for causal in (False, True))
test_t5_encoder = measure([t5_case(2, 4096)])
