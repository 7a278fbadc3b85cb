"""Cases of norm_sim and clip_loss; neg_clip_loss, which has no gradient, is in test_pairwise_scores.py."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

import llmkern
from cases.case import Case
from llmkern.ops.pairwise_scores.norm_sim import norm_sim_reference
from llmkern.ops.pairwise_scores.two_way_lse import two_way_lse_reference

WIDTHS = (1, 3, 15, 16, 17, 65, 400, 1025)


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def make_norm(rows: int, width: int, dtype: torch.dtype, device: str, *, targets: int | None) -> list[Tensor | None]:
    """Width is d where the number of targets is given, else it is that number and d is 24."""
    generator = torch.Generator().manual_seed(rows * 1000 + width)
    d, m = (width, targets) if targets else (24, width)
    x, target = normal(generator, rows, d), normal(generator, m, d)
    if rows > 1 and d > 7:
        x[1, 7] += 1
    return [x.to(device, dtype), target.to(device, dtype)]


def raw_norm(tensors: list[Tensor | None], p: float) -> list[tuple[Any, tuple[Any, ...]]]:
    x, target = tensors
    out, winners = torch.ops.llmkern.norm_sim_fwd(x, target, p, False)
    forward = (torch.ops.llmkern.norm_sim_fwd.default, (x, target, p, False))
    upstream = torch.randn_like(out)
    if p == math.inf:
        return [forward, (torch.ops.llmkern.norm_sim_max_bwd.default, (upstream, x, target, winners, [True] * 2))]
    return [forward, (torch.ops.llmkern.norm_sim_power_bwd.default, (upstream, x, target, out, p, [True] * 2))]


def norm_case(name: str, p: float, targets: int | None) -> Case:
    return Case(
        f"norm_sim-{name}",
        functools.partial(make_norm, targets=targets),
        ("x", "target"),
        functools.partial(llmkern.norm_sim, p=p),
        lambda x, target: norm_sim_reference(x, target, p, False)[0],
        functools.partial(raw_norm, p=p),
        widths=WIDTHS,
        large=((300, 200), (90, 1300)),
    )


def make_clip(rows: int, width: int, dtype: torch.dtype, device: str) -> list[Tensor | None]:
    generator = torch.Generator().manual_seed(rows * 1000 + width)
    image = torch.nn.functional.normalize(normal(generator, rows, width), dim=1)
    # Far from saturated: the gradient of the scale is a difference, of which little else would be left.
    text = torch.nn.functional.normalize(0.2 * image + normal(generator, rows, width) / math.sqrt(width), dim=1)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    return [image.to(device, dtype), text.to(device, dtype), torch.tensor([3.0], device=device, dtype=compute)]


def clip_by_reference(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    rows, columns, pairs = two_way_lse_reference(image, text, scale, 0, False)
    return (0.5 * (rows.sum(0) + columns.sum(0)) - pairs).mean()


def raw_clip(tensors: list[Tensor | None]) -> list[tuple[Any, tuple[Any, ...]]]:
    image, text, scale = tensors
    scale = scale.reshape(())
    rows, columns, pairs = torch.ops.llmkern.two_way_lse_fwd(image, text, scale, 0, False)
    upstream = [torch.randn_like(x) for x in (rows[0], columns[0], pairs)]
    order = torch.randperm(len(image), device=image.device)
    return [
        (torch.ops.llmkern.two_way_lse_fwd.default, (image, text, scale, 0, False)),
        (
            torch.ops.llmkern.two_way_lse_bwd.default,
            (image, text, scale, rows, columns, *upstream, 0, [True] * 3),
        ),
        (torch.ops.llmkern.negatives.default, (image, text, scale, order, [0, len(image) // 2, len(image)], False)),
        (torch.ops.llmkern.paired_dot.default, (image, text)),
    ]


CLIP = Case(
    "clip_loss",
    make_clip,
    ("image", "text", "logit_scale"),
    llmkern.clip_loss,
    clip_by_reference,
    raw_clip,
    widths=WIDTHS,
    large=((200, 65), (700, 30)),
)

CASES = [
    norm_case("inf", math.inf, 70),
    norm_case("inf-targets", math.inf, None),
    norm_case("1", 1.0, 33),
    norm_case("2", 2.0, None),
    norm_case("3.5", 3.5, None),
    CLIP,
]
