"""Cases of mix_logits."""

from __future__ import annotations

import functools
from typing import Any

import torch
from oracle import FACTOR
from torch import Tensor

import llmkern
from cases.case import Case
from llmkern.ops.mix_logits.arguments import check_mix_arguments
from llmkern.ops.mix_logits.reference import mix_logits_reference

MIX_NAMES = ("logits0", "logits1", "logits2", "weights", "reference", "carry")


def make_mix(
    rows: int,
    width: int,
    dtype: torch.dtype,
    device: str,
    *,
    weights: tuple[float, ...],
    reference: bool,
    carry: bool,
    spread: float = 1.0,
) -> list[Tensor | None]:
    generator = torch.Generator().manual_seed(rows * 1000 + width)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    accumulate = torch.float64 if dtype == torch.float64 else torch.float32
    # Models that agree in part, as tuned copies of one base do.
    common = 2 * normal(rows, width)
    logits = [(common + spread * normal(rows, width)).to(device, dtype) for _ in range(3)]
    per_row = torch.tensor(weights, dtype=torch.float64).repeat(rows, 1)
    return [
        *logits,
        per_row.to(device, accumulate),
        common.to(device, dtype) if reference else None,
        normal(rows, 3).to(device, accumulate) if carry else None,
    ]


def mix(*tensors: Tensor | None, **options: Any) -> Tensor:
    *logits, weights, reference, carry = tensors
    return llmkern.mix_logits(logits, weights, reference=reference, carry=carry, **options)


def mix_by_reference(*tensors: Tensor | None, divergence: str, alpha: float | None = None, normalizer: str = "exact"):
    *logits, weights, reference, carry = tensors
    args = check_mix_arguments("mix_logits", logits, weights, reference, divergence, alpha, normalizer, carry)
    return mix_logits_reference(*args)[0]


def raw_mix(tensors: list[Tensor | None], **options: Any) -> list[tuple[Any, tuple[Any, ...]]]:
    *logits, weights, reference, carry = tensors
    options = {"alpha": None, "normalizer": "exact", **options}
    args = check_mix_arguments("mix_logits", logits, weights, reference, carry=carry, **options)
    out, stats = torch.ops.llmkern.mix_logits_fwd(*args)
    needs = [True, True, True, True, reference is not None, carry is not None]
    return [
        (torch.ops.llmkern.mix_logits_fwd.default, tuple(args)),
        (torch.ops.llmkern.mix_logits_bwd.default, (torch.randn_like(out), stats, *args, needs)),
    ]


SEARCH = "differences of log-probs and the search for Z magnify their rounding by some ten, at random, in either code"


def mix_case(
    name: str,
    *,
    weights: tuple[float, ...],
    reference: bool = False,
    carry: bool = False,
    spread: float = 1.0,
    factor: float = FACTOR,
    reason: str = "",
    **options: Any,
) -> Case:
    return Case(
        f"mix_logits-{name}",
        functools.partial(make_mix, weights=weights, reference=reference, carry=carry, spread=spread),
        MIX_NAMES,
        functools.partial(mix, **options),
        functools.partial(mix_by_reference, **options),
        functools.partial(raw_mix, **options),
        factor,
        reason,
        refuses=r"got a row without a distribution at index 1; mask or repair",
    )


WEIGHTS, LESS, SIGNED, ZERO = (0.2, 0.5, 0.3), (0.3, 0.4, 0.1), (0.7, 0.5, -0.2), (0.6, 0.0, 0.4)
# Where models disagree wildly one token takes all the mass, and its gradient is a difference of nearly equal numbers.
SEARCHED: dict[str, Any] = {"reference": True, "spread": 0.3, "factor": 8.0, "reason": SEARCH}

CASES = [
    mix_case("reverse_kl", weights=WEIGHTS, divergence="reverse_kl"),
    mix_case("reverse_kl-reference", weights=LESS, reference=True, divergence="reverse_kl"),
    mix_case("reverse_kl-signed", weights=SIGNED, reference=True, carry=True, divergence="reverse_kl"),
    mix_case("reverse_kl-zero_weight", weights=ZERO, divergence="reverse_kl"),
    mix_case("reverse_kl-zero", weights=LESS, reference=True, carry=True, divergence="reverse_kl", normalizer="zero"),
    mix_case("forward_kl", weights=WEIGHTS, divergence="forward_kl", **SEARCHED),
    mix_case("forward_kl-signed", weights=SIGNED, divergence="forward_kl", **SEARCHED),
    mix_case("forward_kl-zero", weights=WEIGHTS, carry=True, divergence="forward_kl", normalizer="zero", **SEARCHED),
    mix_case("alpha", weights=LESS, carry=True, divergence="alpha", alpha=0.4, **SEARCHED),
    mix_case("alpha-zero_weight", weights=ZERO, divergence="alpha", alpha=0.7, **SEARCHED),
    mix_case("alpha-zero", weights=LESS, divergence="alpha", alpha=0.4, normalizer="zero", **SEARCHED),
    mix_case("jsd", weights=WEIGHTS, carry=True, divergence="jsd", **SEARCHED),
    mix_case("jsd-signed", weights=SIGNED, divergence="jsd", **SEARCHED),
    mix_case("jsd-zero", weights=WEIGHTS, divergence="jsd", normalizer="zero", **SEARCHED),
]
