"""Predicted seconds of each route, from rates that bench/_rope_rates.py measures."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from llmkern._library import cpu_build
from llmkern.ops.rope_attention.arguments import Arguments

# Head sizes at which torch's attention is known: small ones feed it badly.
SIZES = (8, 16, 32, 64, 128, 256)
# A causal pass sums half of the keys twice.
CAUSAL_KEYS = 1.5
# Python, planning and waking threads.
FIXED_SECONDS = 1.2e-3
# What gradients add: to torch's attention and to tiles, whose gradient is mostly torch's, so many forward passes of
# torch's; to a polynomial so many of its own.
TORCH_BACKWARD, POLYNOMIAL_BACKWARD = 2.5, 2.0
# Columns that a register of pairs is full of.
PAIRED_WIDTH = 16
# What a prediction must promise before a polynomial is taken: predictions err.
GAIN = 1.2


@dataclass(frozen=True)
class Rates:
    """Seconds of one thread.

    Attributes:
        torch_pair: of a pair in torch's attention, by head size (SIZES); torch_causal: share under a causal mask.
        tile_pair, tile_number: of a pair in exact tiles, and of a number of q and v in it; tile_causal: share.
        product, token, number: of the passes over features: a multiplication and addition, a token, a number of it.
        product_bf16: of pairs of bfloat16, where ``CpuBuild.info`` has them.
        chunk_pair, chunk_number: of pairs within chunks.
    """

    torch_pair: tuple[float, ...]
    torch_causal: float
    tile_pair: float
    tile_number: float
    tile_causal: float
    product: float
    token: float
    number: float
    chunk_pair: float
    chunk_number: float
    product_bf16: float = math.inf

    @property
    def slowest(self) -> float:
        """Pairs of multiplication and addition a second of torch's attention, heads of 8 or more."""
        return min(2 * size / seconds for size, seconds in zip(SIZES, self.torch_pair))


# Of two cores of a Zen 5, held to the instruction set; for GPUs, not measured yet, a Zen 3's, whose ratios are taken.
RATES = {
    "avx512": Rates(
        torch_pair=(1.3e-09, 9.8e-10, 1.6e-09, 2.8e-09, 5.3e-09, 1.1e-08),
        torch_causal=0.84,
        tile_pair=1.2e-10,
        tile_number=9.5e-12,
        tile_causal=0.57,
        product=9.7e-12,
        token=4.8e-08,
        number=0,
        chunk_pair=2.3e-10,
        chunk_number=7.8e-12,
        product_bf16=5.6e-12,
    ),
    "avx2": Rates(
        torch_pair=(1.3e-09, 1.1e-09, 1.6e-09, 2.9e-09, 5.2e-09, 1e-08),
        torch_causal=0.82,
        tile_pair=2.8e-10,
        tile_number=1.6e-11,
        tile_causal=0.53,
        product=1.9e-11,
        token=3.7e-08,
        number=9.2e-11,
        chunk_pair=0,
        chunk_number=1.6e-12,
    ),
    "generic": Rates(
        torch_pair=(4.2e-09, 3.8e-09, 4.5e-09, 5.7e-09, 8.3e-09, 1.4e-08),
        torch_causal=0.83,
        tile_pair=8.3e-10,
        tile_number=4.5e-11,
        tile_causal=0.51,
        product=5.2e-11,
        token=3.5e-08,
        number=3.1e-10,
        chunk_pair=6.7e-10,
        chunk_number=2.7e-11,
    ),
    "gpu": Rates(
        torch_pair=(1.5e-9, 1.6e-9, 2.4e-9, 4.3e-9, 7.3e-9, 1.5e-8),
        torch_causal=0.58,
        tile_pair=0,
        tile_number=0,
        tile_causal=0.5,
        product=3.6e-11,
        token=0,
        number=2e-9,
        chunk_pair=0,
        chunk_number=1.5e-10,
    ),
}


def rates(device: str) -> Rates:
    if device != "cpu":
        return RATES["gpu"]
    return RATES[cpu_build.isa or "generic"]


