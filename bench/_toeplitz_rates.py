"""Measures the rates of llmkern/ops/toeplitz_attention/cost.py on this machine and prints them as they stand there.

``python bench/_toeplitz_rates.py``, on a quiet machine, takes half a minute. For the rates of an older instruction set
hold torch to it too, as in ``_rope_rates.py``.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable

import torch
from _rope_rates import fit, seconds_of_a_thread
from toeplitz_attention import bounded, logarithmic
from torch import Tensor

import llmkern
from llmkern._library import cpu_build
from llmkern.ops.toeplitz_attention.arguments import Arguments, check_arguments
from llmkern.ops.toeplitz_attention.cost import FIXED_SECONDS, Terms, Work, blocks_terms, exact_terms, fft_terms
from llmkern.ops.toeplitz_attention.layout import Layout
from llmkern.ops.toeplitz_attention.rows import with_exact_rows

TOKENS = 4096
EXACT_DIMS = (8, 16, 32, 64)
# Head size and tokens of a polynomial of degree 2, 3 or 4, and the bound of its scores.
FAST = [(8, 4096, 0.7), (8, 16384, 0.7), (8, 65536, 0.7), (16, 8192, 0.7), (32, 4096, 0.7), (8, 8192, 2.0)]
ROWS = 32


def inputs(tokens: int, dim: int, bound: float, is_smooth: bool) -> tuple[Tensor, Tensor, Tensor, llmkern.RelativeBias]:
    q, k, v, made_of = bounded(tokens, dim, not is_smooth, "cpu")
    q = q * bound / float(q.norm(dim=-1).max() * k.norm(dim=-1).max())
    return q, k, v, llmkern.RelativeBias(logarithmic(made_of, tokens) if is_smooth else made_of)


def arguments(q: Tensor, k: Tensor, v: Tensor, relative: llmkern.RelativeBias | llmkern.RelativeMatrix) -> Arguments:
    return check_arguments("rates", q, k, v, relative, True, 1.0, 1e-2, "auto", None)


def rates_of(terms: list[Terms], seconds: list[float], known: Terms) -> dict[str, float]:
    """Those of the terms that are there and not yet known."""
    names = [f.name for f in dataclasses.fields(Terms)]
    wanted = [x for x in names if any(getattr(t, x) for t in terms) and not getattr(known, x)]
    left = [s - t.seconds(known) * torch.get_num_threads() for s, t in zip(seconds, terms)]
    return dict(zip(wanted, fit([[getattr(t, x) for x in wanted] for t in terms], left)))


def exact_rates() -> Terms:
    terms, seconds = [], []
    for dim in EXACT_DIMS:
        q, k, v, relative = inputs(TOKENS, dim, 1.0, True)
        matrix = llmkern.RelativeMatrix.from_rotary(llmkern.Rotary(dim), 1, TOKENS)
        for kind in (relative, *([matrix] if dim == 8 else [])):
            call = functools.partial(
                llmkern.toeplitz_attention, q, k, v, relative=kind, is_causal=True, scale=1.0, method="exact"
            )
            terms.append(exact_terms(Work.of(arguments(q, k, v, kind))))
            seconds.append(seconds_of_a_thread(call, 3))
    return Terms(**rates_of(terms, seconds, Terms()))


def fast_rates(method: str, known: Terms) -> dict[str, float]:
    terms, seconds = [], []
    for dim, tokens, bound in FAST:
        q, k, v, relative = inputs(tokens, dim, bound, method == "blocks")
        options = {"relative": relative, "is_causal": True, "scale": 1.0}
        plan = llmkern.plan_toeplitz_attention(q, k, v, method=method, **options)
        call = functools.partial(llmkern.toeplitz_attention, q, k, v, plan=plan, **options)
        work = Work.of(arguments(q, k, v, relative))
        if method == "fft":
            terms.append(fft_terms(work, plan.features))
        else:
            terms.append(blocks_terms(work, Layout.of(tokens, plan.block, True), plan.features, plan.nodes))
        seconds.append(seconds_of_a_thread(call, 5))
    rates = rates_of(terms, seconds, known)
    for (dim, tokens, _), t, s in zip(FAST, terms, seconds):
        predicted = t.seconds(dataclasses.replace(known, **rates)) + FIXED_SECONDS
        print(f"# {method} d={dim} n={tokens}: {s / torch.get_num_threads():.2e} s, predicted {predicted:.2e}")
    return rates


def row_rate() -> float:
    q, k, v, relative = inputs(TOKENS, 8, 1.0, True)
    args = arguments(q, k, v, relative)._replace(is_causal=False)
    failing = torch.zeros(q.shape[:3], dtype=torch.bool)
    failing[..., :: TOKENS // ROWS] = True
    call: Callable[[], Tensor] = functools.partial(with_exact_rows, v, args, failing)
    return seconds_of_a_thread(call) / (ROWS * TOKENS)


if __name__ == "__main__":
    with torch.no_grad():
        found = exact_rates()
        found = dataclasses.replace(found, **fast_rates("fft", found))
        found = dataclasses.replace(found, **fast_rates("blocks", found), row_pair=row_rate())
    print(f'    "{cpu_build.isa}": Terms(')
    for field in dataclasses.fields(found):
        print(f"        {field.name}={getattr(found, field.name):.2g},")
    print("    ),")
    assert all(math.isfinite(x) for x in dataclasses.astuple(found))
