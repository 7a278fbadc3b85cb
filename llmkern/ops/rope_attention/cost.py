"""Predicted seconds of each route, from rates measured on two cores of a Zen 3 (AVX2); their ratios carry over."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from llmkern.ops.rope_attention.arguments import Arguments

# Exact attention, useful operations a second of one thread by log2 of the head size: small heads feed it badly.
_EXACT_RATES = {0: 3e9, 3: 22e9, 4: 40e9, 5: 54e9, 6: 60e9, 7: 70e9}
# Of heads of 8 or more, pairs of multiplication and addition a second of one thread.
SLOWEST_RATE = 11e9
# Share of the full time that it takes under a causal mask.
_EXACT_CAUSAL = 0.58
# The passes over features; pairs within chunks, exponentials and all; a number of q, k or v read and written again.
_POLYNOMIAL_RATE, _CHUNK_RATE, _TOUCH_RATE = 55e9, 6.5e9, 0.5e9
# A causal pass sums half of the keys twice.
_CAUSAL_KEYS = 1.5
# Python, planning and waking threads.
_FIXED_SECONDS = 1.5e-3
# What a prediction must promise before a polynomial is taken: predictions err.
GAIN = 1.2


@dataclass(frozen=True)
class Work:
    """Sizes of one call; ``rows`` and ``keys`` of one head, ``heads`` over the batch."""

    heads: int
    kv_heads: int
    rows: int
    keys: int
    dim: int
    value_dim: int
    is_causal: bool
    chunk: int

    @staticmethod
    def of(args: Arguments, is_causal: bool, chunk: int) -> Work:
        b, hq, n, d = args.q.shape
        rows, keys, heads, kv_heads = n, args.k.shape[2], b * hq, b * args.k.shape[1]
        if args.cu_q is not None and args.cu_k is not None and len(args.cu_q) > 1:
            # As if all sequences were as long as one that has the mean number of pairs.
            count = len(args.cu_q) - 1
            pairs = float((args.cu_q.diff().double() * args.cu_k.diff().double()).sum()) / count
            rows = keys = math.ceil(math.sqrt(pairs))
            heads, kv_heads = heads * count, kv_heads * count
        return Work(heads, kv_heads, rows, keys, d, args.v.shape[3], is_causal, chunk)


def exact_seconds(work: Work) -> float:
    size = math.log2(max(1.0, (work.dim + work.value_dim) / 2))
    known = sorted(_EXACT_RATES)
    low = max((s for s in known if s <= size), default=known[0])
    high = min((s for s in known if s >= size), default=known[-1])
    share = 0.0 if low == high else (size - low) / (high - low)
    rate = math.exp(math.log(_EXACT_RATES[low]) * (1 - share) + math.log(_EXACT_RATES[high]) * share)
    pairs = work.heads * work.rows * work.keys * (_EXACT_CAUSAL if work.is_causal else 1.0)
    return pairs * 2 * (work.dim + work.value_dim) / (rate * torch.get_num_threads())


def polynomial_seconds(work: Work, features: int) -> float:
    tokens_q, tokens_k = work.heads * work.rows, work.kv_heads * work.keys
    passes = tokens_q + tokens_k * (_CAUSAL_KEYS if work.is_causal else 1.0)
    seconds = 2 * features * (work.value_dim + 2) * passes / _POLYNOMIAL_RATE
    seconds += (tokens_q + tokens_k) * (work.dim + work.value_dim) / _TOUCH_RATE
    if work.is_causal:
        seconds += tokens_q * work.chunk * (work.dim + work.value_dim) / _CHUNK_RATE
    threads = torch.get_num_threads() if work.kv_heads > 1 else min(2, torch.get_num_threads())
    return seconds / threads + _FIXED_SECONDS
