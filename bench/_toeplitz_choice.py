"""Holds method="auto" of toeplitz_attention against each route by itself over a grid; prints a table and a verdict.

``python bench/_toeplitz_choice.py``, on a quiet machine, takes a minute; it fails where auto takes over a quarter
longer than the fastest route, planning included.
"""

from __future__ import annotations

import functools
import sys

import torch
from _rope_choice import turns
from _toeplitz_rates import inputs

import llmkern

DIMS = {1024: (8, 64), 4096: (8, 16, 64), 8192: (8, 16), 16384: (8, 16), 32768: (8,), 65536: (8,)}
ALLOWED = 1.25
BOUND = 0.7


@torch.no_grad()
def main() -> int:
    worst, failures = 0.0, 0
    print("| n | d | table | auto takes | exact ms | blocks ms | fft ms | auto ms |")
    print("|---" * 8 + "|")
    for n, dims in DIMS.items():
        for d in dims:
            for is_smooth in (True, False):
                q, k, v, relative = inputs(n, d, BOUND, is_smooth)
                call = functools.partial(
                    llmkern.toeplitz_attention, q, k, v, relative=relative, is_causal=True, scale=1.0
                )
                plan = llmkern.plan_toeplitz_attention(q, k, v, relative=relative, is_causal=True, scale=1.0)
                # Blocks cannot follow a rough table. Features of wide heads are too many for either: it takes 40 to
                # 100 times as long, and exact calls of half a millisecond take a fifth longer right after it.
                fast = [*(["blocks"] if is_smooth else []), "fft"] if d <= 16 else []
                methods = ["exact", *fast, "auto"]
                seconds = dict(zip(methods, turns([functools.partial(call, method=method) for method in methods])))
                best = min(s for method, s in seconds.items() if method != "auto")
                failed = seconds["auto"] > ALLOWED * best
                failures += failed
                worst = max(worst, seconds["auto"] / best)
                cells = [f"{seconds[m] * 1e3:.3g}" if m in seconds else "" for m in ("exact", "blocks", "fft", "auto")]
                kind = "smooth" if is_smooth else "rough"
                verdict = f"{plan.method}{' SLOWER' if failed else ''}"
                print(f"| {n} | {d} | {kind} | {verdict} | " + " | ".join(cells) + " |", flush=True)
    print(f"auto takes at most {worst:.2f} times as long as the fastest route; {failures} cases above what is allowed")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
