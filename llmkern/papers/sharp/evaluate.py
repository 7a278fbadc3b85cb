"""What a model has learned or lost: loss on texts, and what it writes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llmkern._library import bad_value
from llmkern.papers.sharp.observe import check_ids


@torch.no_grad()
def mean_loss(model: Any, ids: Tensor, batch_size: int = 16) -> float:
    """Nats per token over windows (N, T), every token but the first of each predicted from those before it."""
    check_ids(model, ids)
    if ids.shape[1] < 2:
        raise bad_value("sharp eval", "windows of at least two tokens", tuple(ids.shape))
    total = 0.0
    for batch in ids.split(batch_size):
        logits = model(input_ids=batch[:, :-1], use_cache=False).logits
        total += float(F.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten(), reduction="sum"))
    return total / (ids.shape[0] * (ids.shape[1] - 1))


def perplexity(loss: float) -> float:
    return math.exp(min(loss, 700.0))


@torch.no_grad()
def write_samples(model: Any, tokenizer: Any, prompts: Sequence[str], max_new_tokens: int = 48) -> list[str]:
    """Greedy continuations, one by one."""
    found = []
    for prompt in prompts:
        given = tokenizer(prompt, return_tensors="pt")
        given.pop("token_type_ids", None)
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        out = model.generate(**given, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=pad)
        found.append(tokenizer.decode(out[0, given["input_ids"].shape[1] :], skip_special_tokens=True))
    return found
