"""norm_sim, neg_clip_loss and clip_loss against what their user would write in torch, on embeddings of CLIP's sizes."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from _harness import Case, measure
from torch import Tensor

import llmkern

TEMPERATURE = 0.01


def unit_rows(n: int, d: int, seed: int) -> Tensor:
    return F.normalize(torch.randn(n, d, generator=torch.Generator().manual_seed(seed)), dim=1)


def text_for(image: Tensor) -> Tensor:
    """Similarities of pairs as CLIP has them: far nearer, scores and gradients would be rounding."""
    return F.normalize(image + 6 * unit_rows(*image.shape, seed=7), dim=1)


def wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def nearest(x: Tensor, target: Tensor) -> Tensor:
    return (wide(x) @ wide(target).t()).abs().amax(1)


def one_batch(image: Tensor, text: Tensor) -> Tensor:
    s = wide(image) @ wide(text).t()
    z = s / TEMPERATURE
    return s.diagonal() - 0.5 * TEMPERATURE * (z.logsumexp(0) + z.logsumexp(1))


def ours_one_batch(image: Tensor, text: Tensor, precision: str = "fp32") -> Tensor:
    return llmkern.neg_clip_loss(
        image, text, temperature=TEMPERATURE, batch_size=len(image), num_partitions=1, precision=precision
    )


def cross_entropies(image: Tensor, text: Tensor, logit_scale: Tensor) -> Tensor:
    """As in open_clip."""
    logits, own = logit_scale * image @ text.t(), torch.arange(len(image), device=image.device)
    return 0.5 * (F.cross_entropy(logits, own) + F.cross_entropy(logits.t(), own))


def with_bf16(case: Case, ours: Callable[..., Tensor]) -> list[Case]:
    """The case, and the same with products in bf16 against what a user has without them."""
    providers = {**case.providers, "llmkern": functools.partial(ours, precision="bf16")}
    return [
        case,
        dataclasses.replace(case, name=f"bf16-{case.name}", providers=providers, products=torch.bfloat16),
    ]


def norm_case(n: int, m: int, d: int, dtype: torch.dtype) -> Case:
    return Case(
        op="norm_sim",
        name=f"inf-N{n}-M{m}-d{d}",
        dtype=dtype,
        shape={"N": n, "M": m, "D": d},
        inputs=lambda device: (unit_rows(n, d, 0).to(device, dtype), unit_rows(m, d, 1).to(device, dtype)),
        providers={"llmkern": llmkern.norm_sim, "torch": nearest, "torch.compile": torch.compile(nearest)},
        bytes=(n + m) * d * dtype.itemsize,
        flops=2 * n * m * d,
    )


def batch_case(b: int, d: int, dtype: torch.dtype) -> Case:
    def inputs(device: str) -> tuple[Tensor, Tensor]:
        image = unit_rows(b, d, 0)
        return image.to(device, dtype), text_for(image).to(device, dtype)

    return Case(
        op="neg_clip_loss",
        name=f"B{b}-d{d}-K1",
        dtype=dtype,
        shape={"B": b, "D": d},
        inputs=inputs,
        providers={"llmkern": ours_one_batch, "torch": one_batch, "torch.compile": torch.compile(one_batch)},
        bytes=2 * b * d * dtype.itemsize,
        flops=2 * b * b * d,
        sweep="B" if d == 512 else None,
    )


def loss_case(b: int, d: int, dtype: torch.dtype) -> Case:
    def inputs(device: str) -> tuple[Tensor, ...]:
        image = unit_rows(b, d, 0)
        scale = torch.tensor(1 / TEMPERATURE, device=device)
        return image.to(device, dtype), text_for(image).to(device, dtype), scale

    return Case(
        op="clip_loss",
        name=f"B{b}-d{d}",
        dtype=dtype,
        shape={"B": b, "D": d},
        inputs=inputs,
        providers={
            "llmkern": llmkern.clip_loss,
            "torch": cross_entropies,
            "torch.compile": torch.compile(cross_entropies),
        },
        bytes=4 * b * d * dtype.itemsize,
        flops=8 * b * b * d,
        mode="full",
    )


FP16, FP32 = torch.float16, torch.float32
test_norms = measure(with_bf16(norm_case(32768, 10000, 768, FP16), llmkern.norm_sim))
test_batches = measure(
    [
        *with_bf16(batch_case(16384, 768, FP16), ours_one_batch),
        *(batch_case(b, 512, FP32) for b in (1024, 2048, 4096)),
    ]
)
test_losses = measure([loss_case(8192, 768, FP32)])