@dataclass(frozen=True)
class Work:
    """Sizes of one call; ``rows`` and ``keys`` of one head, ``heads`` over the batch; ``tiles``: whether exact
    attention would be by tiles; ``gradients``: whether they will be asked for, and count; ``pairs``: whether products
    of the highest degree may go by pairs of bfloat16."""

    heads: int
    kv_heads: int
    rows: int
    keys: int
    dim: int
    value_dim: int
    is_causal: bool
    chunk: int
    tiles: bool
    gradients: bool
    pairs: bool
    rates: Rates

    @staticmethod
    def of(args: Arguments, is_causal: bool, chunk: int, tiles: bool) -> Work:
        b, hq, n, d = args.q.shape
        rows, keys, heads, kv_heads = n, args.k.shape[2], b * hq, b * args.k.shape[1]
        if args.cu_q is not None and args.cu_k is not None and len(args.cu_q) > 1:
            # As if all sequences were as long as one that has the mean number of pairs.
            count = len(args.cu_q) - 1
            pairs = float((args.cu_q.diff().double() * args.cu_k.diff().double()).sum()) / count
            rows = keys = math.ceil(math.sqrt(pairs))
            heads, kv_heads = heads * count, kv_heads * count
        gradients, known = needs_gradients(args.q, args.k, args.v), rates(args.q.device.type)
        width = args.v.shape[3]
        # Narrow values leave registers of pairs empty; gradients take what is computed in float32.
        pairs = width >= PAIRED_WIDTH and not gradients and args.q.dtype != torch.float64 and multiplies_bf16(args.q)
        return Work(heads, kv_heads, rows, keys, d, width, is_causal, chunk, tiles, gradients, pairs, known)


def multiplies_bf16(x: Tensor) -> bool:
    return x.device.type == "cpu" and cpu_build.info.get("bf16") == "pairs"


def degree_two_seconds(work: Work) -> float:
    """The least that any polynomial takes."""
    top = math.comb(work.dim + 1, 2)
    return polynomial_seconds(work, math.comb(work.dim + 2, 2), top if work.pairs else 0)


def needs_gradients(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def torch_seconds(work: Work) -> float:
    return _torch_forward(work) * (1 + TORCH_BACKWARD if work.gradients else 1)


def exact_seconds(work: Work) -> float:
    if not work.tiles:
        return torch_seconds(work)
    pair = work.rates.tile_pair + (work.dim + work.value_dim) * work.rates.tile_number
    seconds = _all_pairs(work, pair, work.rates.tile_causal)
    return seconds + TORCH_BACKWARD * _torch_forward(work) if work.gradients else seconds


def _torch_forward(work: Work) -> float:
    pair = float(np.interp((work.dim + work.value_dim) / 2, SIZES, work.rates.torch_pair))
    return _all_pairs(work, pair, work.rates.torch_causal)


def _all_pairs(work: Work, pair: float, causal_share: float) -> float:
    pairs = work.heads * work.rows * work.keys * (causal_share if work.is_causal else 1.0)
    return pairs * pair / torch.get_num_threads()


def polynomial_seconds(work: Work, features: int, paired: int = 0) -> float:
    """``paired``: how many of the features go by pairs of bfloat16."""
    known, numbers = work.rates, work.dim + work.value_dim
    tokens_q, tokens_k = work.heads * work.rows, work.kv_heads * work.keys
    passes = tokens_q + tokens_k * (CAUSAL_KEYS if work.is_causal else 1.0)
    seconds = features * (work.value_dim + 2) * passes * known.product
    if paired:
        seconds -= paired * work.value_dim * passes * (known.product - known.product_bf16)
    seconds += (tokens_q + tokens_k) * (known.token + numbers * known.number)
    if work.is_causal:
        seconds += tokens_q * work.chunk * (known.chunk_pair + numbers * known.chunk_number)
    threads = torch.get_num_threads() if work.kv_heads > 1 else min(2, torch.get_num_threads())
    return seconds / threads * (1 + POLYNOMIAL_BACKWARD if work.gradients else 1) + FIXED_SECONDS
