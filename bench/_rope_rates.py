"""Measures the rates of llmkern/ops/rope_attention/cost.py on this machine and prints them as they stand there.

``python bench/_rope_rates.py``, on a quiet machine, takes half a minute. For the rates of an older instruction set hold
torch to it too: ``LLMKERN_CPU=avx2 ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2``, or
generic, default, SSE41 and SSE4_2.
"""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from rope_attention import bounded
from scipy.optimize import nnls

import llmkern
from llmkern._library import cpu_build
from llmkern.ops.rope_attention.arguments import Arguments
from llmkern.ops.rope_attention.cost import CAUSAL_KEYS, SIZES
from llmkern.ops.rope_attention.exact import tiled_attention
from llmkern.ops.rope_attention.plan import CHUNK

TOKENS = {8: 4096, 16: 4096, 32: 4096, 64: 2048, 128: 2048, 256: 1024}
# Head size, bound and rtol of polynomials of degree 2 to 4, and their tokens.
POLYNOMIALS = [(8, 0.25, 1e-2), (8, 2.0, 1e-3), (16, 0.5, 1e-2), (16, 1.0, 1e-3), (32, 0.5, 1e-2), (64, 0.5, 1e-2)]
POLYNOMIAL_TOKENS = 8192


def seconds_of_a_thread(call: Callable[[], object], rounds: int = 5) -> float:
    call()
    samples = []
    for _ in range(rounds):
        start = time.perf_counter()
        call()
        samples.append(time.perf_counter() - start)
    return statistics.median(samples) * torch.get_num_threads()


def fit(rows: Sequence[Sequence[float]], seconds: Sequence[float]) -> list[float]:
    """Rates not below zero whose relative errors are least."""
    weighed = np.array(rows) / np.array(seconds)[:, None]
    size = np.linalg.norm(weighed, axis=0)
    return (nnls(weighed / size, np.ones(len(seconds)))[0] / size).tolist()


def exact_rates() -> dict[str, object]:
    torchs: dict[bool, list[float]] = {False: [], True: []}
    tiles: dict[bool, list[float]] = {False: [], True: []}
    for size in SIZES:
        q, k, v = bounded(TOKENS[size], size, 2.0, "cpu")
        args = Arguments(q, k, v, size**-0.5, None, None, None)
        for c in (False, True):
            pairs = TOKENS[size] ** 2
            by_torch = functools.partial(F.scaled_dot_product_attention, q, k, v, is_causal=c)
            torchs[c].append(seconds_of_a_thread(by_torch, 3) / pairs)
            tiles[c].append(seconds_of_a_thread(functools.partial(tiled_attention, args, c), 3) / pairs)
    pair, number = fit([(1, 2 * size) for size in SIZES], tiles[False])
    return {
        "torch_pair": tuple(torchs[False]),
        "torch_causal": statistics.median(b / a for a, b in zip(torchs[False], torchs[True])),
        "tile_pair": pair,
        "tile_number": number,
        "tile_causal": statistics.median(b / a for a, b in zip(tiles[False], tiles[True])),
    }


def polynomial_rates() -> dict[str, object]:
    n, work = POLYNOMIAL_TOKENS, []
    seconds, causal = [], []
    for size, bound, rtol in POLYNOMIALS:
        q, k, v = bounded(n, size, bound, "cpu")
        for c, taken in ((False, seconds), (True, causal)):
            plan = llmkern.plan_attention(q, k, v, is_causal=c, rtol=rtol, method="polynomial")
            plan = replace(plan, top_bf16=False)
            if not c:
                work.append((2 * n * plan.features * (size + 2), 2 * n, 2 * n * 2 * size))
            taken.append(
                seconds_of_a_thread(functools.partial(llmkern.rope_attention, q, k, v, is_causal=c, plan=plan))
            )
    rates = fit(work, seconds)
    more = [(CAUSAL_KEYS - 1) * row[0] / 2 for row in work]
    chunks = [(n * CHUNK, n * CHUNK * 2 * size) for size, _, _ in POLYNOMIALS]
    left = [max(c - s - rates[0] * m, 1e-2 * c) for c, s, m in zip(causal, seconds, more)]
    names = ("product", "token", "number", "chunk_pair", "chunk_number")
    for (size, bound, _), row, full, c in zip(POLYNOMIALS, work, seconds, causal):
        predicted = sum(x * rate for x, rate in zip(row, rates))
        print(f"# d={size} B={bound}: {full:.2e} s, predicted {predicted:.2e}; causal {c:.2e}")
    return dict(zip(names, (*rates, *fit(chunks, left))))


def paired_rate(product: float) -> float:
    """What pairs of bfloat16 save of the products that go by them, where the plan has them."""
    n, saved = POLYNOMIAL_TOKENS, []
    for size in (32, 64, 128):
        q, k, v = bounded(n, size, 0.5, "cpu")
        plan = llmkern.plan_attention(q, k, v, rtol=1e-2, method="polynomial")
        if not plan.top_bf16:
            return math.inf
        fine, coarse = (
            seconds_of_a_thread(functools.partial(llmkern.rope_attention, q, k, v, plan=replace(plan, top_bf16=top)))
            for top in (False, True)
        )
        paired = math.comb(size + plan.degree - 1, plan.degree)
        saved.append((fine - coarse) / (2 * n * paired * size))
        print(f"# d={size}: {fine:.2e} s, with pairs {coarse:.2e}")
    return product - statistics.median(saved)


if __name__ == "__main__":
    with torch.no_grad():
        found = exact_rates() | polynomial_rates()
        found["product_bf16"] = paired_rate(float(found["product"]))
    print(f'    "{cpu_build.isa}": Rates(')
    for name, value in found.items():
        numbers = value if isinstance(value, tuple) else (value,)
        text = ", ".join(f"{x:.2g}" for x in numbers)
        print(f"        {name}={f'({text})' if isinstance(value, tuple) else text},")
    print("    ),")
