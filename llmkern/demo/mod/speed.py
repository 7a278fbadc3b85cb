"""The sampler against the chain of Hugging Face's processors: in a decode loop, and alone at a real vocabulary."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    LlamaForCausalLM,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

import llmkern
from llmkern.demo.base import Context, progress_bar, windows
from llmkern.demo.mod.decode import weighted_sum

Pick = Callable[[Sequence[Tensor], int], Tensor]
FILTERS: dict[str, Any] = {"temperature": 0.8, "top_k": 50, "top_p": 0.9}


class Speed(NamedTuple):
    """Medians: tokens per second of the loop, share of its time in the sampler, seconds of one call alone."""

    loop_tokens: dict[str, float]
    loop_share: dict[str, float]
    call_seconds: dict[str, float]


def llmkern_sampler(weights: Sequence[float]) -> Pick:
    return lambda logits, step: llmkern.sample_mixed(logits, weights, seed=0, step=step, **FILTERS)[0]


def hugging_face_sampler(weights: Sequence[float]) -> Pick:
    """Mix in torch, then what generate() does: processors in float32, softmax, multinomial."""
    chain = LogitsProcessorList(
        [
            TemperatureLogitsWarper(FILTERS["temperature"]),
            TopKLogitsWarper(FILTERS["top_k"]),
            TopPLogitsWarper(FILTERS["top_p"]),
        ]
    )

    def pick(logits: Sequence[Tensor], step: int) -> Tensor:
        mixed = weighted_sum([row.float().log_softmax(-1) for row in logits], weights)
        ids: Any = torch.zeros(len(logits[0]), 0, dtype=torch.long)
        return torch.multinomial(chain(ids, mixed).softmax(-1), 1).squeeze(1)

    return pick


SAMPLERS: dict[str, Callable[[Sequence[float]], Pick]] = {
    "llmkern": llmkern_sampler,
    "Hugging Face chain": hugging_face_sampler,
}


@torch.no_grad()
def timed_loop(models: Sequence[LlamaForCausalLM], prompts: Tensor, length: int, pick: Pick) -> tuple[float, float]:
    """Seconds of the whole loop after the prompt, and seconds in the sampler."""
    caches = [DynamicCache() for _ in models]
    new, inside, start = prompts, 0.0, 0.0
    for step in range(length + 1):
        logits = [
            m(input_ids=new, past_key_values=c, use_cache=True, logits_to_keep=1).logits[:, -1]
            for m, c in zip(models, caches)
        ]
        before = time.perf_counter()
        new = pick(logits, step)[:, None]
        after = time.perf_counter()
        if step == 0:
            start = after
        else:
            inside += after - before
    return time.perf_counter() - start, inside


def measure_speed(context: Context, policies: list[LlamaForCausalLM]) -> Speed:
    """Both samplers in turns, so that a change of the machine's load meets both."""
    sizes = context.settings.speed
    prompts = windows(context.corpus.held_out, sizes.batch, context.settings.policy.prompt, seed=103)
    pair = [0.5, 0.5]
    loop: dict[str, list[tuple[float, float]]] = {name: [] for name in SAMPLERS}
    call: dict[str, list[float]] = {name: [] for name in SAMPLERS}
    weights = [1 / sizes.models] * sizes.models
    generator = torch.Generator().manual_seed(0)
    logits = [
        (4 * torch.randn(sizes.micro_batch, sizes.vocabulary, generator=generator)).bfloat16()
        for _ in range(sizes.models)
    ]
    with progress_bar(context.console, "timing the samplers", sizes.repeats + sizes.micro_repeats) as show:
        # The first round of each warms up and is left out.
        for round_ in range(sizes.repeats + 1):
            for name, make in SAMPLERS.items():
                loop[name].append(timed_loop(policies, prompts, sizes.length, make(pair)))
            show(round_, "decode loop")
        for round_ in range(sizes.micro_repeats + 1):
            for name, make in SAMPLERS.items():
                pick = make(weights)
                start = time.perf_counter()
                pick(logits, round_)
                call[name].append(time.perf_counter() - start)
            show(sizes.repeats + round_, f"one call, {sizes.vocabulary} tokens")
    tokens = sizes.batch * sizes.length
    return Speed(
        {name: tokens / statistics.median(total for total, _ in times[1:]) for name, times in loop.items()},
        {name: statistics.median(inside / total for total, inside in times[1:]) for name, times in loop.items()},
        {name: statistics.median(times[1:]) for name, times in call.items()},
    )
