"""Predicted seconds of each route, from rates measured on one core."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from llmkern.ops.rope_attention.arguments import Arguments


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

    @staticmethod
    def of(args: Arguments, is_causal: bool) -> Work:
        b, hq, n, d = args.q.shape
        return Work(b * hq, b * args.k.shape[1], n, args.k.shape[2], d, args.v.shape[3], is_causal)


def exact_seconds(work: Work) -> float:
    pairs = work.rows * work.keys * (0.75 if work.is_causal else 1.0)
    rate = 45e9 * min(1.0, work.dim / 32) * math.sqrt(torch.get_num_threads())
    return work.heads * pairs * 2 * (work.dim + work.value_dim) / rate


def polynomial_seconds(work: Work, features: int) -> float:
    width = work.value_dim + 2
    flops = 2 * features * width * (work.heads * work.rows + work.kv_heads * work.keys)
    if work.is_causal:
        flops += work.heads * work.rows * 256 * 2 * (work.dim + work.value_dim)
    return flops / (40e9 * math.sqrt(torch.get_num_threads())) + 1e-3
