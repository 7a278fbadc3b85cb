"""Files that appear whole or not at all, and the lock that keeps two runs out of one folder."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from llmkern._library import bad_value


@contextlib.contextmanager
def atomic(path: str | Path, op: str = "select") -> Iterator[IO[bytes]]:
    """A file open for writing that takes the place of ``path`` when the block ends, on the disk by then."""
    path = Path(path)
    scratch = path.with_name(f"{path.name}.{os.getpid()}.new")
    try:
        file = scratch.open("wb")
    except OSError as error:
        raise bad_value(
            op, f"{path} to be a file that can be written", f"{scratch.parent} ({error.strerror})"
        ) from error
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, path)
        _sync_folder(path.parent)
    except IsADirectoryError as error:
        raise bad_value(op, f"{path} to be a file that can be written", "a folder") from error
    finally:
        scratch.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: str | Path, value: Any, op: str = "select") -> None:
    with atomic(path, op) as file:
        file.write((json.dumps(value, indent=1, sort_keys=True) + "\n").encode())


def make_folder(op: str, argument: str, folder: str | Path) -> Path:
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".writable.{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise bad_value(op, f"{argument} as a folder that can be written", f"{folder} ({error.strerror})") from error
    return folder


@contextlib.contextmanager
def locked(op: str, folder: Path) -> Iterator[None]:
    """One writer a folder; what killed ones left half-written is swept away. The lock goes with its process."""
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise bad_value(
                op, f"{folder} as a folder that no other run writes to", "one in use", "wait for that run to end"
            ) from None
        for left in folder.rglob("*.new"):
            left.unlink(missing_ok=True)
        yield


def fingerprint(path: str | Path) -> dict[str, int]:
    """Size and modification time of a file: what has to stay for its scores to stay."""
    stat = os.stat(path)
    return {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns}


def short_hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


class Log:
    """One line of json an event, appended to a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __call__(self, event: str, **facts: Any) -> None:
        line = {"time": round(time.time(), 3), "event": event, **facts}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, default=str) + "\n")
