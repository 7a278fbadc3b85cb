"""rope_attention against torch's attention: gaussian heads whose scores are bounded by B, and a grid for the choice."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import torch.nn.functional as F
from _harness import Case, measure
from torch import Tensor

import llmkern


def bounded(tokens: int, dim: int, bound: float, device: str, decay: float = 0.0, heads: int = 1) -> tuple[Tensor, ...]:
    """q, k, v (1, heads, tokens, dim) with max|q| max|k| / sqrt(dim) = bound; entry t of q and k falls as t^-decay."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, tokens, dim, generator=generator) for _ in range(3))
    spectrum = torch.arange(1, dim + 1).float() ** -decay
    for x in (q, k):
        x *= spectrum
        x *= math.sqrt(bound * math.sqrt(dim)) / x.norm(dim=-1).max()
    return tuple(x.to(device) for x in (q, k, v))


# Where torch takes no part, this many rows stand for all.
SAMPLED_ROWS = 64


def agree(results: dict[str, Any], arguments: tuple[Tensor, ...], *, rtol: float) -> None:
    """The error is held to the certificate in tests/; here max|v - o| is taken for all rows at once."""
    ours, theirs = results["llmkern"], results.get("torch")
    if theirs is None:
        rows = torch.linspace(0, ours.shape[2] - 1, SAMPLED_ROWS, device=ours.device).long()
        ours, theirs = ours[:, :, rows], F.scaled_dot_product_attention(arguments[0][:, :, rows], *arguments[1:])
    if isinstance(ours, Tensor):
        allowed = rtol * float(arguments[2].max() - arguments[2].min())
        assert float((ours - theirs).abs().max()) <= allowed
    else:
        # Gradients: the certificate is one of values, theirs is an order weaker; rtol of the largest is a sanity check.
        for a, b in zip(ours, theirs):
            assert float((a - b).norm()) <= 10 * math.sqrt(rtol) * float(b.norm())


def case(
    tokens: int,
    dim: int,
    bound: float,
    rtol: float,
    *,
    is_causal: bool = False,
    mode: str = "forward",
    decay: float = 0.0,
    sweep: str | None = None,
    peer: bool = True,
) -> Case:
    providers = [
        ("llmkern", functools.partial(llmkern.rope_attention, rtol=rtol, is_causal=is_causal)),
        ("torch", functools.partial(F.scaled_dot_product_attention, is_causal=is_causal)),
    ]
    # Least work: exact attention is 4 n^2 d; what is certified here has no known lower bound but reading and writing.
    return Case(
        op="rope_attention",
        name=f"n{tokens}-d{dim}-B{bound:g}-rtol{rtol:g}{'-causal' if is_causal else ''}{'-decay' if decay else ''}",
        dtype=torch.float32,
        shape={"N": tokens, "D": dim},
        inputs=functools.partial(bounded, tokens, dim, bound, decay=decay),
        providers=dict(providers if peer else providers[:1]),
        bytes=4 * tokens * dim * 4 * (1 if mode == "forward" else 3),
        mode=mode,
        agree=functools.partial(agree, rtol=rtol),
        sweep=sweep,
    )


TARGETS = [(8, 2.0, 1e-3), (16, 1.0, 1e-3), (32, 1.0, 1e-2), (64, 0.5, 1e-3)]

test_targets = measure(case(65536, *target, is_causal=c) for target in TARGETS for c in (False, True))
test_gradients = measure(
    case(n, *target, is_causal=c, mode="full") for n in (16384, 65536) for target in TARGETS for c in (False, True)
)
# The highest degree in bfloat16.
test_coarse = measure(case(65536, 64, 0.5, 1e-2, is_causal=c) for c in (False, True))
test_growth = measure(case(2**k, 8, 2.0, 1e-3, sweep="N", peer=k <= 16) for k in range(14, 19))
test_decaying_spectrum = measure([case(32768, 64, 1.0, 3e-3, decay=1.0)])
# Where exact attention is the right choice, choosing must cost nothing.
test_choice = measure(
    case(n, d, b, 1e-2, is_causal=c)
    for n in (256, 1024, 4096, 16384)
    for d in (8, 32, 128)
    for b in (0.25, 2.0, 16.0)
    for c in (False, True)
    if n * d <= 2**19
)
