"""Two policies tuned from the base model, each towards its own objective, held to the base by reverse KL.

Gradient ascent on J(pi) = E[R(y)] - beta KL(pi || base), the objective whose optima the mixing of logits assumes. With
k_t the KL of the next-token distributions at step t, which is summed over the whole vocabulary,

    grad J = E[ sum_t (R - c_t - beta sum_{s > t} k_s - b_t) grad log pi(y_t) ] - beta E[ sum_t grad k_t ],

where the continuations y are drawn from the policy as it stands. Two terms take noise away and leave the mean as it
is: c_t, the part of the reward that the tokens before t have brought in, and b_t, the mean of what stands before it
over the other continuations of the same prompt.
"""

from __future__ import annotations

import copy
import sys
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import LlamaForCausalLM

from llmkern.demo.base import Context, progress_bar, windows
from llmkern.demo.cache import resumable_steps, stage_key
from llmkern.demo.mod import rewards as rewards_module
from llmkern.demo.mod.rewards import OBJECTIVES

PREFIX_STEP = 4


class Scale(NamedTuple):
    """Mean and standard deviation of each objective over continuations of the base, which make rewards comparable."""

    mean: Tensor
    deviation: Tensor


def objective_values(tokenizer: Tokenizer, tokens: Tensor) -> Tensor:
    """(B, 2): the two objectives of each continuation, in their own units."""
    texts = tokenizer.decode_batch(tokens.tolist(), skip_special_tokens=False)
    return torch.tensor([[measure(text) for measure in OBJECTIVES.values()] for text in texts])


def rewards(tokenizer: Tokenizer, tokens: Tensor, scale: Scale) -> Tensor:
    """(B, 2): the objectives in standard deviations above the mean of the base."""
    return (objective_values(tokenizer, tokens) - scale.mean) / scale.deviation


def rewards_so_far(tokenizer: Tokenizer, tokens: Tensor, scale: Scale, index: int) -> Tensor:
    """(B, length): what the tokens before each one contribute to the reward, brought up to date every fourth token.

    Both objectives are shares, so a beginning counts by its part of the length.
    """
    length = tokens.shape[1]
    earned = torch.zeros(tokens.shape)
    for t in range(PREFIX_STEP, length, PREFIX_STEP):
        part = rewards(tokenizer, tokens[:, :t], scale)[:, index] * (t / length)
        earned[:, t : t + PREFIX_STEP] = part[:, None]
    return earned


def load_policies(context: Context) -> tuple[list[LlamaForCausalLM], Scale, str]:
    """The tuned policies in the order of the objectives, the scale of the rewards, and a key for what follows."""
    settings = context.settings.policy
    key = stage_key(settings, context.model_key, sys.modules[__name__], rewards_module)
    made = context.cache.remember("scale", key, lambda: _measure_scale(context))
    scale = Scale(made["mean"], made["deviation"])
    policies = []
    for index, name in enumerate(OBJECTIVES):
        policy = copy.deepcopy(context.model)
        tuned = context.cache.load(f"policy.{name}", key)
        if tuned is None:
            tuned = _tune(context, policy, scale, index, name, key)
            context.cache.save(f"policy.{name}", key, tuned)
            context.cache.remove(f"policy.{name}.partial", key)
        policy.load_state_dict(tuned["model"])
        policies.append(policy.eval().requires_grad_(False))
    return policies, scale, key


def _measure_scale(context: Context) -> dict[str, Any]:
    settings = context.settings.policy
    count = settings.scale_sequences
    prompts = windows(context.corpus.train, count, settings.prompt, settings.seed)
    tokens = continuations(context.model, prompts, settings.length, settings.seed)
    values = objective_values(context.corpus.tokenizer, tokens)
    # A miniature model may never write a call or a comment; its rewards are then all zero rather than NaN.
    return {"mean": values.mean(0), "deviation": values.std(0).clamp(min=1e-3)}


def _tune(context: Context, policy: LlamaForCausalLM, scale: Scale, index: int, name: str, key: str) -> dict[str, Any]:
    settings = context.settings.policy
    policy.requires_grad_(True)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=settings.learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    history: list[list[float]] = []
    steps = resumable_steps(context.cache, f"policy.{name}", key, policy, optimizer, settings.steps, history)
    with progress_bar(context.console, f"tuning the policy for {name}", settings.steps) as show:
        for step in steps:
            for group in optimizer.param_groups:
                group["lr"] = settings.learning_rate * min(1.0, 2 * (1 - step / settings.steps))
            number = 1_000_000 * (index + 1) + step
            prompts = windows(context.corpus.train, settings.prompts, settings.prompt, number)
            prompts = prompts.repeat_interleave(settings.samples, 0)
            tokens = continuations(policy.eval(), prompts, settings.length, number)
            reward = rewards(context.corpus.tokenizer, tokens, scale)[:, index]
            earned = rewards_so_far(context.corpus.tokenizer, tokens, scale, index)
            loss, kl = negative_objective(
                policy, context.model, prompts, tokens, reward[:, None] - earned, settings.samples, settings.beta
            )
            loss.backward()
            torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            history.append([step + 1, reward.mean().item(), kl.mean().item()])
            show(step + 1, f"reward {reward.mean().item():+.2f}, KL {kl.mean().item():.2f} nats")
    return {"model": policy.state_dict(), "history": history}


def negative_objective(
    policy: LlamaForCausalLM,
    base: LlamaForCausalLM,
    prompts: Tensor,
    tokens: Tensor,
    gain: Tensor,
    samples: int,
    beta: float,
) -> tuple[Tensor, Tensor]:
    """A scalar whose gradient is that of -J as the module's formula has it, and the KL of each sequence (B,).

    gain (B, length) is R - c_t. Rows are ordered by prompt, ``samples`` continuations each.
    """
    with torch.no_grad():
        base_rows = continuation_log_probs(base, prompts, tokens)
    rows = continuation_log_probs(policy, prompts, tokens)
    kl = (rows.exp() * (rows - base_rows)).sum(-1)
    spent = kl.detach()
    later = spent.flip(1).cumsum(1).flip(1) - spent
    rest = (gain - beta * later).view(-1, samples, spent.shape[1])
    advantage = (rest - rest.mean(1, keepdim=True)).view_as(spent) * samples / (samples - 1)
    chosen = rows.gather(-1, tokens[..., None]).squeeze(-1)
    return (beta * kl - advantage * chosen).sum(1).mean(), spent.sum(1)


@torch.no_grad()
def continuations(model: Any, prompts: Tensor, length: int, seed: int) -> Tensor:
    """(B, length) tokens drawn by ``generate`` at temperature one, a function of the seed."""
    options: dict[str, Any] = {"do_sample": True, "top_k": 0, "max_new_tokens": length}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return model.generate(prompts, attention_mask=torch.ones_like(prompts), **options)[:, prompts.shape[1] :]


def continuation_log_probs(model: LlamaForCausalLM, prompts: Tensor, tokens: Tensor) -> Tensor:
    """Log-probs (B, length, V) of the distributions that each token of the continuation is drawn from."""
    ids = torch.cat([prompts, tokens], 1)[:, :-1]
    return model(input_ids=ids, use_cache=False, logits_to_keep=tokens.shape[1]).logits.log_softmax(-1)
