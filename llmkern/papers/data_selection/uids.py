"""Identities of samples: two 64-bit halves of 32 hexadecimal digits, and DataComp's files of them.

A subset file is what DataComp's resharder takes: ``np.save`` of an array of dtype "u8,u8", sorted lexicographically; a
uid that stands there twice is read twice in training. Halves are sorted as two plain columns: numpy sorts a structured
array a hundred times slower.
"""

from __future__ import annotations

import hashlib
import string
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llmkern._library import bad_value
from llmkern.papers.data_selection.files import atomic

UID = np.dtype("u8,u8")
# How many uids of a set are wanted of one that stands in the inputs (first, second, ...) so many times.
OPERATIONS = ("union", "intersection", "difference", "repeat")

_NIBBLE = np.full(256, 255, np.uint8)
for _digit in string.hexdigits:
    _NIBBLE[ord(_digit)] = int(_digit, 16)


def parse_uids(column: Any, where: str) -> np.ndarray:
    """(N, 2) uint64 of an arrow column of strings; ``where`` names file and key in a refusal."""
    import pyarrow as pa
    import pyarrow.compute as pc

    expected = f"{where} to hold uids of 32 hexadecimal digits"
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
        if isinstance(column, pa.ChunkedArray):
            column = pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], pa.string())
    if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
        raise bad_value("select", expected, f"a column of {column.type}")
    fits = pc.fill_null(pc.equal(pc.binary_length(column), 32), False).to_numpy(zero_copy_only=False)
    if not fits.all():
        row = int(np.flatnonzero(~fits)[0])
        value = column[row].as_py()
        got = "none" if value is None else f"{len(value)} characters, {value[:40]!r}"
        raise bad_value("select", expected, f"{got} at row {row}")
    if len(column) == 0:
        return np.empty((0, 2), np.uint64)
    fixed = column.cast(pa.large_binary() if pa.types.is_large_string(column.type) else pa.binary()).cast(pa.binary(32))
    text = np.frombuffer(fixed.buffers()[1], np.uint8)[32 * fixed.offset : 32 * (fixed.offset + len(fixed))]
    nibbles = _NIBBLE[text.reshape(-1, 32)]
    bad = (nibbles == 255).any(1)
    if bad.any():
        row = int(np.flatnonzero(bad)[0])
        raise bad_value("select", expected, f"{column[row].as_py()!r} at row {row}")
    packed = nibbles[:, 0::2] << 4 | nibbles[:, 1::2]
    return np.ascontiguousarray(packed).view(">u8").astype(np.uint64)


def made_uids(name: str, rows: int) -> np.ndarray:
    """Uids for a pool that has none: eight bytes of a hash of the shard's name, then the row."""
    high = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
    return np.stack([np.full(rows, high, np.uint64), np.arange(rows, dtype=np.uint64)], 1)


def hex_uids(uids: np.ndarray) -> list[str]:
    text = np.ascontiguousarray(uids.astype(">u8")).tobytes().hex()
    return [text[i : i + 32] for i in range(0, len(text), 32)]


def uid_order(uids: np.ndarray) -> np.ndarray:
    """Indices that sort (N, 2) uids; equal ones keep their order."""
    return np.lexsort((uids[:, 1], uids[:, 0]))


def first_of_equals(uids: np.ndarray) -> np.ndarray:
    """(N,) mask of the first place of every uid."""
    order = uid_order(uids)
    found = uids[order]
    again = np.zeros(len(uids), bool)
    again[1:] = (found[1:] == found[:-1]).all(1)
    first = np.empty(len(uids), bool)
    first[order] = ~again
    return first


# Subset files ---------------------------------------------------------------------------------------------------------


def load_subset(path: str | Path, op: str = "select combine") -> np.ndarray:
    """(N, 2) uint64, sorted, of a file in DataComp's format; a memory-mapped one of the same dtype is read alike."""
    expected = f"{path} to be an npy file of dtype u8,u8, one entry a uid"
    try:
        # What a subset is sorted by is cheap to establish again, so files written by others need not be sorted.
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise bad_value(op, expected, f"a file that cannot be read ({error})") from error
    if array.dtype != UID or array.ndim != 1:
        raise bad_value(op, expected, f"dtype {array.dtype} of shape {array.shape}")
    uids = np.stack([array["f0"], array["f1"]], 1)
    return uids[uid_order(uids)]


def save_subset(path: str | Path, uids: np.ndarray) -> None:
    """Write (N, 2) uids sorted, whole or not at all."""
    out = np.empty(len(uids), UID)
    ordered = uids[uid_order(uids)]
    out["f0"], out["f1"] = ordered[:, 0], ordered[:, 1]
    with atomic(path) as file:
        np.save(file, out)


def contains(subset: np.ndarray, uids: np.ndarray) -> np.ndarray:
    """(N,) mask of the uids that stand in a subset."""
    both = np.concatenate([subset, uids])
    order = uid_order(both)
    found = both[order]
    new = np.ones(len(both), bool)
    new[1:] = (found[1:] != found[:-1]).any(1)
    group = np.cumsum(new) - 1
    held = np.zeros(int(group[-1]) + 1 if len(group) else 0, bool)
    held[group[order < len(subset)]] = True
    out = np.empty(len(both), bool)
    out[order] = held[group]
    return out[len(subset) :]


def combine(operation: str, subsets: Sequence[np.ndarray]) -> np.ndarray:
    """Set algebra over (N, 2) uid arrays: sorted, each uid once; ``repeat`` keeps every repetition.

    union: in any; intersection: in all; difference: in the first and no other; repeat: the sum of how often.
    """
    if operation not in OPERATIONS:
        raise bad_value("select combine", f"an operation out of {', '.join(OPERATIONS)}", repr(operation))
    if not subsets:
        raise bad_value("select combine", "at least one set of uids", "none")
    if operation == "repeat":
        every = np.concatenate(subsets)
        return every[uid_order(every)]
    once = [subset[first_of_equals(subset)] for subset in subsets]
    every = np.concatenate(once)
    of_first = np.repeat(np.arange(len(once)) == 0, [len(subset) for subset in once])
    order = uid_order(every)
    every, of_first = every[order], of_first[order]
    new = np.ones(len(every), bool)
    new[1:] = (every[1:] != every[:-1]).any(1)
    starts = np.flatnonzero(new)
    if len(starts) == 0:
        return every
    count = np.add.reduceat(np.ones(len(every), np.int64), starts)
    in_first = np.logical_or.reduceat(of_first, starts)
    wanted = {"union": count > 0, "intersection": count == len(once), "difference": in_first & (count == 1)}
    return every[starts[wanted[operation]]]
