"""``llmkern select score``: one pass over the shards, then negCLIPLoss over the whole pool.

First pass, shard by shard: uids, CRC, rows that are no directions (NaN, infinite, zero), the CLIP score, and VAS or
NormSim of every row where they are asked for (``filter`` takes them of survivors alone, which costs less). What a shard
gave is one file; a run that was killed goes on with the shard that it had in hand.
"""

from __future__ import annotations

import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import llmkern
from llmkern._library import bad_value
from llmkern.papers.data_selection import negatives
from llmkern.papers.data_selection.engine import run_units
from llmkern.papers.data_selection.files import Log, atomic, fingerprint, locked, make_folder, short_hash, write_json
from llmkern.papers.data_selection.metadata import read_metadata
from llmkern.papers.data_selection.progress import progress_bar
from llmkern.papers.data_selection.shards import BadShard, Pool, Shard, is_mapped
from llmkern.papers.data_selection.store import (
    DUPLICATE,
    FORMAT,
    NOT_FINITE,
    ROWS,
    ZERO_NORM,
    Store,
    read_lineage,
    read_table,
    write_index,
    write_table,
)
from llmkern.papers.data_selection.target import Target, load_target, row_score
from llmkern.papers.data_selection.tensors import as_tensor, clip_score, square_norms, unit_rows
from llmkern.papers.data_selection.uids import first_of_equals, hex_uids, made_uids

SCORES = ("clip", "neg_clip", "vas", "norm_sim")
# A process with torch in it, before it holds any rows.
PROCESS_BYTES = 400 * 2**20
KINDS = ("missing_file", "unreadable", "checksum", "missing_key", "wrong_dimension", "row_mismatch", "bad_uid")


@dataclass(frozen=True)
class Options:
    """What the scores depend on; everything here goes into the lineage."""

    scores: tuple[str, ...] = ("clip", "neg_clip")
    target: str | None = None
    p: float = math.inf
    temperature: float = 0.01
    batch_size: int = 32768
    num_partitions: int = 10
    seed: int = 0
    precision: str = "fp32"
    normalize: bool = False

    def check(self) -> None:
        op = "select score"
        for name in self.scores:
            if name not in SCORES:
                raise bad_value(op, f"scores out of {', '.join(SCORES)}", repr(name))
        if {"vas", "norm_sim"} & set(self.scores) and self.target is None:
            raise bad_value(op, "--target for vas and norm_sim", "none", "make one with `llmkern select target`")
        for name, fits, wanted in (
            ("temperature", self.temperature > 0 and math.isfinite(self.temperature), "above 0"),
            ("batch_size", self.batch_size >= 1, "of at least 1"),
            ("num_partitions", self.num_partitions >= 1, "of at least 1"),
            ("p", self.p >= 1, "of at least 1, or infinity"),
            ("precision", self.precision in ("fp32", "bf16"), "as fp32 or bf16"),
        ):
            if not fits:
                raise bad_value(op, f"{name} {wanted}", getattr(self, name))


@dataclass(frozen=True)
class Run:
    """How it is computed: nothing here changes a bit of the result."""

    workers: int = 0
    max_memory: int | None = None
    on_bad_shard: str = "fail"
    ray: bool = False
    quiet: bool = False

    def processes(self, op: str, unit_bytes: int, main_bytes: int = 0) -> int:
        """Worker processes, as many as asked for and as memory holds."""
        wanted = self.workers or os.cpu_count() or 1
        if self.max_memory is None:
            return wanted
        fit = (self.max_memory - PROCESS_BYTES - main_bytes) // (PROCESS_BYTES + unit_bytes)
        if fit >= 1:
            return min(wanted, int(fit))
        # One process alone holds both parts.
        least = PROCESS_BYTES + main_bytes + unit_bytes
        if self.max_memory < least:
            raise bad_value(
                op, f"--max-memory of at least {least / 2**20:.0f}M for these sizes", f"{self.max_memory / 2**20:.0f}M"
            )
        return 1


