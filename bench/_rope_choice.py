"""Holds method="auto" against torch's attention over a grid of sizes and bounds; prints a table and a verdict.

``python bench/_rope_choice.py``, on a quiet machine, takes two minutes; it fails where auto takes over 5% longer than
torch, or where tiles are taken for faster and are not. With ``--gradients`` forward and backward, up to 16,384 tokens;
with ``--dtype bfloat16`` of that dtype.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from rope_attention import bounded
from torch import Tensor

import llmkern
from llmkern.ops.rope_attention.exact import tiles_win

DIMS = {256: (8, 16, 32, 64, 128), 1024: (8, 16, 32, 64, 128), 4096: (8, 16, 32, 64, 128), 16384: (8, 32, 128)}
DIMS[65536] = (8, 64)
BOUNDS = (0.25, 1.0, 4.0, 16.0)
LONGEST_GRADIENTS = 16384
ALLOWED = 1.05
RTOL = 1e-2
# Rounds of turns by seconds: of short calls more, each several calls long.
SAMPLE, SPENT, MOST, FEWEST = 1e-3, 0.25, 41, 1


def turns(calls: list[Callable[[], object]]) -> list[float]:
    """Medians of calls that take turns; short ones begin on warm caches, whatever ran before."""
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
            if repeats[at] > 1:
                calls[at]()
            samples[at].append(_seconds(calls[at], repeats[at]))
    return [statistics.median(taken) for taken in samples]


def _seconds(call: Callable[[], object], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def forward(attend: Callable[..., Tensor], *tensors: Tensor) -> None:
    with torch.no_grad():
        attend(*tensors)


def forward_backward(attend: Callable[..., Tensor], *tensors: Tensor) -> None:
    torch.autograd.grad(attend(*tensors).sum(), tensors)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--gradients", action="store_true")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    given = parser.parse_args()
    return hold(given.gradients, getattr(torch, given.dtype))


def hold(gradients: bool, dtype: torch.dtype) -> int:
    call = forward_backward if gradients else forward
    worst, failures = 0.0, 0
    print("| n | d | causal | torch ms | " + " | ".join(f"B={b:g}" for b in BOUNDS) + " |")
    print("|---" * (4 + len(BOUNDS)) + "|")
    for n, dims in DIMS.items():
        if gradients and n > LONGEST_GRADIENTS:
            continue
        for d in dims:
            inputs = [[t.to(dtype).requires_grad_(gradients) for t in bounded(n, d, b, "cpu")] for b in BOUNDS]
            for c in (False, True):
                plain = functools.partial(
                    call, functools.partial(F.scaled_dot_product_attention, is_causal=c), *inputs[0]
                )
                auto = functools.partial(llmkern.rope_attention, is_causal=c, rtol=RTOL)
                autos = [functools.partial(call, auto, *x) for x in inputs]
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
