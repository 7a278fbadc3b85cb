"""negCLIPLoss over a whole pool: every division draws its batches from all shards, and a batch is a unit of work.

    score_i = mean over k of [ s_ii - T/2 (LSE of row i + LSE of column i, in the batch B_k(i)) + T log(|B_k| / m) ]

with m the mean size of a batch: what ``llmkern.neg_clip_loss`` computes in memory, batch by batch. Divisions are
functions of (rows, seed, k) alone. Rows of a batch are read in the order of the pool, so that files are read forwards
and a batch gives the same bits wherever it is computed.
"""

from __future__ import annotations

import functools
import itertools
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from llmkern.ops.pairwise_scores import neg_clip_loss, random_division
from llmkern.papers.data_selection.engine import run_units
from llmkern.papers.data_selection.files import Log, atomic
from llmkern.papers.data_selection.progress import progress_bar
from llmkern.papers.data_selection.store import Store, open_rows
from llmkern.papers.data_selection.tensors import as_tensor, unit_rows

if TYPE_CHECKING:
    from llmkern.papers.data_selection.score import Options, Run

# A unit holds batches of about so many rows together: little is lost with it, and files stay few.
UNIT_ROWS = 32768
# Where the table of convergence looks for the same samples.
TOP = 0.3


def whole_pool(
    store: Store, config: str, kept: np.ndarray, width: int, options: Options, run: Run, log: Log
) -> tuple[dict[str, np.ndarray], list[dict[str, float]]]:
    """Columns of the kept rows, and how the score settles with K."""
    parts = f"{config}-{options.batch_size}-{options.temperature:g}-{options.seed}"
    folder = store.path / "neg_clip" / parts
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "rows.npy").exists():
        _save(folder / "rows.npy", kept)
    n, k = len(kept), options.num_partitions
    count = max(1, -(-n // options.batch_size))
    bounds = [n * b // count for b in range(count + 1)]
    step = max(1, UNIT_ROWS // max(1, -(-n // count)))
    ranges = [(b, min(b + step, count)) for b in range(0, count, step)]
    for index in range(k):
        if not _order_file(folder, index).exists():
            batches = random_division(n, options.batch_size, seed=options.seed, index=index)
            _save(_order_file(folder, index), torch.cat([batch.sort().values for batch in batches]).numpy())
    every = [(index, first, last) for index in range(k) for first, last in ranges]
    todo = [unit for unit in every if not _part_file(folder, *unit[:2]).exists()]
    log("negatives", units=len(every), found=len(every) - len(todo), batches=count)
    # Two towers as read, once more when normalised, and what the op holds; the main process holds a division.
    unit_bytes = 2 * options.batch_size * width * (12 if options.normalize else 4) + 2**26
    workers = run.processes("select score", unit_bytes, main_bytes=100 * n)
    units = [(store.folder, str(folder), index, bounds[a : b + 1], a, options) for index, a, b in todo]
    with progress_bar("negCLIPLoss, batches", k * count, run.quiet) as advance:
        advance(sum(b - a for _, a, b in every) - sum(b - a for _, a, b in todo))

        def done(index: int, _: Any) -> None:
            log("negatives part", partition=todo[index][0], batch=todo[index][1])
            advance(todo[index][2] - todo[index][1])

        run_units(score_batches, units, workers=workers, ray=run.ray, done=done)
    return _merge(folder, n, k, bounds, ranges, options.temperature)


def score_batches(store: str, folder: str, partition: int, bounds: list[int], first: int, options: Options) -> None:
    """Scores of some batches of a division, in the order of that division, as one file."""
    rows, kept, order = open_rows(store), _map(f"{folder}/rows.npy"), _map(str(_order_file(Path(folder), partition)))
    out = np.empty(bounds[-1] - bounds[0], np.float32)
    for start, stop in itertools.pairwise(bounds):
        numbers = kept[order[start:stop]]
        image, text = (as_tensor(rows.take(tower, numbers)) for tower in ("image", "text"))
        if options.normalize:
            image, text = unit_rows(image), unit_rows(text)
        out[start - bounds[0] : stop - bounds[0]] = neg_clip_loss(
            image,
            text,
            temperature=options.temperature,
            batch_size=len(image),
            num_partitions=1,
            precision=options.precision,
        )
    _save(_part_file(Path(folder), partition, first), out)


def _merge(
    folder: Path, n: int, k: int, bounds: list[int], ranges: list[tuple[int, int]], temperature: float
) -> tuple[dict[str, np.ndarray], list[dict[str, float]]]:
    total, squares = np.zeros(n), np.zeros(n)
    mean_size = n / (len(bounds) - 1)
    tops = []
    for index in range(k):
        order = _map(str(_order_file(folder, index)))
        values = np.empty(n)
        for first, last in ranges:
            part = np.load(_part_file(folder, index, first)).astype(np.float64)
            for b in range(first, last):
                batch = slice(bounds[b], bounds[b + 1])
                size = bounds[b + 1] - bounds[b]
                here = part[bounds[b] - bounds[first] : bounds[b + 1] - bounds[first]]
                values[order[batch]] = here + temperature * math.log(size / mean_size)
        total += values
        squares += values**2
        tops.append(_top(total))
    columns = {"neg_clip": (total / k).astype(np.float32)}
    if k > 1:
        variance = np.maximum(squares - total**2 / k, 0) / (k - 1)
        columns["neg_clip_se"] = np.sqrt(variance / k).astype(np.float32)
    same = [float(np.isin(top, tops[-1], assume_unique=True).mean()) if len(top) else 1.0 for top in tops]
    return columns, [{"partitions": i + 1, "overlap": share, "top": TOP} for i, share in enumerate(same)]


def _top(values: np.ndarray) -> np.ndarray:
    count = int(TOP * len(values))
    return np.argpartition(-values, count)[:count] if count else np.empty(0, np.int64)


def _order_file(folder: Path, index: int) -> Path:
    return folder / f"order-{index}.npy"


def _part_file(folder: Path, index: int, first: int) -> Path:
    return folder / f"part-{index}-{first}.npy"


def _save(path: Path, array: np.ndarray) -> None:
    with atomic(path) as file:
        np.save(file, array)


@functools.lru_cache(maxsize=4)
def _map(path: str) -> np.ndarray:
    return np.load(path, mmap_mode="r")


__all__ = ["neg_clip_loss", "score_batches", "whole_pool"]
