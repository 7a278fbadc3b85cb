"""The frontier: what each way to combine the two policies earns, and how far it goes from the base."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from scipy.stats import t as student
from torch import Tensor
from transformers import LlamaForCausalLM

from llmkern.demo.base import Context, progress_bar, windows
from llmkern.demo.cache import stage_key
from llmkern.demo.mod import decode as decode_module
from llmkern.demo.mod.decode import Rule, average_logits, decode, sample_averaged_probabilities, sample_mod, sample_one
from llmkern.demo.mod.policies import Scale, rewards

MOD, MERGE, PROBABILITIES, BASE = "MOD", "merging", "probability mean", "base model"
INNER = (0.25, 0.5, 0.75)
# Of the second kind the weights leave the simplex; (1, 1) asks for the sum of both rewards, not their mean.
OUTER = ((1.5, -0.5), (1.0, 1.0))


class Estimate(NamedTuple):
    """A mean over seeds, and half the width of its 95 % interval (Student's t)."""

    mean: float
    half: float

    @classmethod
    def of(cls, per_seed: Tensor) -> Estimate:
        n = len(per_seed)
        half = float(student.ppf(0.975, n - 1)) * per_seed.std().item() / n**0.5
        return cls(per_seed.mean().item(), half)

    def __str__(self) -> str:
        return f"{self.mean:+.2f} ± {self.half:.2f}".replace("-", "\u2212")


@dataclass
class Row:
    """One way of decoding; reward (seeds, 2) and kl (seeds,) are means over the prompts."""

    method: str
    weights: tuple[float, float]
    reward: Tensor
    kl: Tensor
    beta: float

    @property
    def weighted(self) -> Tensor:
        return self.reward @ torch.tensor(self.weights)

    @property
    def objective(self) -> Tensor:
        return self.weighted - self.beta * self.kl


class Setup(NamedTuple):
    """What one row of the table decodes with: the models (the base last) and the rule."""

    method: str
    weights: tuple[float, float]
    models: Callable[[], list[LlamaForCausalLM]]
    rule: Rule


def merge(policies: Sequence[LlamaForCausalLM], weights: Sequence[float], base: LlamaForCausalLM) -> LlamaForCausalLM:
    """base + sum_i w_i (policy_i - base): the weighted average of parameters where the weights sum to one."""
    merged = copy.deepcopy(base)
    with torch.no_grad():
        for target, start, *tuned in zip(merged.parameters(), base.parameters(), *[p.parameters() for p in policies]):
            target.copy_(start + sum(w * (parameter - start) for w, parameter in zip(weights, tuned)))
    return merged


def turn(model: LlamaForCausalLM, seed: int) -> LlamaForCausalLM:
    """The same function from other parameters: MLP units permuted and their signs flipped, queries and keys negated."""
    turned = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in turned.model.layers:
            mlp, attention = layer.mlp, layer.self_attn
            order = torch.randperm(len(mlp.up_proj.weight), generator=generator)
            sign = torch.randint(0, 2, (len(order),), generator=generator).float() * 2 - 1
            # down(silu(gate x) * up x): the sign of a unit passes through up and down, not through gate.
            mlp.gate_proj.weight.copy_(mlp.gate_proj.weight[order])
            mlp.up_proj.weight.copy_(mlp.up_proj.weight[order] * sign[:, None])
            mlp.down_proj.weight.copy_(mlp.down_proj.weight[:, order] * sign)
            attention.q_proj.weight.neg_()
            attention.k_proj.weight.neg_()
    return turned


def setups(policies: list[LlamaForCausalLM], base: LlamaForCausalLM) -> list[Setup]:
    """All rows of the table, in its order."""

    def all_models() -> list[LlamaForCausalLM]:
        return [*policies, base]

    def merging(weights: tuple[float, float], second: LlamaForCausalLM | None = None) -> Setup:
        method = MERGE if second is None else f"{MERGE}, turned"
        tuned = [policies[0], policies[1] if second is None else second]
        return Setup(method, weights, lambda: [merge(tuned, weights, base), base], sample_one(0))

    rows = [Setup(BASE, (0.5, 0.5), lambda: [base], sample_one(0))]
    simplex = [(w, 1 - w) for w in INNER]
    for weights in ((0.0, 1.0), *simplex, (1.0, 0.0), *OUTER):
        rows.append(Setup(MOD, weights, all_models, sample_mod(weights)))
    rows += [merging(weights) for weights in (*simplex, *OUTER)]
    rows += [Setup(PROBABILITIES, w, all_models, sample_averaged_probabilities(w)) for w in simplex]
    half = (0.5, 0.5)
    rows.append(Setup("MOD, forward KL", half, all_models, sample_mod(half, "forward_kl")))
    rows.append(Setup("MOD, alpha = 0.5", half, all_models, sample_mod(half, "alpha", 0.5)))
    rows.append(Setup("MOD, JSD", half, all_models, sample_mod(half, "jsd")))
    rows.append(merging(half, turn(policies[1], seed=0)))
    return rows


def evaluate_all(context: Context, policies: list[LlamaForCausalLM], scale: Scale, policy_key: str) -> list[Row]:
    """Every row decoded from held-out prompts, each row cached by itself."""
    sweep, tuning = context.settings.sweep, context.settings.policy
    key = stage_key(sweep, policy_key, sys.modules[__name__], decode_module)
    prompts = windows(context.corpus.held_out, sweep.prompts, tuning.prompt, seed=101).repeat(sweep.seeds, 1)
    seeds = torch.arange(len(prompts))
    todo = setups(policies, context.model)
    rows = []
    with progress_bar(context.console, "decoding the sweep", len(todo)) as show:
        for done, setup in enumerate(todo):
            show(done, f"{setup.method}, weights {setup.weights[0]:g}, {setup.weights[1]:g}")

            def make(setup: Setup = setup) -> dict[str, Any]:
                out = decode(setup.models(), prompts, tuning.length, setup.rule, seeds)
                reward = rewards(context.corpus.tokenizer, out.tokens, scale)
                by_seed = reward.view(sweep.seeds, sweep.prompts, -1).mean(1)
                return {"reward": by_seed, "kl": out.kl.view(sweep.seeds, sweep.prompts).mean(1)}

            made = context.cache.remember(f"row.{done:02d}", key, make)
            rows.append(Row(setup.method, setup.weights, made["reward"], made["kl"], tuning.beta))
        show(len(todo), "")
    return rows


def logit_averaging_difference(context: Context, policies: list[LlamaForCausalLM]) -> tuple[float, bool]:
    """Largest difference of next-token log-probs between MOD and logits averaged by hand, and if all tokens agree."""
    tuning, weights = context.settings.policy, (0.25, 0.75)
    prompts = windows(context.corpus.held_out, 16, tuning.prompt, seed=102)
    mod, plain = sample_mod(weights), average_logits(weights)
    worst, same = 0.0, True

    def both(logits: Sequence[Tensor], seed: Tensor, step: int) -> tuple[Tensor, Tensor]:
        nonlocal worst, same
        (tokens, ours), (other_tokens, theirs) = mod(logits, seed, step), plain(logits, seed, step)
        worst, same = max(worst, (ours - theirs).abs().max().item()), same and torch.equal(tokens, other_tokens)
        return tokens, ours

    decode([*policies, context.model], prompts, tuning.length, both, torch.arange(len(prompts)))
    return worst, same


def find(rows: Sequence[Row], method: str, weights: tuple[float, float]) -> Row | None:
    """The row; a policy alone is what MOD, merging and averaging all are at a corner."""
    corner = 0.0 in weights
    return next(
        (r for r in rows if r.weights == weights and (r.method == method or (corner and r.method == MOD))), None
    )


def weights_text(weights: tuple[float, float]) -> str:
    return ", ".join(f"{w:g}".replace("0.", ".").replace("-", "\u2212") for w in weights)
