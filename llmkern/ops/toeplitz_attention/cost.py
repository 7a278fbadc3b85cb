"""Predicted seconds of each route, from rates measured on two cores with AVX-512; their ratios carry over."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from llmkern.ops.toeplitz_attention.arguments import Arguments
from llmkern.ops.toeplitz_attention.fourier import fast_length
from llmkern.ops.toeplitz_attention.layout import Layout

# Seconds of one thread. Exact: a pair, a number of q, k or v in it, a place of a matrix in it.
_PAIR, _PAIR_NUMBER, _PAIR_PLACE = 0.17e-9, 0.0095e-9, 0.03e-9
# A monomial of a token; a product of matrices, a term of it; a number at a node of a token; a symbol compared.
_MONOMIAL, _TERM, _NODE, _COMPARED = 10e-9, 0.01e-9, 6e-9, 1.2e-9
# A number that is transformed and back, within the cache and beyond it.
_TRANSFORMED, _TRANSFORMED_FAR, _CACHED = 4.6e-9, 12e-9, 2**15
# A pair of a row that is computed on its own; Python and planning, whatever the threads.
_ROW_PAIR, _FIXED = 3e-9, 4e-3
# What a prediction must promise before a fast route is taken: predictions err.
GAIN = 1.3


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

    @staticmethod
    def of(args: Arguments) -> Work:
        b, h, n, d = args.q.shape
        places = 0 if args.support is None else len(args.support)
        return Work(b * h, h, n, args.k.shape[2], d, args.v.shape[3], places, args.is_causal)


def _pairs_seconds(work: Work, pairs: float) -> float:
    terms = work.value_dim * _PAIR_NUMBER + (work.places * _PAIR_PLACE if work.places else work.dim * _PAIR_NUMBER)
    return work.heads * pairs * (_PAIR + terms) / torch.get_num_threads()


def exact_seconds(work: Work) -> float:
    seen = work.rows * (work.keys - min(work.rows, work.keys) / 2) if work.is_causal else work.rows * work.keys
    return _pairs_seconds(work, seen)


def blocks_seconds(work: Work, layout: Layout, features: int, nodes: int) -> float:
    tokens, width = layout.tokens, work.value_dim + 2
    symbols = features if work.places else 1
    coupled = (layout.count * nodes) ** 2 * features * width
    seconds = tokens * features * (_MONOMIAL + 4 * nodes * width * _TERM) + 2 * coupled * _TERM
    seconds += tokens * nodes * width * _NODE
    compared = tokens * layout.size * (1 if work.is_causal else 2) * symbols * _COMPARED
    total = (work.heads * seconds + work.query_heads * compared) / torch.get_num_threads()
    return total + _pairs_seconds(work, tokens * layout.size * (1.5 if work.is_causal else 3)) + _FIXED


def fft_seconds(work: Work, features: int) -> float:
    length = fast_length(work.rows + work.keys - 1)
    transformed = features * (work.value_dim + 1) * length * (_TRANSFORMED if length <= _CACHED else _TRANSFORMED_FAR)
    seconds = transformed + (work.rows + work.keys) / 2 * features * _MONOMIAL
    return work.heads * seconds / torch.get_num_threads() + _FIXED


def rows_seconds(work: Work, share: float) -> float:
    return work.heads * work.rows * share * work.keys * _ROW_PAIR / torch.get_num_threads()
