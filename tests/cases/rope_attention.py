"""Cases of rope_attention: the polynomial route under plans that are held fixed."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from dense_attention import dense_attention, frozen_plan
from torch import Tensor

import llmkern
from cases.case import Case
from llmkern.ops.rope_attention.arguments import Arguments
from llmkern.ops.rope_attention.exact import tiled_attention
from llmkern.ops.rope_attention.function import polynomial_inputs
from llmkern.ops.rope_attention.reference import compute_dtype

NAMES = ("q", "k", "v")
HEADS, KV_HEADS, DIM, VALUE_DIM = 4, 2, 6, 5
WIDTHS = (1, 3, 15, 17, 65, 250)


def make(rows: int, width: int, dtype: torch.dtype, device: str, *, tail: float = 1.0) -> list[Tensor | None]:
    """q, k and v as (B, N, H, D), the layout of projections: attention sees them transposed. ``tail`` scales
    the first half of the variables, those that an anisotropic plan takes to degree 2 only."""
    generator = torch.Generator().manual_seed(rows * 1000 + width)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    q, k = 0.4 * normal(rows, width, HEADS, DIM), 0.4 * normal(rows, width, KV_HEADS, DIM)
    q[..., : DIM // 2] *= tail
    k[..., : DIM // 2] *= tail
    return [t.to(device, dtype) for t in (q, k, normal(rows, width, KV_HEADS, VALUE_DIM))]


def heads_first(tensors: tuple[Tensor, ...]) -> list[Tensor]:
    return [t.transpose(1, 2) for t in tensors]


Plans = list[llmkern.AttentionPlan]


def attend(*tensors: Tensor, plans: Plans) -> Tensor:
    q, k, v = heads_first(tensors)
    plan = plans[q.shape[0]]
    out = llmkern.rope_attention(q, k, v, is_causal=plan.is_causal, scale=1.0, enable_gqa=True, plan=plan)
    return out.transpose(1, 2)


def attend_densely(*tensors: Tensor, plans: Plans) -> Tensor:
    return dense_attention(*heads_first(tensors), plans[1]).transpose(1, 2)


def raw(tensors: list[Tensor | None], *, plans: Plans) -> list[tuple[Any, tuple[Any, ...]]]:
    q, k, v = heads_first(tuple(t for t in tensors if t is not None))
    plan = plans[q.shape[0]]
    inputs, flags = polynomial_inputs(Arguments(q, k, v, 1.0, None, None, None), plan, plan.is_causal)
    results = torch.ops.llmkern.rope_attention_fwd(*inputs, *flags, plan.rtol)
    return [
        (torch.ops.llmkern.rope_attention_fwd.default, (*inputs, *flags, plan.rtol)),
        (torch.ops.llmkern.rope_attention_bwd.default, (torch.randn_like(results[0]), *inputs, *results, *flags)),
    ]


def case(name: str, tail: float = 1.0, **options: Any) -> Case:
    # By batch size; made once, since tracing is not to look into it.
    plans = [frozen_plan(batch, HEADS, DIM, bound=2.0, **options) for batch in range(5)]
    return Case(
        f"rope_attention-{name}",
        functools.partial(make, tail=tail),
        NAMES,
        functools.partial(attend, plans=plans),
        functools.partial(attend_densely, plans=plans),
        functools.partial(raw, plans=plans),
        widths=WIDTHS,
        large=((1, 5000), (3, 700)),
    )


def attend_by_tiles(*tensors: Tensor, is_causal: bool) -> Tensor:
    q, k, v = heads_first(tensors)
    return tiled_attention(Arguments(q, k, v, 0.5, None, None, None), is_causal).transpose(1, 2)


def attend_as_torch(*tensors: Tensor, is_causal: bool) -> Tensor:
    q, k, v = heads_first(tensors)
    out = F.scaled_dot_product_attention(q, k, v, is_causal=is_causal, scale=0.5, enable_gqa=True)
    return out.transpose(1, 2)


def raw_tiles(tensors: list[Tensor | None], *, is_causal: bool) -> list[tuple[Any, tuple[Any, ...]]]:
    inputs = (*heads_first(tuple(t for t in tensors if t is not None)), None, None, None)
    results = torch.ops.llmkern.rope_attention_exact_fwd(*inputs, is_causal, 0.5)
    grad = torch.randn_like(results[0])
    return [
        (torch.ops.llmkern.rope_attention_exact_fwd.default, (*inputs, is_causal, 0.5)),
        (torch.ops.llmkern.rope_attention_exact_bwd.default, (grad, *inputs, *results, is_causal, 0.5)),
        (torch.ops.llmkern.rope_attention_norms.default, (inputs[0], None, None)),
    ]


def exact_case(name: str, tail: float, is_causal: bool) -> Case:
    """``tail`` decides whether logits are small enough for sums without a maximum."""
    options: dict[str, Any] = {"is_causal": is_causal}
    return Case(
        f"rope_attention-{name}",
        functools.partial(make, tail=tail),
        NAMES,
        functools.partial(attend_by_tiles, **options),
        functools.partial(attend_as_torch, **options),
        functools.partial(raw_tiles, **options),
        # Of a single key gradients are zero, and what rounding leaves grows with the size of keys.
        widths=WIDTHS if tail == 1 else WIDTHS[1:],
        large=((1, 5000), (3, 700)),
    )


ROTARY = llmkern.Rotary(DIM - 2, base=20.0)


def make_tokens(rows: int, width: int, dtype: torch.dtype, device: str) -> list[Tensor | None]:
    return make(rows, width, dtype, device)[:1]


def turn(x: Tensor) -> Tensor:
    return ROTARY(x.transpose(1, 2)).transpose(1, 2)


def turn_as_complex(x: Tensor) -> Tensor:
    """Entries t and t + d/2 are a complex number, which is multiplied by e^(i angle)."""
    half = ROTARY.head_dim // 2
    angles = torch.arange(x.shape[1], device=x.device).double().unsqueeze(-1) * ROTARY.frequencies(0, x.device)
    turns = torch.polar(torch.ones_like(angles), angles).unsqueeze(1)
    wide = x.double()
    turned = torch.complex(wide[..., :half], wide[..., half : 2 * half]) * turns
    return torch.cat([turned.real, turned.imag, wide[..., 2 * half :]], -1).to(x.dtype)


def raw_turn(tensors: list[Tensor | None]) -> list[tuple[Any, tuple[Any, ...]]]:
    (x,) = heads_first(tuple(t for t in tensors if t is not None))
    tables = [torch.randn(x.shape[0], x.shape[2], DIM - 2, dtype=compute_dtype(x.dtype)).to(x.device) for _ in range(2)]
    return [(torch.ops.llmkern.rope_attention_rotate.default, (x, *tables, back)) for back in (False, True)]


CASES = [
    Case(
        "rope_attention-rotary",
        make_tokens,
        ("x",),
        turn,
        turn_as_complex,
        raw_turn,
        widths=WIDTHS,
        large=((1, 5000), (3, 5000)),
        twice=True,
    ),
    exact_case("exact", 1.0, False),
    exact_case("exact-causal-unbounded", 10.0, True),
    case("full"),
    case("causal", is_causal=True),
    case("anisotropic", tail=0.1, degree=4, leading=3),
    case("split-causal", degree=4, contact=4, is_causal=True, q_limit=1.2, k_limit=1.2),
]
