"""Parts of the decoding loop of ``llmkern.integrations.transformers`` that know nothing of its models."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from llmkern._library import bad_type, bad_value

# What sample_mixed does itself, in the order in which it does it, which is the order in which generate lists them.
_FILTERS = {
    TemperatureLogitsWarper: "temperature",
    TopKLogitsWarper: "top_k",
    TopPLogitsWarper: "top_p",
    MinPLogitsWarper: "min_p",
}
# Between the seeds of the sequences that one request asks for: odd, so that no two of 2^64 coincide.
_SEED_STRIDE = -0x61C8864680B583EB


class MixtureCache:
    """The ``past_key_values`` of a mixture: a cache for each group of models that run as one batch.

    ``caches`` goes from the places of a group's models to their cache, whose rows are those of the first model, then
    those of the second. ``carry`` (B, M) holds the running log-probabilities of prefix mode.
    """

    is_compileable = False

    def __init__(self) -> None:
        self.caches: dict[tuple[int, ...], Any] = {}
        self.carry: Tensor | None = None
        self.rows: int | None = None

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return next((cache.get_seq_length() for cache in self.caches.values()), 0)

    def crop(self, tokens: int) -> None:
        """As ``Cache.crop`` of each model."""
        if self.carry is not None:
            raise bad_value("MixtureCache.crop", "prefix=False", True, "the log-probabilities of the past are not kept")
        for cache in self.caches.values():
            cache.crop(tokens)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row b becomes what row ``beam_idx[b]`` was, in every model."""
        for group, cache in self.caches.items():
            shifts = torch.arange(len(group), device=beam_idx.device).unsqueeze(-1) * (self.rows or 0)
            cache.reorder_cache((shifts + beam_idx).flatten())
        self.carry = None if self.carry is None else self.carry[beam_idx.to(self.carry.device)]


class Rows(NamedTuple):
    """Arguments of one mix, on one device and of one dtype: logits M x (B, V), weights (B, M), reference (B, V)."""

    logits: list[Tensor]
    weights: Tensor
    reference: Tensor | None

    @classmethod
    def of(cls, rows: Sequence[Tensor], weights: Tensor, with_reference: bool) -> Rows:
        """From the logits of the policies, followed by the reference's if it takes part."""
        dtype = rows[0].dtype
        for row in rows[1:]:
            dtype = torch.promote_types(dtype, row.dtype)
        alike = [row.to(rows[0].device, dtype) for row in rows]
        reference = alike.pop() if with_reference else None
        return cls(alike, weights.to(rows[0].device), reference)

    def at_least(self, dtype: torch.dtype) -> Rows:
        wide = torch.promote_types(self.logits[0].dtype, dtype)
        reference = None if self.reference is None else self.reference.to(wide)
        return Rows([row.to(wide) for row in self.logits], self.weights, reference)


def fused_filters(processors: Sequence[Any]) -> dict[str, Any] | None:
    """The processors as arguments of ``sample_mixed``, or None where it does not do what they do."""
    found: dict[str, Any] = {}
    order = list(_FILTERS.values())
    for processor in processors:
        name = _FILTERS.get(type(processor))
        if name is None or any(order.index(name) <= order.index(earlier) for earlier in found):
            return None
        if (
            getattr(processor, "min_tokens_to_keep", 1) != 1
            or getattr(processor, "filter_value", -math.inf) > -math.inf
        ):
            return None
        found[name] = getattr(processor, name)
    return found


def request_seeds(op: str, seed: int | Sequence[int] | Tensor, rows: int, device: torch.device) -> int | Tensor:
    """The seed of generate as an integer for all rows, or (B,) int64, one a request."""
    if isinstance(seed, int) and not isinstance(seed, bool):
        return seed
    seeds = torch.as_tensor(seed)
    if seeds.is_floating_point() or seeds.is_complex() or seeds.dtype == torch.bool:
        raise bad_type(op, "seed as an integer, or (B,) integers", seed)
    if seeds.shape != (rows,):
        raise bad_value(op, f"seed as one integer or of shape ({rows},), one per request", tuple(seeds.shape))
    return seeds.to(device, torch.int64)


def sequence_seeds(seed: int | Tensor | None, per_request: int) -> int | Tensor:
    """Seed of each row, where row r is sequence r % per_request of its request."""
    if seed is None:
        return int(torch.randint(2**63 - 1, ()))
    if isinstance(seed, int):
        return seed
    return seed + torch.arange(seed.shape[0], device=seed.device) % per_request * _SEED_STRIDE


def row_lengths(input_ids: Tensor, attention_mask: Tensor | None) -> int | Tensor:
    """Tokens of each row without its padding: a position that the rows around it have no part in."""
    return input_ids.shape[1] if attention_mask is None else attention_mask.sum(-1)


def token_log_probs(logits: Tensor, tokens: Tensor) -> Tensor:
    """Log-probability (B,) in fp32 of the chosen tokens (B,) under one model."""
    wide = logits.float()
    return wide.gather(-1, tokens.unsqueeze(-1)).squeeze(-1) - wide.logsumexp(-1)
