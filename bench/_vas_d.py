"""VAS-D by downdates against the loop as the paper has it: seconds, rows scored, and whether the sets are the same.

python bench/_vas_d.py --rows 1000000 --rounds 100

The loop scores every survivor and counts the second moment anew in each round, in float64, with this library's kernels.
It takes long at that size; with --naive-rounds a few of its rounds are timed instead, and the set is that of a run of
so many rounds.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from datacomp_tree import embeddings

from llmkern.papers.data_selection.vas_d import Work, vas_d, vas_d_naive


def pool(rows: int, width: int) -> np.ndarray:
    classes = np.random.default_rng(0).standard_normal((50, width)).astype(np.float32)
    classes /= np.linalg.norm(classes, axis=1, keepdims=True)
    image = np.empty((rows, width), np.float16)
    for start in range(0, rows, 10_000):
        stop = min(rows, start + 10_000)
        image[start:stop] = embeddings(stop - start, width, np.random.default_rng(start), classes)[0]
    return image


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--keep", type=float, default=2 / 3)
    parser.add_argument("--naive-rounds", type=int, default=None)
    given = parser.parse_args()
    image = torch.from_numpy(pool(given.rows, given.width))
    count, work = int(given.keep * given.rows), Work()
    started = time.perf_counter()
    ours = vas_d(image, count, given.rounds, work=work)
    spent = time.perf_counter() - started
    print(f"downdates: {spent:.1f} s for {given.rounds} rounds, {work}", flush=True)
    step = -(-(given.rows - count) // given.rounds)
    rounds = given.rounds if given.naive_rounds is None else given.naive_rounds
    if rounds < given.rounds:
        count = given.rows - rounds * step
        ours = vas_d(image, count, rounds)
    started = time.perf_counter()
    naive = vas_d_naive(image, count, rounds)
    each = (time.perf_counter() - started) / rounds
    print(f"loop: {each:.2f} s a round of {rounds}, {each * given.rounds / spent:.1f} times as long for {given.rounds}")
    print("the same set" if np.array_equal(ours, naive) else "ANOTHER set")


if __name__ == "__main__":
    main()