DEFAULTS, DEFAULT_RUN = Options(), Run()


def score_pool(pool: Pool, out: str | Path, options: Options = DEFAULTS, run: Run = DEFAULT_RUN) -> dict[str, Any]:
    """Score a pool into a store; returns its manifest. Raises ValueError at a bad shard unless they are skipped."""
    op = "select score"
    options.check()
    store = Store(str(make_folder(op, "--out", out)))
    log = Log(store.path / "log.jsonl")
    with locked(op, store.path):
        log("start", pool=pool.folder, options=asdict(options), run=asdict(run), version=llmkern.__version__)
        target = None if options.target is None else load_target(op, options.target)
        records = first_pass(pool, store, options, run, target, log)
        good, bad = _settle(pool, store, records, run, log)
        write_json(store.path / "bad_shards.json", bad)
        tables = [read_table(store.shard_file(r["name"])) for r in good]
        kept, duplicates = _keep(tables)
        write_index(store, [s for s in pool.shards if s.name in {r["name"] for r in good}], [r["rows"] for r in good])
        extra: dict[str, np.ndarray] = {}
        convergence: list[dict[str, float]] = []
        if "neg_clip" in options.scores and len(kept):
            config = short_hash(
                [
                    _identity(pool, options),
                    [(r["name"], r["rows"], r["crc"]) for r in good],
                    kept.tolist() if len(kept) < sum(r["rows"] for r in good) else None,
                ]
            )
            extra, convergence = negatives.whole_pool(store, config, kept, good[0]["width"], options, run, log)
        manifest = _manifest(pool, options, good, bad, duplicates, len(kept), convergence)
        _write_scores(store, good, tables, kept, extra, manifest)
        write_json(store.path / "manifest.json", manifest)
        log("end", counts=manifest["counts"], kept=manifest["kept"])
    return manifest


def _identity(pool: Pool, options: Options) -> dict[str, Any]:
    """What a file of the first pass depends on besides the files of its shard."""
    target = None if options.target is None else [options.target, fingerprint(options.target)]
    return {
        "format": FORMAT,
        "keys": pool.keys,
        "scores": sorted(set(options.scores) - {"neg_clip"}),
        "target": target,
        "p": str(options.p),
        "precision": options.precision,
        "normalize": options.normalize,
    }


# First pass -----------------------------------------------------------------------------------------------------------


def first_pass(
    pool: Pool, store: Store, options: Options, run: Run, target: Target | None, log: Log
) -> dict[str, dict[str, Any]]:
    config = short_hash(_identity(pool, options))
    records: dict[str, dict[str, Any]] = {}
    for shard in pool.shards:
        lineage = read_lineage(store.shard_file(shard.name))
        if lineage is not None and lineage["config"] == config and lineage["files"] == _files(shard):
            records[shard.name] = lineage
    open_shards = [shard for shard in pool.shards if shard.name not in records]
    log("first pass", shards=len(pool.shards), found=len(records))
    unit_bytes = max((_unpacked_bytes(shard) for shard in open_shards), default=0) + 2**26
    workers = run.processes("select score", unit_bytes)
    units = [(shard, store, options, config, pool.stored_score) for shard in open_shards]
    with progress_bar("first pass, shards", len(pool.shards), run.quiet) as advance:
        advance(len(records))

        def done(index: int, record: dict[str, Any]) -> None:
            log("shard", **{key: record[key] for key in record if key != "files"})
            advance(1)
            if "bad" in record and run.on_bad_shard == "fail":
                raise bad_value("select score", "whole shards, or --on-bad-shard skip", record["bad"])

        for record in run_units(score_shard, units, workers=workers, ray=run.ray, done=done):
            records[record["name"]] = record
    return records


def _files(shard: Shard) -> dict[str, dict[str, int]]:
    return {path: fingerprint(path) for path in shard.files if Path(path).exists()}


