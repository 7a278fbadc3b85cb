"""Holds method="auto" against torch's attention over a grid of sizes and bounds; prints a table and a verdict.

``python bench/_rope_choice.py``, on a quiet machine, takes two minutes; it fails where auto takes over 5% longer than
torch, or where tiles are taken for faster and are not.
"""

from __future__ import annotations

import functools
import statistics
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from rope_attention import bounded

import llmkern
from llmkern.ops.rope_attention.exact import tiles_win

DIMS = {256: (8, 16, 32, 64, 128), 1024: (8, 16, 32, 64, 128), 4096: (8, 16, 32, 64, 128), 16384: (8, 32, 128)}
DIMS[65536] = (8, 64)
BOUNDS = (0.25, 1.0, 4.0, 16.0)
ALLOWED = 1.05
RTOL = 1e-2
# Rounds of turns by seconds: of short calls more, each several calls long.
SAMPLE, SPENT, MOST, FEWEST = 1e-3, 0.25, 41, 1


def turns(calls: list[Callable[[], object]]) -> list[float]:
    """Medians of calls that take turns."""
    pilots = []
    for call in calls:
        start = time.perf_counter()
        call()
        pilots.append(time.perf_counter() - start)
    if max(pilots) < SPENT:
        pilots = [min(_seconds(call, 1) for _ in range(3)) for call in calls]
    repeats = [max(1, round(SAMPLE / pilot)) for pilot in pilots]
    rounds = max(FEWEST, min(MOST, int(SPENT / max(pilots))))
    samples: list[list[float]] = [[] for _ in calls]
    for turn in range(rounds):
        for i in range(len(calls)):
            at = (i + turn) % len(calls)
            samples[at].append(_seconds(calls[at], repeats[at]))
    return [statistics.median(taken) for taken in samples]


def _seconds(call: Callable[[], object], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


@torch.no_grad()
def main() -> int:
    worst, failures = 0.0, 0
    print("| n | d | causal | torch ms | " + " | ".join(f"B={b:g}" for b in BOUNDS) + " |")
    print("|---" * (4 + len(BOUNDS)) + "|")
    for n, dims in DIMS.items():
        for d in dims:
            inputs = [bounded(n, d, b, "cpu") for b in BOUNDS]
            for c in (False, True):
                plain = functools.partial(F.scaled_dot_product_attention, *inputs[0], is_causal=c)
                autos = [functools.partial(llmkern.rope_attention, *x, is_causal=c, rtol=RTOL) for x in inputs]
                torchs, *ours = turns([plain, *autos])
                cells = []
                for x, seconds in zip(inputs, ours):
                    plan = llmkern.plan_attention(*x, is_causal=c, rtol=RTOL)
                    by_tiles = plan.method == "exact" and tiles_win(*x, c)
                    limit = 1.0 if by_tiles else ALLOWED
                    failed = seconds > limit * torchs
                    failures += failed
                    worst = max(worst, seconds / torchs)
                    route = "tiles" if by_tiles else "torch" if plan.method == "exact" else f"degree {plan.degree}"
                    cells.append(f"{torchs / seconds:.2f}x {route}{' SLOWER' if failed else ''}")
                print(f"| {n} | {d} | {c} | {torchs * 1e3:.3g} | " + " | ".join(cells) + " |", flush=True)
    print(f"auto takes at most {worst:.3f} times as long as torch; {failures} cases above what is allowed")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
