"""``llmkern select filter``: stage after stage on the survivors, to a subset file for DataComp's resharder.

Fractions count on the original pool, as in both papers: ``--stage clip:0.45 --stage vas:0.3`` leaves 30 % of it. VAS
and NormSim that ``score`` has not taken are computed here, of the survivors alone.
"""

from __future__ import annotations

import json
import math
import time
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llmkern._library import bad_value
from llmkern.papers.data_selection.engine import run_units
from llmkern.papers.data_selection.files import Log, atomic, locked, short_hash, write_json
from llmkern.papers.data_selection.progress import progress_bar
from llmkern.papers.data_selection.rank import Stage, check_stages, keep_top
from llmkern.papers.data_selection.score import DEFAULT_RUN, Run
from llmkern.papers.data_selection.store import ROWS, Store, open_rows
from llmkern.papers.data_selection.target import load_target, pool_moment, row_score
from llmkern.papers.data_selection.tensors import as_tensor, unit_rows
from llmkern.papers.data_selection.uids import contains, load_subset, parse_uids, save_subset, uid_order
from llmkern.papers.data_selection.vas_d import vas_d

LATE = ("vas", "norm_sim")
CHECKPOINT_SECONDS = 10.0


@dataclass(frozen=True)
class FilterOptions:
    stages: tuple[Stage, ...]
    target: str | None = None
    p: float = math.inf
    precision: str = "fp32"
    normalize: bool = False
    rounds: int = 168
    within: str | None = None


@dataclass
class Scores:
    """All rows of scores.parquet; ``values`` holds a column a score."""

    uids: np.ndarray
    flags: np.ndarray
    values: dict[str, np.ndarray]


def load_scores(store: Store) -> Scores:
    import pyarrow.parquet as pq

    path = store.path / "scores.parquet"
    config = store.manifest()["config"]
    try:
        table = pq.read_table(path)
    except (OSError, ValueError) as error:
        raise bad_value("select", f"{path} as a whole parquet file", f"none that can be read ({error})") from error
    if (table.schema.metadata or {}).get(b"llmkern", b"").decode() != config:
        raise bad_value("select", f"{path} of the run in manifest.json", "that of another", "run `select score` again")
    values = {n: table.column(n).to_numpy() for n in table.column_names if n not in ("uid", "flags")}
    return Scores(parse_uids(table.column("uid"), f"{path}, column 'uid',"), table.column("flags").to_numpy(), values)


def filter_store(folder: str | Path, out: str | Path, options: FilterOptions, run: Run = DEFAULT_RUN) -> dict[str, Any]:
    """Write the subset that passes all stages; returns the count after each, which also goes to ``<out>.json``."""
    op = "select filter"
    if not options.stages:
        raise bad_value(op, "at least one --stage", "none")
    check_stages(list(options.stages))
    store = Store(str(folder))
    scores = load_scores(store)
    known = [*scores.values, *LATE, "vas_d"]
    for stage in options.stages:
        if stage.score not in known:
            raise bad_value(op, f"a score out of {', '.join(sorted(set(known)))} in {stage}", repr(stage.score))
        if stage.score in LATE and stage.score not in scores.values and options.target is None:
            raise bad_value(op, f"--target for the stage {stage}", "none", "make one with `llmkern select target`")
        if stage.score == "vas_d" and stage.fraction is None:
            raise bad_value(op, "vas_d with a fraction", str(stage))
    log = Log(store.path / "log.jsonl")
    kept = np.flatnonzero(scores.flags == 0)
    total = len(scores.flags)
    steps: list[dict[str, Any]] = [{"stage": "pool", "rows": total}, {"stage": "can be scored", "rows": len(kept)}]
    if options.within is not None:
        # A set of another method as the input pool; fractions still count on all rows.
        kept = kept[contains(load_subset(options.within, op), scores.uids[kept])]
        steps.append({"stage": f"within {options.within}", "rows": len(kept)})
    with locked(op, store.path):
        for stage in options.stages:
            kept = _apply(store, scores, kept, stage, total, options, run)
            steps.append({"stage": str(stage), "rows": len(kept)})
            log("filter", **steps[-1])
    save_subset(out, scores.uids[kept])
    lineage = {"store": store.manifest()["config"], "steps": steps, "target": options.target, "p": str(options.p)}
    write_json(f"{out}.json", lineage)
    return lineage


def _apply(
    store: Store, scores: Scores, kept: np.ndarray, stage: Stage, total: int, options: FilterOptions, run: Run
) -> np.ndarray:
    count = int(total * stage.fraction) if stage.fraction is not None else 0
    if stage.score == "vas_d":
        if count == 0:
            return kept[:0]
        return kept[_vas_d_stage(store, scores.uids, kept, min(count, len(kept)), options, run)]
    if stage.score in scores.values:
        values = scores.values[stage.score][kept]
    else:
        values = late_scores(store, kept, stage.score, options, run)
    if stage.threshold is not None:
        return kept[values >= np.float32(stage.threshold)]
    return kept[keep_top(values, scores.uids[kept], count)]


# Scores of survivors --------------------------------------------------------------------------------------------------


