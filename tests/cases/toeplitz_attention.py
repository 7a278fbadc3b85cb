"""Cases of toeplitz_attention: both kinds of relative positions."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

import llmkern
from cases.case import Case
from llmkern.ops.toeplitz_attention.reference import relative_scores

HEADS, KV_HEADS, DIM, VALUE_DIM = 2, 1, 5, 3
SUPPORT = torch.tensor([[0, 0], [1, 1], [0, 3], [4, 2]])
WIDTHS = (1, 3, 17, 97, 250)
SCALE = 0.6


def make(rows: int, width: int, dtype: torch.dtype, device: str, *, matrix: bool) -> list[Tensor | None]:
    """q, k, v as (B, N, H, D), the layout of projections: attention sees them transposed; and the table or matrix."""
    generator = torch.Generator().manual_seed(rows * 1000 + width)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)

    tensors = [normal(rows, width, h, d) for h, d in ((HEADS, DIM), (KV_HEADS, DIM), (KV_HEADS, VALUE_DIM))]
    distances = 2 * (width + 1) - 1
    return [*tensors, normal(HEADS, len(SUPPORT), distances) if matrix else normal(HEADS, distances)]


def relative_of(symbols: Tensor) -> llmkern.RelativeBias | llmkern.RelativeMatrix:
    if symbols.dim() == 2:
        return llmkern.RelativeBias(symbols)
    return llmkern.RelativeMatrix(symbols, SUPPORT.to(symbols.device))


def attend(*tensors: Tensor, is_causal: bool) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in tensors[:3])
    relative = relative_of(tensors[3])
    options: dict[str, Any] = {"is_causal": is_causal, "scale": SCALE, "method": "exact"}
    return llmkern.toeplitz_attention(q, k, v, relative=relative, **options).transpose(1, 2)


def attend_densely(*tensors: Tensor, is_causal: bool) -> Tensor:
    """Differentiable torch, with every score in a matrix."""
    compute = torch.float64 if tensors[0].dtype == torch.float64 else torch.float32
    q, k, v = (t.to(compute).transpose(1, 2) for t in tensors[:3])
    k, v = (t.repeat_interleave(HEADS // KV_HEADS, 1) for t in (k, v))
    symbols = tensors[3].to(compute)
    symbols = symbols.unsqueeze(1) if symbols.dim() == 2 else symbols
    s = relative_scores(q, k, symbols, None if tensors[3].dim() == 2 else SUPPORT.to(q.device), SCALE)
    if is_causal:
        s = s.masked_fill(torch.ones(s.shape[-2:], dtype=torch.bool, device=s.device).triu(1), -torch.inf)
    return (s.softmax(-1) @ v).transpose(1, 2).to(tensors[2].dtype)


def raw(tensors: list[Tensor | None], *, is_causal: bool) -> list[tuple[Any, tuple[Any, ...]]]:
    q, k, v, symbols = (t for t in tensors if t is not None)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    relative, support = (symbols.unsqueeze(1), None) if symbols.dim() == 2 else (symbols, SUPPORT.to(q.device))
    inputs = (q, k, v, relative, support, None)
    results = torch.ops.llmkern.toeplitz_exact_fwd(*inputs, is_causal, SCALE)
    grad = torch.randn_like(results[0])
    return [
        (torch.ops.llmkern.toeplitz_exact_fwd.default, (*inputs, is_causal, SCALE)),
        (torch.ops.llmkern.toeplitz_exact_bwd.default, (grad, *inputs, *results, is_causal, SCALE, True)),
    ]


def case(name: str, *, matrix: bool, is_causal: bool) -> Case:
    return Case(
        f"toeplitz_attention-{name}",
        functools.partial(make, matrix=matrix),
        ("q", "k", "v", "matrix" if matrix else "table"),
        functools.partial(attend, is_causal=is_causal),
        functools.partial(attend_densely, is_causal=is_causal),
        functools.partial(raw, is_causal=is_causal),
        widths=WIDTHS,
        large=((1, 1500), (3, 300)),
    )


CASES = [
    case("bias", matrix=False, is_causal=False),
    case("bias-causal", matrix=False, is_causal=True),
    case("matrix-causal", matrix=True, is_causal=True),
]
