"""vas_score and second_moment against what their user would write in torch, on embeddings of CLIP's sizes."""

from __future__ import annotations

import dataclasses
import functools

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


def bf16_case(n: int, d: int, dtype: torch.dtype) -> Case:
    """Products in bf16 against what a user has without them."""
    case = score_case(n, d, dtype)
    ours = functools.partial(llmkern.vas_score, precision="bf16")
    return dataclasses.replace(
        case, name=f"bf16-{case.name}", providers={**case.providers, "llmkern": ours}, products=torch.bfloat16
    )


def selected(indices: Tensor, n: int) -> Tensor:
    return torch.zeros(n, dtype=torch.bool, device=indices.device).index_fill_(0, indices, True)


def top_case(n: int, d: int, dtype: torch.dtype, *, power: float) -> Case:
    """The best 30 % by screening at rank 64, or by all scores. The spectrum falls as k^(-2 power) below its first one;
    at power 0 it is flat, and bounds decide little.
    """

    def rows(n: int, seed: int) -> Tensor:
        scales = torch.arange(1, d + 1) ** -power
        x = torch.randn(n, d, generator=torch.Generator().manual_seed(seed)) + 2 * torch.linspace(-1, 1, d)
        return torch.nn.functional.normalize(x * scales, dim=1)

    def agree(results: dict[str, Tensor], arguments: tuple[Tensor, ...]) -> None:
        x, sigma = arguments
        scores = quadratic(x.double(), sigma)
        cut = scores.topk(3 * n // 10).values[-1]
        # The sets are equal but for scores that float32 does not tell apart.
        for name, mask in results.items():
            differ = mask != results["llmkern"]
            near = (scores - cut).abs() <= 64 * torch.finfo(torch.float32).eps * cut.abs()
            assert bool((~differ | near).all()), f"{name} selects other rows"

    return Case(
        op="vas_top",
        name=f"N{n}-d{d}-30%-{'falling' if power else 'flat'}",
        dtype=dtype,
        shape={"N": n, "D": d, "R": 64},
        inputs=lambda device: (rows(n, 0).to(device, dtype), moment(rows(4 * d, 1)).to(device)),
        providers={
            "llmkern": lambda x, sigma: selected(llmkern.vas_top(x, sigma, 3 * len(x) // 10).indices, len(x)),
            "torch": lambda x, sigma: selected(quadratic(x, sigma).topk(3 * len(x) // 10).indices, len(x)),
        },
        bytes=n * d * dtype.itemsize,
        flops=2 * n * d * 64,
        agree=agree,
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
        bf16_case(131072, 768, FP16),
        *(score_case(n, 512, FP32) for n in (2048, 8192, 32768)),
        score_case(16384, 768, FP32, mode="backward"),
    ]
)
test_tops = measure([top_case(131072, 768, FP16, power=power) for power in (0.5, 0.0)])
test_moments = measure([moment_case(32768, 768, FP16)])