def _unpacked_bytes(shard: Shard) -> int:
    """What unpacking may hold in memory: a guess of four times what is packed."""
    sizes = [Path(path).stat().st_size for path in shard.files if Path(path).exists() and not path.endswith(".npy")]
    mapped = shard.image[1] == "" or (shard.image[0].endswith(".npz") and is_mapped(shard.image))
    return 0 if mapped else 4 * max(sizes, default=0)


def score_shard(shard: Shard, store: Store, options: Options, config: str, stored_score: str) -> dict[str, Any]:
    """Write the score file of a shard; returns its lineage, or the reason why there is none."""
    try:
        columns, facts = _score_rows(shard, store, options, stored_score)
    except BadShard as error:
        # What an earlier run found there is not true any more.
        store.shard_file(shard.name).unlink(missing_ok=True)
        return {"name": shard.name, "bad": str(error), "kind": error.kind, "file": error.file}
    lineage = {"name": shard.name, "config": config, "files": _files(shard), **facts}
    write_table(store.shard_file(shard.name), columns, lineage)
    return lineage


def _score_rows(
    shard: Shard, store: Store, options: Options, stored_score: str
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    uids, stored = read_metadata(shard, stored_score)
    image, image_crc = store.matrix(shard, "image", check=True)
    text, text_crc = store.matrix(shard, "text", check=True)
    if image.shape[1] != text.shape[1]:
        expected = f"{shard.image[1]!r} and {shard.text[1]!r} of one width"
        raise BadShard("wrong_dimension", shard.image[0], expected, f"{image.shape[1]} and {text.shape[1]}")
    rows = {"image": len(image), "text": len(text), **({} if uids is None else {"uid": len(uids)})}
    if len(set(rows.values())) > 1:
        got = ", ".join(f"{count} of {name}" for name, count in rows.items())
        raise BadShard("row_mismatch", shard.image[0], "as many rows in both towers as there are uids", got)
    if uids is None:
        uids = made_uids(shard.name, len(image))
    target = None if options.target is None else load_target("select score", options.target, image.shape[1])
    wanted = [name for name in ("vas", "norm_sim") if name in options.scores]
    out = {name: np.empty(len(image), np.float32) for name in ("clip", *wanted)}
    flags = np.zeros(len(image), np.uint8)
    strange = 0
    for start in range(0, len(image), ROWS):
        part = slice(start, start + ROWS)
        f, g = as_tensor(image[part]), as_tensor(text[part])
        norms = torch.stack([square_norms(f), square_norms(g)])
        finite = torch.isfinite(norms).all(0)
        zero = (norms == 0).any(0) & finite
        flags[part] = (~finite).numpy() * NOT_FINITE + zero.numpy() * ZERO_NORM
        strange += int(((norms.sqrt() - 1).abs() > 0.01).any(0)[finite & ~zero].sum())
        if options.normalize:
            f, g = unit_rows(f), unit_rows(g)
        out["clip"][part] = clip_score(f, g)
        for name in wanted:
            assert target is not None
            out[name][part] = row_score(name, f, target, options.p, options.precision)
    for values in out.values():
        values[flags != 0] = np.nan
    facts = {
        "rows": len(image),
        "width": image.shape[1],
        "crc": {"image": image_crc, "text": text_crc},
        "not_finite": int((flags & NOT_FINITE != 0).sum()),
        "zero_norm": int((flags & ZERO_NORM != 0).sum()),
        "not_unit": strange,
    }
    columns = {"uid_hi": uids[:, 0], "uid_lo": uids[:, 1], "flags": flags, **out}
    if stored is not None:
        columns["stored_clip"] = stored
    return columns, facts


# What the pass found --------------------------------------------------------------------------------------------------


def _settle(
    pool: Pool, store: Store, records: dict[str, dict[str, Any]], run: Run, log: Log
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Lineages of good shards in order, and the bad ones: also those whose rows are of another width than the first."""
    good: list[dict[str, Any]] = []
    bad: list[dict[str, Any]] = []
    for shard in pool.shards:
        record = records[shard.name]
        if "bad" not in record and good and record["width"] != good[0]["width"]:
            sentence = (
                f"{shard.image[0]}: expected rows of {good[0]['width']} numbers as in {good[0]['name']}, "
                f"got {record['width']}"
            )
            record = {"name": shard.name, "bad": sentence, "kind": "wrong_dimension", "file": shard.image[0]}
            if run.on_bad_shard == "fail":
                raise bad_value("select score", "whole shards, or --on-bad-shard skip", sentence)
        (bad if "bad" in record else good).append(record)
    if not good:
        first = bad[0]["bad"] if bad else "no shards"
        raise bad_value("select score", f"at least one shard that can be read in {pool.folder}", first)
    return good, bad


def _keep(tables: list[dict[str, np.ndarray]]) -> tuple[np.ndarray, int]:
    """Numbers of the rows that can be scored, each uid once; marks the others' flags."""
    uids = np.concatenate([np.stack([t["uid_hi"], t["uid_lo"]], 1) for t in tables])
    flags = np.concatenate([t["flags"] for t in tables])
    fine = np.flatnonzero(flags == 0)
    # A row that cannot be scored does not stand for its uid.
    again = fine[~first_of_equals(uids[fine])]
    flags[again] |= DUPLICATE
    start = 0
    for table in tables:
        table["flags"] = flags[start : start + len(table["flags"])]
        start += len(table["flags"])
    return np.flatnonzero(flags == 0), len(again)


def _manifest(
    pool: Pool,
    options: Options,
    good: list[dict[str, Any]],
    bad: list[dict[str, Any]],
    duplicates: int,
    kept: int,
    convergence: list[dict[str, float]],
) -> dict[str, Any]:
    counts = {name: sum(r[name] for r in good) for name in ("rows", "not_finite", "zero_norm", "not_unit")}
    counts |= {"duplicate_uid": duplicates, "shards": len(good), "bad_shards": len(bad)}
    counts |= {kind: sum(r["kind"] == kind for r in bad) for kind in KINDS}
    return {
        "version": llmkern.__version__,
        "format": FORMAT,
        "pool": {"folder": pool.folder, "layout": pool.layout, "keys": list(pool.keys)},
        "options": {**asdict(options), "p": str(options.p)},
        "config": short_hash([_identity(pool, options), asdict(options)]),
        "seed": options.seed,
        "shards": good,
        "bad_shards": bad,
        "counts": counts,
        "kept": kept,
        "convergence": convergence,
    }


def _write_scores(
    store: Store,
    good: list[dict[str, Any]],
    tables: list[dict[str, np.ndarray]],
    kept: np.ndarray,
    extra: dict[str, np.ndarray],
    manifest: dict[str, Any],
) -> None:
    """scores.parquet: a group of rows a shard; a score that a row has not is NaN."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = sorted({name for table in tables for name in table} - {"uid_hi", "uid_lo", "flags"})
    fields = [("uid", pa.string()), ("flags", pa.uint8())]
    schema = pa.schema([*fields, *((name, pa.float32()) for name in [*names, *extra])])
    schema = schema.with_metadata({"llmkern": manifest["config"]})
    start = 0
    with atomic(store.path / "scores.parquet") as file, pq.ParquetWriter(file, schema) as writer:
        for record, table in zip(good, tables):
            rows = record["rows"]
            inside = slice(*np.searchsorted(kept, [start, start + rows]))
            columns: dict[str, Any] = {
                "uid": hex_uids(np.stack([table["uid_hi"], table["uid_lo"]], 1)),
                "flags": table["flags"],
            }
            for name in names:
                columns[name] = table.get(name, np.full(rows, np.nan, np.float32))
            for name, values in extra.items():
                columns[name] = np.full(rows, np.nan, np.float32)
                columns[name][kept[inside] - start] = values[inside]
            writer.write_table(pa.table(columns, schema=schema))
            start += rows
