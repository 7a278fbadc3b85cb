"""What the table of a shard says of its rows."""

from __future__ import annotations

import itertools

import numpy as np

from llmkern.papers.data_selection.shards import CAPTIONS, BadShard, Shard, column_names, read_columns
from llmkern.papers.data_selection.store import Rows, Store
from llmkern.papers.data_selection.uids import made_uids, parse_uids


def read_metadata(shard: Shard, stored_score: str) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Uids and the CLIP score that stands in the table, where there are any."""
    if shard.metadata is None:
        return None, None
    names = column_names(shard.metadata)
    # Tables of clip-retrieval have no uid; a DataComp table without one is broken.
    if "uid" not in names and shard.image[1] == "":
        return None, None
    keys = ["uid", *([stored_score] if stored_score in names else [])]
    table = read_columns(shard.metadata, keys)
    try:
        uids = parse_uids(table.column("uid"), f"{shard.metadata}, column 'uid',")
    except ValueError as error:
        expected, _, got = str(error).removeprefix("select: expected ").partition(", got ")
        raise BadShard("bad_uid", shard.metadata, expected.removeprefix(f"{shard.metadata}, "), got) from error
    return uids, table.column(keys[1]).to_numpy().astype(np.float32) if len(keys) > 1 else None


def shard_uids(shard: Shard, rows: int) -> np.ndarray:
    """(rows, 2) uids of a shard, made from its name where it has none."""
    uids, _ = read_metadata(shard, "")
    if uids is None:
        return made_uids(shard.name, rows)
    if len(uids) != rows:
        raise BadShard("row_mismatch", shard.image[0], "as many rows as there are uids", f"{rows} and {len(uids)}")
    return uids


def captions(store: Store, numbers: np.ndarray) -> list[tuple[str, str]]:
    """(caption, url) of rows by number, ascending; empty where a table has none."""
    rows = Rows(store)
    found: list[tuple[str, str]] = []
    ends = np.searchsorted(numbers, rows.offsets)
    for i, (start, stop) in enumerate(itertools.pairwise(ends)):
        table = rows.shards[i].metadata
        if stop == start:
            continue
        if table is None:
            found += [("", "")] * (stop - start)
            continue
        names = column_names(table)
        keys = [next((c for c in choices if c in names), "") for choices in (CAPTIONS, ("url", "image_path"))]
        columns = read_columns(table, [key for key in keys if key])
        places = numbers[start:stop] - rows.offsets[i]
        texts = [columns.column(k).take(places).to_pylist() if k else [""] * len(places) for k in keys]
        found += [(str(a or ""), str(b or "")) for a, b in zip(*texts)]
    return found
