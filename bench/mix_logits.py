"""mix_logits against what its user would write in torch, on logits of the sizes of real models."""

from __future__ import annotations

import torch
from _harness import Case, measure
from torch import Tensor

import llmkern

WEIGHTS = (0.5, 0.3, 0.2)


def language_like(rows: int, vocabulary: int, dtype: torch.dtype, device: str, models: int = 3) -> list[Tensor]:
    """Logits whose probabilities fall with rank as in text (rank^-1.5), each model with noise of its own."""
    generator = torch.Generator().manual_seed(0)
    logits = []
    for _ in range(rows):
        ranks = torch.randperm(vocabulary, generator=generator).float()
        logits.append(-1.5 * torch.log(ranks + 2.7))
    common = torch.stack(logits)
    return [
        (common + 0.5 * torch.randn(rows, vocabulary, generator=generator)).to(device, dtype) for _ in range(models)
    ]


def reverse_kl(logits: list[Tensor], weights: Tensor) -> Tensor:
    mixed = sum(weight * row.to(weight.dtype) for weight, row in zip(weights, logits))
    return torch.log_softmax(mixed, -1).to(logits[0].dtype)


def forward_kl_zero(logits: list[Tensor], weights: Tensor) -> Tensor:
    """The Z = 0 form, which torch can write in a line; the exact one has no peer."""
    terms = [weight.log() - torch.log_softmax(row.to(weight.dtype), -1) for weight, row in zip(weights, logits)]
    return -torch.logsumexp(torch.stack(terms), 0).to(logits[0].dtype)


def ours(logits: list[Tensor], weights: Tensor) -> Tensor:
    return llmkern.mix_logits(logits, weights)


def ours_forward_kl_zero(logits: list[Tensor], weights: Tensor) -> Tensor:
    return llmkern.mix_logits(logits, weights, divergence="forward_kl", normalizer="zero")


def case(
    rows: int, vocabulary: int, dtype: torch.dtype, *, mode: str = "forward", divergence: str = "reverse_kl"
) -> Case:
    function, plain = (ours, reverse_kl) if divergence == "reverse_kl" else (ours_forward_kl_zero, forward_kl_zero)
    reads, writes = (len(WEIGHTS), 1) if mode == "forward" else (len(WEIGHTS) + 1, len(WEIGHTS))
    name = f"{divergence}-B{rows}-V{vocabulary}"
    return Case(
        op="mix_logits",
        name=name,
        dtype=dtype,
        shape={"M": len(WEIGHTS), "B": rows, "V": vocabulary},
        inputs=lambda device: (
            language_like(rows, vocabulary, dtype, device),
            torch.tensor(WEIGHTS, device=device),
        ),
        providers={"llmkern": function, "torch": plain, "torch.compile": torch.compile(plain)},
        bytes=(reads + writes) * rows * vocabulary * dtype.itemsize,
        mode=mode,
        sweep="B" if vocabulary == 32000 and mode == "forward" else None,
    )


BF16, FP32 = torch.bfloat16, torch.float32
test_forward = measure(
    [
        case(8, 128256, BF16),
        case(64, 151936, BF16),
        *(case(rows, 32000, BF16) for rows in (1, 4, 16, 64)),
        case(1, 32000, FP32),
        case(8, 128256, FP32),
    ]
)
test_backward = measure([case(8, 128256, BF16, mode="backward"), case(64, 32000, FP32, mode="backward")])
test_other_divergences = measure([case(8, 128256, BF16, divergence="forward_kl-zero")])
