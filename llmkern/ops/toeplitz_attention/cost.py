"""Predicted seconds of each route, from rates that bench/_toeplitz_rates.py measures."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from llmkern._library import cpu_build
from llmkern.ops.toeplitz_attention.arguments import Arguments
from llmkern.ops.toeplitz_attention.fourier import fast_length
from llmkern.ops.toeplitz_attention.layout import Layout

# Python and planning, whatever the threads.
FIXED_SECONDS = 1.5e-3
# What a prediction must promise before a fast route is taken: predictions err, and leave out the search for nodes.
GAIN = 1.5
# Blocks take what their rates say in one process and up to 1.7 times as long in another.
BLOCKS_SPREAD = 1.3


@dataclass(frozen=True)
class Terms:
    """How much of everything a route does; as rates, the seconds of one thread that one of each takes.

    Attributes:
        pair, number, place: a pair of tokens in exact tiles, a number of q, k or v in it, a place of a matrix in it.
        monomial: a monomial of a token.
        product: a multiplication and addition of matrices; node: a number at a node of a token.
        compared: a symbol between two tokens, held against its interpolation.
        transformed: a number that is transformed and back, times the binary logarithm of how many there are.
        row_pair: a pair of a row that is computed on its own.
    """

    pair: float = 0
    number: float = 0
    place: float = 0
    monomial: float = 0
    product: float = 0
    node: float = 0
    compared: float = 0
    transformed: float = 0
    row_pair: float = 0

    def __add__(self, other: Terms) -> Terms:
        return Terms(*(a + b for a, b in zip(vars(self).values(), vars(other).values())))

    def seconds(self, rates: Terms) -> float:
        return sum(a * b for a, b in zip(vars(self).values(), vars(rates).values())) / torch.get_num_threads()


# Of two cores of a Zen 5, held to the instruction set (torch to AVX2 beside the plain build). Not measured yet are
# GPUs, taken to have the ratios of AVX-512.
RATES = {
    "avx512": Terms(
        pair=2e-10,
        number=9.1e-12,
        place=4.5e-11,
        monomial=1.1e-08,
        product=2.4e-12,
        node=3.7e-09,
        compared=1.3e-09,
        transformed=2.8e-11,
        row_pair=8.8e-09,
    ),
    "avx2": Terms(
        pair=3.6e-10,
        number=1.5e-11,
        place=5.5e-11,
        monomial=1.1e-08,
        product=3.3e-12,
        node=3.8e-09,
        compared=1.6e-09,
        transformed=6.1e-11,
        row_pair=1.2e-08,
    ),
    "generic": Terms(
        pair=9.8e-10,
        number=4.9e-11,
        place=9e-11,
        monomial=9.4e-09,
        product=4.7e-12,
        node=1e-08,
        compared=1.6e-09,
        transformed=1.4e-10,
        row_pair=9.3e-09,
    ),
}


def rates(device: str) -> Terms:
    return RATES[(cpu_build.isa or "generic") if device == "cpu" else "avx512"]


@dataclass(frozen=True)
class Work:
    heads: int
    query_heads: int
    rows: int
    keys: int
    dim: int
    value_dim: int
    places: int
    is_causal: bool
    rates: Terms

    @staticmethod
    def of(args: Arguments) -> Work:
        b, h, n, d = args.q.shape
        places = 0 if args.support is None else len(args.support)
        known = rates(args.q.device.type)
        return Work(b * h, h, n, args.k.shape[2], d, args.v.shape[3], places, args.is_causal, known)


def pair_terms(work: Work, pairs: float) -> Terms:
    """Of so many pairs of tokens a head."""
    total = work.heads * pairs
    numbers = work.value_dim + (0 if work.places else work.dim)
    return Terms(pair=total, number=total * numbers, place=total * work.places)


def exact_terms(work: Work) -> Terms:
    seen = work.rows * (work.keys - min(work.rows, work.keys) / 2) if work.is_causal else work.rows * work.keys
    return pair_terms(work, seen)


def blocks_terms(work: Work, layout: Layout, features: int, nodes: int) -> Terms:
    tokens, width = layout.tokens, work.value_dim + 2
    symbols = features if work.places else 1
    coupled = (layout.count * nodes) ** 2 * features * width
    return pair_terms(work, tokens * layout.size * (1.5 if work.is_causal else 3)) + Terms(
        monomial=work.heads * tokens * features,
        product=work.heads * (4 * tokens * features * nodes * width + 2 * coupled),
        node=work.heads * tokens * nodes * width,
        compared=work.query_heads * tokens * layout.size * (1 if work.is_causal else 2) * symbols,
    )


def fft_terms(work: Work, features: int) -> Terms:
    length = fast_length(work.rows + work.keys - 1)
    # A symbol that a feature has to itself goes one way, alone.
    sequences = features * (work.value_dim + 1 + (1 if work.places else 0))
    return Terms(
        monomial=work.heads * (work.rows + work.keys) / 2 * features,
        transformed=work.heads * sequences * length * math.log2(length + 1),
    )


def exact_seconds(work: Work) -> float:
    return exact_terms(work).seconds(work.rates)


def blocks_seconds(work: Work, layout: Layout, features: int, nodes: int) -> float:
    return BLOCKS_SPREAD * blocks_terms(work, layout, features, nodes).seconds(work.rates) + FIXED_SECONDS


def fft_seconds(work: Work, features: int) -> float:
    return fft_terms(work, features).seconds(work.rates) + FIXED_SECONDS


def rows_seconds(work: Work, share: float) -> float:
    return Terms(row_pair=work.heads * work.rows * share * work.keys).seconds(work.rates)
