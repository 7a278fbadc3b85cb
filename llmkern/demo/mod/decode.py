"""One decode loop for everything that is compared: only the rule that turns M rows of logits into tokens changes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from transformers import DynamicCache, LlamaForCausalLM

import llmkern


class Rule(Protocol):
    """From next-token logits, one (B, V) a model, to tokens (B,) and the log-probs (B, V) that they were drawn from."""

    def __call__(self, logits: Sequence[Tensor], seed: Tensor, step: int) -> tuple[Tensor, Tensor]: ...


class Decoded(NamedTuple):
    """Continuations (B, length), and for each the sum over its steps of KL(rule || last model), in nats."""

    tokens: Tensor
    kl: Tensor


@torch.no_grad()
def decode(models: Sequence[LlamaForCausalLM], prompts: Tensor, length: int, rule: Rule, seed: Tensor) -> Decoded:
    """Continue prompts (B, P) by ``length`` tokens; the last model is the one from which KL is measured.

    The KL of a step is summed over the whole vocabulary, not estimated from the token drawn: the same mean, less noise.
    Seeds (B,) belong to the sequence: the same seed under another rule draws with the same numbers. Draws count from
    the start of the prompt, as in ``MixtureForCausalLM``.
    """
    caches = [DynamicCache() for _ in models]
    new, tokens = prompts, []
    kl = torch.zeros(len(prompts))
    for step in range(length):
        logits = [
            model(input_ids=new, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
            for model, cache in zip(models, caches)
        ]
        drawn, log_probs = rule(logits, seed, prompts.shape[1] + step)
        base = logits[-1].log_softmax(-1)
        kl += (log_probs.exp() * (log_probs.clamp(min=-1e4) - base)).sum(-1)
        tokens.append(drawn)
        new = drawn[:, None]
    return Decoded(torch.stack(tokens, 1), kl)


def sample_one(model: int) -> Rule:
    """The plain sampler of one of the models, temperature one."""

    def rule(logits: Sequence[Tensor], seed: Tensor, step: int) -> tuple[Tensor, Tensor]:
        tokens, _ = llmkern.sample_mixed([logits[model]], [1.0], seed=seed, step=step)
        return tokens, llmkern.mix_logits([logits[model]], [1.0])

    return rule


def sample_mod(weights: Sequence[float], divergence: str = "reverse_kl", alpha: float | None = None) -> Rule:
    """Multi-objective decoding of all models but the last, which is the reference."""

    def rule(logits: Sequence[Tensor], seed: Tensor, step: int) -> tuple[Tensor, Tensor]:
        policies, reference = list(logits[:-1]), logits[-1]
        options: dict[str, Any] = {"reference": reference, "divergence": divergence, "alpha": alpha}
        tokens, _ = llmkern.sample_mixed(policies, weights, seed=seed, step=step, **options)
        return tokens, llmkern.mix_logits(policies, weights, **options)

    return rule


def weighted_sum(rows: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Over the rows that have a weight; the last model has none."""
    return torch.stack([w * row for w, row in zip(weights, rows)]).sum(0)


def sample_averaged_probabilities(weights: Sequence[float]) -> Rule:
    """The arithmetic mean of the policies' next-token probabilities."""

    def rule(logits: Sequence[Tensor], seed: Tensor, step: int) -> tuple[Tensor, Tensor]:
        log_probs = weighted_sum([row.softmax(-1) for row in logits], weights).log()
        tokens, _ = llmkern.sample_mixed([log_probs], [1.0], seed=seed, step=step)
        return tokens, log_probs

    return rule


def average_logits(weights: Sequence[float]) -> Rule:
    """Logits averaged by hand: what MOD under reverse KL is where the weights sum to one."""

    def rule(logits: Sequence[Tensor], seed: Tensor, step: int) -> tuple[Tensor, Tensor]:
        log_probs = weighted_sum(logits, weights).log_softmax(-1)
        tokens, _ = llmkern.sample_mixed([log_probs], [1.0], seed=seed, step=step)
        return tokens, log_probs

    return rule
