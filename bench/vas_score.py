"""vas_score and second_moment against what their user would write in torch, on embeddings of CLIP's sizes."""

from __future__ import annotations

import torch
from _harness import Case, measure
from torch import Tensor

import llmkern


def embeddings(n: int, d: int, dtype: torch.dtype, device: str, seed: int = 0) -> Tensor:
    """Unit vectors with a strong common direction, as those of CLIP have."""
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(seed)) + 2 * torch.linspace(-1, 1, d)
    return torch.nn.functional.normalize(x, dim=1).to(device, dtype)


def compute(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def quadratic(x: Tensor, sigma: Tensor) -> Tensor:
    wide = x.to(compute(x))
    return ((wide @ sigma.to(wide.dtype)) * wide).sum(1)


def moment(x: Tensor) -> Tensor:
    wide = x.to(compute(x))
    return wide.t() @ wide / len(x)


def moment_in_float64(x: Tensor) -> Tensor:
    wide = x.double()
    return (wide.t() @ wide / len(x)).to(compute(x))


def score_case(n: int, d: int, dtype: torch.dtype, mode: str = "forward") -> Case:
    # Backward: (S + S^T) x a row, and the sum of outer products.
    flops = n * d * d if mode == "forward" else 4 * n * d * d
    return Case(
        op="vas_score",
        name=f"N{n}-d{d}",
        dtype=dtype,
        shape={"N": n, "D": d},
        inputs=lambda device: (
            embeddings(n, d, dtype, device),
            moment(embeddings(4 * d, d, torch.float32, device, 1)),
        ),
        providers={"llmkern": llmkern.vas_score, "torch": quadratic, "torch.compile": torch.compile(quadratic)},
        bytes=n * d * dtype.itemsize,
        flops=flops,
        mode=mode,
        sweep="N" if d == 512 and mode == "forward" else None,
    )


def moment_case(n: int, d: int, dtype: torch.dtype) -> Case:
    return Case(
        op="second_moment",
        name=f"N{n}-d{d}",
        dtype=dtype,
        shape={"N": n, "D": d},
        inputs=lambda device: (embeddings(n, d, dtype, device),),
        providers={"llmkern": llmkern.second_moment, "torch": moment, "torch, float64": moment_in_float64},
        bytes=n * d * dtype.itemsize,
        flops=n * d * d,
    )


FP16, FP32 = torch.float16, torch.float32
test_scores = measure(
    [
        score_case(131072, 768, FP16),
        *(score_case(n, 512, FP32) for n in (2048, 8192, 32768)),
        score_case(16384, 768, FP32, mode="backward"),
    ]
)
test_moments = measure([moment_case(32768, 768, FP16)])
