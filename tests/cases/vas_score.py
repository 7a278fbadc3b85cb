"""Cases of vas_score."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import llmkern
from cases.case import Case
from llmkern.ops.vas_score.score import vas_score_reference


def make_vas(rows: int, width: int, dtype: torch.dtype, device: str, *, cross: bool) -> list[Tensor | None]:
    generator = torch.Generator().manual_seed(rows * 1000 + width)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    # Neither symmetric nor definite: the fold of the triangle has to do without.
    sigma = normal(width, width).to(device, torch.float64 if dtype == torch.float64 else torch.float32)
    y = normal(rows, width).to(device, dtype)
    return [normal(rows, width).to(device, dtype), sigma, y if cross else None]


def vas_by_reference(x: Tensor, sigma: Tensor, y: Tensor | None) -> Tensor:
    return vas_score_reference(x, sigma, y, False)


def raw_vas(tensors: list[Tensor | None]) -> list[tuple[Any, tuple[Any, ...]]]:
    x, sigma, y = tensors
    out = torch.ops.llmkern.vas_score_fwd(x, sigma, y, False)
    return [
        (torch.ops.llmkern.vas_score_fwd.default, (x, sigma, y, False)),
        (torch.ops.llmkern.vas_score_bwd.default, (torch.randn_like(out), x, sigma, y, [True, True, y is not None])),
        (torch.ops.llmkern.second_moment_sum.default, (x, -20)),
    ]


def vas_case(name: str, *, cross: bool) -> Case:
    return Case(
        f"vas_score-{name}",
        lambda rows, width, dtype, device: make_vas(rows, width, dtype, device, cross=cross),
        ("x", "sigma", "y"),
        llmkern.vas_score,
        vas_by_reference,
        raw_vas,
        widths=(1, 3, 15, 16, 17, 65, 400, 1025),
        large=((300, 200), (150, 770)),
    )


CASES = [vas_case("quadratic", cross=False), vas_case("cross", cross=True)]
