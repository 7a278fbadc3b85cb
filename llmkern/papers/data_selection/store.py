"""The score store: a folder that holds what has been computed of a pool, and knows of what.

    manifest.json     shards with size, modification time and CRC of their files, counts, options, seed, version
    bad_shards.json   shards that could not be read, with the reason
    log.jsonl         a line an event
    scores.parquet    all scores, a row a sample, in the order of shards and rows
    shards/           one file a shard, of the first pass
    neg_clip/, survivors/, unpacked/    parts of later passes, and matrices that could not be mapped where they lie

A file of a shard is used again where its lineage (files, keys, options) is that of the run, and made anew otherwise.
"""

from __future__ import annotations

import functools
import itertools
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llmkern._library import bad_value
from llmkern.papers.data_selection.files import atomic, write_json
from llmkern.papers.data_selection.shards import Shard, open_matrix

# Bits of the column "flags".
NOT_FINITE, ZERO_NORM, DUPLICATE = 1, 2, 4
# Rows that are computed at once. Part of the format: another number could change last bits.
ROWS = 8192
FORMAT = 1


@dataclass(frozen=True)
class Store:
    folder: str

    @property
    def path(self) -> Path:
        return Path(self.folder)

    def shard_file(self, name: str) -> Path:
        return self.path / "shards" / f"{name}.parquet"

    def unpacked(self, shard: Shard, tower: str) -> Path:
        return self.path / "unpacked" / f"{shard.name}.{tower}.npy"

    def manifest(self) -> dict[str, Any]:
        path = self.path / "manifest.json"
        try:
            return json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise bad_value(
                "select",
                f"{self.folder} to be the store of a finished `llmkern select score`",
                f"no manifest that can be read ({error})",
                "run that first",
            ) from error

    def matrix(self, shard: Shard, tower: str, *, check: bool = False) -> tuple[np.ndarray, int]:
        return open_matrix(getattr(shard, tower), self.unpacked(shard, tower), check=check)


def write_table(path: Path, columns: dict[str, Any], lineage: dict[str, Any]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table(columns).replace_schema_metadata({"llmkern": json.dumps(lineage, sort_keys=True)})
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic(path) as file:
        pq.write_table(table, file)


def read_lineage(path: Path) -> dict[str, Any] | None:
    """The lineage in a score file, or none where there is no whole file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return json.loads((pq.read_schema(path).metadata or {})[b"llmkern"])
    except (OSError, KeyError, ValueError, pa.ArrowException):
        return None


def read_table(path: Path, columns: list[str] | None = None) -> dict[str, np.ndarray]:
    import pyarrow.parquet as pq

    table = pq.read_table(path, columns=columns)
    return {name: table.column(name).to_numpy() for name in table.column_names}


# Rows across shards ---------------------------------------------------------------------------------------------------


def write_index(store: Store, shards: list[Shard], counts: list[int]) -> None:
    """The good shards with their rows, where worker processes find them."""
    write_json(store.path / "index.json", {"shards": [asdict(s) for s in shards], "rows": counts})


class Rows:
    """Rows of the whole pool by number: those of the first shard, then those of the second, and so on."""

    def __init__(self, store: Store) -> None:
        made = json.loads((store.path / "index.json").read_text())
        self.store = store
        self.shards = [Shard(s["name"], tuple(s["image"]), tuple(s["text"]), s["metadata"]) for s in made["shards"]]
        self.offsets = np.concatenate([[0], np.cumsum(made["rows"])]).astype(np.int64)
        # A mapping costs address space and a file handle; a pool may have thousands of shards.
        self._matrix = functools.lru_cache(maxsize=256)(lambda i, tower: store.matrix(self.shards[i], tower)[0])

    def __len__(self) -> int:
        return int(self.offsets[-1])

    def matrix(self, shard: int, tower: str) -> np.ndarray:
        return self._matrix(shard, tower)

    def take(self, tower: str, numbers: np.ndarray) -> np.ndarray:
        """(n, d) copies of rows; ``numbers`` ascend, so that files are read forwards."""
        ends = np.searchsorted(numbers, self.offsets)
        like = self.matrix(0, tower) if self.shards else np.empty((0, 1), np.float32)
        out = np.empty((len(numbers), like.shape[1]), like.dtype)
        for i, (start, stop) in enumerate(itertools.pairwise(ends)):
            if stop > start:
                _copy_rows(self.matrix(i, tower), numbers[start:stop] - self.offsets[i], out[start:stop])
        return out


def _copy_rows(matrix: np.ndarray, numbers: np.ndarray, out: np.ndarray) -> None:
    if not matrix.flags.c_contiguous:
        out[:] = matrix[numbers]
        return
    # Members of a zip lie at any address, and numpy copies the whole of what is not aligned; bytes always are.
    row = np.dtype((np.void, matrix.shape[1] * matrix.itemsize))
    # Numbers are in range; to say so spares numpy a copy of the result.
    np.take(matrix.view(row)[:, 0], numbers, 0, out.view(row)[:, 0], "clip")


@functools.lru_cache(maxsize=2)
def _rows(folder: str, stamp: int) -> Rows:
    return Rows(Store(folder))


def open_rows(folder: str) -> Rows:
    """Rows of a store, kept open in this process as long as its index is the same."""
    return _rows(folder, (Path(folder) / "index.json").stat().st_mtime_ns)
