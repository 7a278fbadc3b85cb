"""`llmkern select` over a synthetic DataComp tree: seconds against the floor of its products, memory, kills, workers.

python bench/_select_pool.py FOLDER --rows 1000000 --shards 100

Steps, all of them unless some are named: ``straight`` is timed and its memory sampled; ``killed`` loses its processes
twice at random moments and goes on; ``one`` has a single worker. Then the bytes of all that ran are compared. FOLDER
takes 3 GB for a million rows, and keeps what was made for the next call.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from _machine import matmul_rate

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))
from datacomp_tree import make_tree  # noqa: E402

BATCH, PARTITIONS, TARGETS, WIDTH, BAD = 8192, 2, 10_000, 768, 3
STEPS = ("straight", "killed", "one")


def commands(folder: Path, out: Path, workers: int) -> list[list[str]]:
    store, target = ["--store", str(out / "store")], ["--target", str(folder / "target.npy")]
    run = ["--max-memory", "8G", *(["--workers", str(workers)] if workers else [])]
    score = ["--scores", "clip,neg_clip,vas", "--batch-size", str(BATCH), "--num-partitions", str(PARTITIONS)]
    subsets = {name: out / f"{name}.npy" for name in ("norm_sim", "vas")}
    filters = [
        ["filter", *store, "--out", str(path), "--stage", "neg_clip:0.3", "--stage", f"{name}:0.2", *target, *run]
        for name, path in subsets.items()
    ]
    return [
        ["score", "--input", str(folder / "pool"), "--out", store[1], *score, *target, "--on-bad-shard", "skip", *run],
        *filters,
        ["report", *store, "--out", str(out / "page"), *(f"--subset={name}={path}" for name, path in subsets.items())],
    ]


def flops(out: Path) -> float:
    """Of the products alone: K divisions into nearly equal batches, half a product for VAS, NormSim of survivors."""
    manifest, steps = (json.loads((out / name).read_text()) for name in ("store/manifest.json", "norm_sim.npy.json"))
    n, survivors = manifest["kept"], steps["steps"][-2]["rows"]
    batch = n / max(1, -(-n // BATCH))
    return 2 * PARTITIONS * n * batch * WIDTH + n * WIDTH**2 + 2 * survivors * TARGETS * WIDTH


class Memory:
    """Peak over samples of what the processes of a session hold, shared pages by share."""

    def __init__(self) -> None:
        self.peak = 0

    @contextlib.contextmanager
    def watch(self, session: int) -> Iterator[None]:
        ended = threading.Event()

        def sample() -> None:
            while not ended.wait(2):  # walking over a mapped pool takes a process tens of milliseconds
                self.peak = max(self.peak, sum(_held(pid) for pid in _members(session)))

        thread = threading.Thread(target=sample)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()


def _members(session: int) -> list[int]:
    found = []
    for name in os.listdir("/proc"):
        with contextlib.suppress(ProcessLookupError, ValueError):
            if os.getsid(int(name)) == session:
                found.append(int(name))
    return found


def _held(pid: int) -> int:
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    return 0


# All commands in one process, as a user of Python would call them; each goes on where it was killed.
CHILD = """
import json, sys, time
from llmkern.__main__ import main
for command in json.loads(sys.argv[1]):
    started = time.perf_counter()
    if main(["select", *command]) not in (0, 3):  # 3: some shards are bad
        raise SystemExit(1)
    print(command[0], round(time.perf_counter() - started, 1), flush=True)
"""


def call(work: list[list[str]], memory: Memory, limit: float | None = None) -> list[str] | None:
    """What the commands took, or none where their processes were killed after ``limit`` seconds."""
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD, json.dumps(work)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    with memory.watch(process.pid):
        try:
            said, error = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            return None
    if process.returncode:
        raise SystemExit(error)
    return [line for line in said.splitlines() if line.split()[0] in ("score", "filter", "report") and len(line) < 20]


def run(folder: Path, name: str, workers: int, kills: list[float]) -> None:
    """All commands into FOLDER/<name>; each of the kills strikes so many seconds after the start or the last one."""
    out, memory = folder / name, Memory()
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    started, said = time.perf_counter(), None
    work = commands(folder, out, workers)
    for limit in kills:
        said = said or call(work, memory, limit)
        print(f"{name}: " + (f"killed after {limit:.1f} s" if said is None else f"ended before {limit:.1f} s"))
    said = said or call(work, memory)
    spent = time.perf_counter() - started
    print(f"{name}: {spent:.1f} s ({', '.join(said or [])}), at most {memory.peak / 2**30:.2f} GiB")
    (out / "seconds.json").write_text(json.dumps(spent))


def digests(out: Path) -> dict[str, str]:
    names = ["store/scores.parquet", "store/manifest.json", "store/bad_shards.json", "page/index.html"]
    names += [f"{name}.npy{end}" for name in ("norm_sim", "vas") for end in ("", ".json")]
    return {name: hashlib.sha256((out / name).read_bytes()).hexdigest()[:16] for name in names}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--shards", type=int, default=100)
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=STEPS)
    parser.add_argument("--seed", type=int, default=None, help="of the moments of the kills (default: any)")
    given = parser.parse_args()
    folder = given.folder
    if not (folder / "pool").exists():
        make_tree(folder / "pool", rows=given.rows, shards=given.shards, width=WIDTH, bad=BAD)
    x = np.random.default_rng(1).standard_normal((TARGETS, WIDTH)).astype(np.float32)
    if not (folder / "target.npy").exists():
        np.save(folder / "target.npy", (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float16))
    if "straight" in given.steps:
        rate = matmul_rate("cpu", torch.float32)
        run(folder, "straight", 0, [])
        floor = flops(folder / "straight") / rate
        seconds = json.loads((folder / "straight/seconds.json").read_text())
        print(f"straight: {seconds / floor:.2f} times the {floor:.1f} s of its products at {rate / 1e9:.0f} GFLOP/s")
    if "killed" in given.steps:
        spent = json.loads((folder / "straight/seconds.json").read_text())
        draw = random.Random(given.seed)
        run(folder, "killed", 2, [draw.uniform(0.1, 0.45) * spent for _ in range(2)])
    if "one" in given.steps:
        run(folder, "one", 1, [])
    made = {name: digests(folder / name) for name in STEPS if (folder / name / "seconds.json").exists()}
    for name, found in made.items():
        differ = [file for file in found if found[file] != made["straight"][file]]
        print(f"{name}: {', '.join(differ)} differ" if differ else f"{name}: the same bytes in {len(found)} files")
        if differ:
            raise SystemExit(1)


if __name__ == "__main__":
    main()
