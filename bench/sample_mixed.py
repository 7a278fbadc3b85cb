"""sample_mixed against mixing in torch and sampling with Hugging Face's processors."""

from __future__ import annotations

from collections.abc import Callable

import torch
from _harness import Case, measure
from mix_logits import WEIGHTS, language_like, reverse_kl
from torch import Tensor
from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

import llmkern

Sampler = Callable[[list[Tensor], Tensor], tuple[Tensor, Tensor]]


def ours(**filters: float) -> Sampler:
    return lambda logits, weights: llmkern.sample_mixed(logits, weights, seed=0, **filters)


def hugging_face(**filters: float) -> Sampler:
    """The chain that generate() runs on the mixed scores."""
    warpers = []
    if filters.get("temperature", 1.0) not in (0.0, 1.0):
        warpers.append(TemperatureLogitsWarper(filters["temperature"]))
    if "top_k" in filters:
        warpers.append(TopKLogitsWarper(filters["top_k"]))
    if "top_p" in filters:
        warpers.append(TopPLogitsWarper(filters["top_p"]))
    if "min_p" in filters:
        warpers.append(MinPLogitsWarper(filters["min_p"]))

    def sample(logits: list[Tensor], weights: Tensor) -> tuple[Tensor, Tensor]:
        log_probs = reverse_kl([row.float() for row in logits], weights)
        if filters.get("temperature") == 0.0:
            tokens = log_probs.argmax(-1, keepdim=True)
        else:
            scores = log_probs
            for warper in warpers:
                scores = warper(None, scores)
            tokens = torch.multinomial(scores.softmax(-1), 1)
        return tokens.squeeze(-1), log_probs.gather(-1, tokens).squeeze(-1)

    return sample


def agree(results: dict[str, tuple[Tensor, Tensor]], arguments: tuple[list[Tensor], Tensor]) -> None:
    """Each provider's log-prob is that of its own token; what they draw is random, and tested in tests/."""
    truth = reverse_kl([row.double() for row in arguments[0]], arguments[1].double())
    for name, (tokens, log_probs) in results.items():
        error = (truth.gather(-1, tokens.unsqueeze(-1)).squeeze(-1) - log_probs).abs().max()
        allowed = 16 * torch.finfo(torch.float32).eps * float(truth.abs().max())
        assert error <= allowed, f"{name}: log-probs are off by {error:.3g}, allowed is {allowed:.3g}"


def greedy_agree(results: dict[str, tuple[Tensor, Tensor]], arguments: tuple[list[Tensor], Tensor]) -> None:
    agree(results, arguments)
    truth = reverse_kl([row.double() for row in arguments[0]], arguments[1].double())
    for name, (_, log_probs) in results.items():
        assert (truth.amax(-1) - log_probs).abs().max() < 1e-4, f"{name} is not greedy"


def case(
    label: str, rows: int, vocabulary: int, *, flat: bool = False, dtype: torch.dtype = torch.bfloat16, **filters: float
) -> Case:
    def inputs(device: str) -> tuple[list[Tensor], Tensor]:
        weights = torch.tensor(WEIGHTS, device=device)
        if flat:
            return [torch.randn(rows, vocabulary).to(device, dtype) for _ in WEIGHTS], weights
        return language_like(rows, vocabulary, dtype, device), weights

    chain = hugging_face(**filters)
    providers = {"llmkern": ours(**filters), "transformers": chain}
    if filters.get("temperature") == 0.0:
        # Greedy needs no processors: the peers are torch itself, eager and compiled.
        providers = {"llmkern": ours(**filters), "torch": chain, "torch.compile": torch.compile(chain)}
    return Case(
        op="sample_mixed",
        name=f"{label}{'-flat' if flat else ''}-B{rows}-V{vocabulary}",
        dtype=dtype,
        shape={"M": len(WEIGHTS), "B": rows, "V": vocabulary},
        inputs=inputs,
        providers=providers,
        bytes=len(WEIGHTS) * rows * vocabulary * dtype.itemsize,
        base="torch" if "torch" in providers else "transformers",
        agree=greedy_agree if filters.get("temperature") == 0.0 else agree,
    )


SIZES = [(1, 32000), (8, 128256), (64, 151936)]
test_greedy = measure(case("greedy", *size, temperature=0.0) for size in SIZES)
test_top_p = measure(case("top_p", *size, top_p=0.9) for size in SIZES)
test_top_p_flat = measure(case("top_p", *size, flat=True, top_p=0.9) for size in SIZES[1:])
test_filters = measure(
    [
        case("plain", 8, 128256),
        case("top_k", 8, 128256, top_k=50),
        case("all", 8, 128256, temperature=0.8, top_k=50, top_p=0.95, min_p=0.01),
    ]
)
