"""Texts for the eye, drawn the way a user would: ``MixtureForCausalLM.generate``."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from transformers import LlamaForCausalLM

from llmkern.demo.base import Context, windows
from llmkern.demo.mod.evaluate import merge
from llmkern.integrations.transformers import MixtureForCausalLM

FILTERS: dict[str, Any] = {"do_sample": True, "temperature": 0.8, "top_k": 0, "top_p": 0.95}


class Samples(NamedTuple):
    """One prompt and what followed it under each way of decoding, by title."""

    prompt: str
    continuations: dict[str, str]


def draw_samples(context: Context, policies: list[LlamaForCausalLM]) -> list[Samples]:
    """The same two prompts and the same random numbers for every way of decoding."""
    tuning = context.settings.policy
    prompts = windows(context.corpus.held_out, 2, tuning.prompt, seed=104)
    options: dict[str, Any] = {
        **FILTERS,
        "max_new_tokens": 2 * tuning.length,
        "attention_mask": torch.ones_like(prompts),
    }
    mixture = MixtureForCausalLM(policies, weights=[0.5, 0.5])
    texts = {"base model": MixtureForCausalLM([context.model], weights=[1.0]).generate(prompts, seed=7, **options)}
    for title, weights in (
        ("policy 1: comments", [1.0, 0.0]),
        ("policy 2: calls", [0.0, 1.0]),
        ("MOD, weights 0.5, 0.5", [0.5, 0.5]),
        ("MOD, weights 0.25, 0.75", [0.25, 0.75]),
    ):
        texts[title] = mixture.generate(prompts, weights=weights, seed=7, **options)
    merged = MixtureForCausalLM([merge(policies, [0.5, 0.5], context.model)], weights=[1.0])
    texts["parameter merging, weights 0.5, 0.5"] = merged.generate(prompts, seed=7, **options)
    decode = context.corpus.tokenizer.decode
    given = prompts.shape[1]
    return [
        Samples(
            decode(prompt.tolist()),
            {title: decode(ids[i, given:].tolist(), skip_special_tokens=False) for title, ids in texts.items()},
        )
        for i, prompt in enumerate(prompts)
    ]