def late_scores(store: Store, kept: np.ndarray, name: str, options: FilterOptions, run: Run) -> np.ndarray:
    """VAS or NormSim of these rows alone, a file a block; what a killed run has left is used again."""
    assert options.target is not None
    rows = open_rows(store.folder)
    target = load_target("select filter", options.target, rows.matrix(0, "image").shape[1])
    settings = [name, zlib.crc32(target.sigma.numpy().tobytes()), str(options.p), options.precision, options.normalize]
    if target.rows is not None:
        settings.append(len(target.rows))
    config = short_hash([settings, store.manifest()["config"], zlib.crc32(kept.tobytes()), len(kept)])
    folder = store.path / "survivors" / config
    folder.mkdir(parents=True, exist_ok=True)
    numbers = folder / "rows.npy"
    if not numbers.exists():
        _save(numbers, kept)
    starts = range(0, len(kept), ROWS)
    todo = [start for start in starts if not _block_file(folder, start).exists()]
    units = [(store.folder, start, str(folder), name, options) for start in todo]
    widest = 0 if target.rows is None else target.rows.numel() * target.rows.element_size()
    workers = run.processes("select filter", 2**27 + widest)
    with progress_bar(f"{name} of survivors, blocks", len(starts), run.quiet) as advance:
        advance(len(starts) - len(todo))
        run_units(score_survivors, units, workers=workers, ray=run.ray, done=lambda i, r: advance(1))
    return np.concatenate([np.empty(0, np.float32), *(np.load(_block_file(folder, start)) for start in starts)])


def _block_file(folder: Path, start: int) -> Path:
    return folder / f"block-{start}.npy"


def score_survivors(store: str, start: int, folder: str, name: str, options: FilterOptions) -> None:
    rows, kept = open_rows(store), np.load(f"{folder}/rows.npy", mmap_mode="r")
    x = as_tensor(rows.take("image", kept[start : start + ROWS]))
    assert options.target is not None
    target = load_target("select filter", options.target, x.shape[1])
    x = unit_rows(x) if options.normalize else x
    out = row_score(name, x, target, options.p, options.precision)
    _save(_block_file(Path(folder), start), out.numpy())


def _vas_d_stage(
    store: Store, uids: np.ndarray, kept: np.ndarray, count: int, options: FilterOptions, run: Run
) -> np.ndarray:
    """Places in ``kept`` that VAS-D leaves; the first round has the moment of the whole pool, as in the paper."""
    rows = open_rows(store.folder)
    settings = [store.manifest()["config"], zlib.crc32(kept.tobytes()), len(kept), count, options.rounds]
    folder = store.path / "survivors" / f"vas_d-{short_hash([settings, options.normalize])}"
    folder.mkdir(parents=True, exist_ok=True)
    matrix = folder / "image.npy"
    if not matrix.exists():
        _gather(rows, kept, matrix, options.normalize)
    image = np.load(matrix, mmap_mode="r")
    resume = _resume(folder)
    first = None if resume is not None else pool_moment(store, run, normalize=options.normalize)
    ties = np.empty(len(kept), np.int64)
    ties[uid_order(uids[kept])] = np.arange(len(kept))
    saved = time.monotonic()
    with progress_bar("VAS-D, rounds", options.rounds, run.quiet) as advance:
        advance(0 if resume is None else resume[0])

        def checkpoint(done: int, alive: np.ndarray) -> None:
            nonlocal saved
            advance(1)
            if time.monotonic() - saved > CHECKPOINT_SECONDS:
                _save(folder / f"round-{done}.npy", alive)
                saved = time.monotonic()

        threads = torch.get_num_threads()
        try:
            # One thread, so that a machine with more of them finds the same bits.
            torch.set_num_threads(1)
            return vas_d(image, count, options.rounds, first=first, ties=ties, resume=resume, checkpoint=checkpoint)
        finally:
            torch.set_num_threads(threads)


def _gather(rows: Any, kept: np.ndarray, path: Path, normalize: bool) -> None:
    like = rows.take("image", kept[:1])
    dtype = np.dtype(np.float32) if normalize else like.dtype
    with atomic(path) as file:
        shape = (len(kept), like.shape[1])
        header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        for start in range(0, len(kept), ROWS):
            x = rows.take("image", kept[start : start + ROWS])
            file.write((unit_rows(as_tensor(x)).numpy() if normalize else np.ascontiguousarray(x)).tobytes())


def _resume(folder: Path) -> tuple[int, np.ndarray] | None:
    rounds = sorted(int(path.stem.partition("-")[2]) for path in folder.glob("round-*.npy"))
    return (rounds[-1], np.load(folder / f"round-{rounds[-1]}.npy")) if rounds else None


def _save(path: Path, array: np.ndarray) -> None:
    with atomic(path) as file:
        np.save(file, array)


def read_steps(out: str | Path) -> list[dict[str, Any]]:
    """What ``filter`` noted beside a subset, or nothing for one of another origin."""
    path = Path(f"{out}.json")
    return json.loads(path.read_text())["steps"] if path.exists() else []


__all__ = ["FilterOptions", "filter_store", "late_scores", "load_scores"]
