"""``llmkern select target``: what selected samples are to be like, as a second moment or as rows.

A target file is an npy (or .pt) with a (d, d) symmetric matrix, the second moment that VAS uses, or with (M, d) rows,
whose second moment is taken where one is needed; NormSim needs rows.
"""

from __future__ import annotations

import functools
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from llmkern._library import bad_value
from llmkern.ops.pairwise_scores import norm_sim
from llmkern.ops.vas_score import SecondMoment, second_moment, vas_score
from llmkern.papers.data_selection.engine import run_units
from llmkern.papers.data_selection.files import atomic, fingerprint
from llmkern.papers.data_selection.metadata import shard_uids
from llmkern.papers.data_selection.progress import progress_bar
from llmkern.papers.data_selection.shards import BadShard, Pool, open_matrix
from llmkern.papers.data_selection.store import NOT_FINITE, ROWS, ZERO_NORM, Store, open_rows, read_table
from llmkern.papers.data_selection.tensors import as_tensor, blocks, square_norms, unit_rows
from llmkern.papers.data_selection.uids import contains, load_subset

if TYPE_CHECKING:
    from llmkern.papers.data_selection.score import Run


@dataclass(frozen=True)
class Target:
    """A second moment and, where they are known, the rows that it is of."""

    sigma: Tensor
    rows: Tensor | None
    path: str


def load_target(op: str, path: str | Path, width: int | None = None) -> Target:
    """Read a target file; ``width`` is that of the pool's rows."""
    try:
        found = _load(str(path), fingerprint(path)["mtime_ns"])
    except (OSError, ValueError, EOFError, RuntimeError) as error:
        raise bad_value(
            op, f"{path} to be an npy or pt file of a target", f"a file that cannot be read ({error})"
        ) from error
    if found is None:
        raise bad_value(op, f"{path} to hold a (d, d) second moment or (M, d) rows of finite numbers", "something else")
    if width is not None and found.sigma.shape[0] != width:
        raise bad_value(op, f"{path} of width {width}, as the pool has", f"{found.sigma.shape[0]}")
    return found


@functools.lru_cache(maxsize=2)
def _load(path: str, stamp: int) -> Target | None:
    if path.endswith(".pt"):
        array = torch.load(path, weights_only=True, map_location="cpu")
    else:
        array = as_tensor(np.load(path, mmap_mode="r", allow_pickle=False))
    if not isinstance(array, Tensor) or array.dim() != 2 or not array.is_floating_point() or 0 in array.shape:
        return None
    if not bool(torch.isfinite(array).all()):
        return None
    if array.shape[0] == array.shape[1] and torch.equal(array, array.t()):
        return Target(array.float(), None, path)
    return Target(second_moment(array.float() if array.dtype == torch.float64 else array), array, path)


def row_score(name: str, image: Tensor, target: Target, p: float, precision: str) -> Tensor:
    """VAS or NormSim of rows."""
    if name == "vas":
        return vas_score(image, target.sigma, precision=precision)
    if target.rows is None:
        raise bad_value("select", f"{target.path} to hold (M, d) rows, which norm_sim needs", "a second moment")
    return norm_sim(image, target.rows.to(image.dtype), p=p, precision=precision)


# Making one -----------------------------------------------------------------------------------------------------------


def pool_moment(store: Store, run: Run, tower: str = "image", normalize: bool = False) -> SecondMoment:
    """Second moment of a tower over all rows of a store that are finite and not zero; the same bits for any workers."""
    rows = open_rows(store.folder)
    units = [(store.folder, i, tower, normalize) for i in range(len(rows.shards))]
    total = SecondMoment(rows.matrix(0, tower).shape[1])
    workers = run.processes("select target", 2**28)
    with progress_bar("second moment, shards", len(units), run.quiet) as advance:
        for state in run_units(shard_moment, units, workers=workers, ray=run.ray, done=lambda i, r: advance(1)):
            part = SecondMoment(total.dim)
            part.load_state_dict({k: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for k, v in state.items()})
            total.merge(part)
    return total


def shard_moment(store: str, shard: int, tower: str, normalize: bool) -> dict[str, np.ndarray | int]:
    rows = open_rows(store)
    x = rows.matrix(shard, tower)
    flags = read_table(Store(store).shard_file(rows.shards[shard].name), ["flags"])["flags"]
    moment = SecondMoment(x.shape[1])
    for start in range(0, len(x), ROWS):
        part = slice(start, start + ROWS)
        block = as_tensor(x[part][flags[part] & (NOT_FINITE | ZERO_NORM) == 0])
        moment.add(unit_rows(block) if normalize else block)
    return {k: v.numpy() if isinstance(v, Tensor) else v for k, v in moment.state_dict().items()}


def save_target(path: str | Path, array: np.ndarray) -> None:
    with atomic(path, "select target") as file:
        np.save(file, array)


def make_target(
    pool: Pool, kind: str, count: int | None = None, subset: str | Path | None = None, seed: int = 0
) -> np.ndarray:
    """(d, d) fp32 second moment or (count, d) rows of the image tower of a pool, which no row of NaN or zeros joins.

    The rows that are drawn are those with the least value of a hash of (seed, uid), whatever shards they lie in.
    """
    op = "select target"
    if count is not None and count < 1:
        raise bad_value(op, "--rows of at least 1", count)
    wanted = None if subset is None else load_subset(subset, op)
    uids, places = [], []
    with tempfile.TemporaryDirectory() as scratch:
        matrices = []
        for i, shard in enumerate(pool.shards):
            try:
                image, _ = open_matrix(shard.image, Path(scratch) / f"{i}.npy", check=True)
                own = shard_uids(shard, len(image))
            except BadShard as error:
                raise bad_value(op, "whole shards", error) from error
            matrices.append(image)
            norms = np.concatenate([square_norms(x).numpy() for _, x in blocks(image, ROWS)] or [np.empty(0)])
            fine = np.isfinite(norms) & (norms > 0)
            if wanted is not None:
                fine &= contains(wanted, own)
            uids.append(own[fine])
            places.append(np.stack([np.full(int(fine.sum()), i), np.flatnonzero(fine)], 1))
        every, place = np.concatenate(uids), np.concatenate(places)
        if len(every) == 0:
            raise bad_value(op, "at least one row", f"none in {pool.folder}")
        if count is not None and count < len(every):
            place = place[np.sort(np.argsort(_draw(every, seed), kind="stable")[:count])]
        moment, rows = SecondMoment(matrices[0].shape[1]), []
        for i, image in enumerate(matrices):
            own = place[place[:, 0] == i, 1]
            for start in range(0, len(own), ROWS):
                x = image[own[start : start + ROWS]]
                moment.add(as_tensor(x)) if kind == "moment" else rows.append(x)
        return moment.mean().numpy() if kind == "moment" else np.concatenate(rows)


def _draw(uids: np.ndarray, seed: int) -> np.ndarray:
    """A well-mixed 64-bit function of (uid, seed): the finaliser of SplitMix64 over both halves."""
    with np.errstate(over="ignore"):
        x = uids[:, 0] ^ (uids[:, 1] * np.uint64(0x9E3779B97F4A7C15)) ^ np.uint64(seed % 2**64)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
        return x ^ (x >> np.uint64(31))
