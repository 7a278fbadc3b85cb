"""Results of the demo's stages on disk: written whole or not at all, found again by what they were made from."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, is_dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn


def stage_key(*parts: Any) -> str:
    """Short hash of settings (dataclasses), keys of earlier stages (strings) and the source of modules."""

    def plain(part: Any) -> Any:
        if isinstance(part, ModuleType):
            return inspect.getsource(part)
        return {type(part).__name__: asdict(part)} if is_dataclass(part) and not isinstance(part, type) else part

    text = json.dumps([plain(part) for part in parts], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class Cache:
    """A folder of ``<stage>-<key>.pt`` files, each a dictionary of tensors and plain Python values."""

    def __init__(self, folder: Path, checkpoint_seconds: float = 10.0) -> None:
        self.folder, self.checkpoint_seconds = folder, checkpoint_seconds
        folder.mkdir(parents=True, exist_ok=True)

    def path(self, stage: str, key: str) -> Path:
        return self.folder / f"{stage}-{key}.pt"

    def clear(self) -> None:
        """Remove what a cache writes, and nothing else that may lie in the folder."""
        for pattern in ("*.pt", "*.pt.new"):
            for path in self.folder.glob(pattern):
                path.unlink()

    def load(self, stage: str, key: str) -> dict[str, Any] | None:
        path = self.path(stage, key)
        if not path.exists():
            return None
        try:
            return torch.load(path, weights_only=True)
        except Exception:
            # Whatever is wrong with the file (a full disk, another torch), the stage can be made again.
            path.unlink()
            return None

    def save(self, stage: str, key: str, value: dict[str, Any]) -> None:
        path = self.path(stage, key)
        scratch = path.with_suffix(".pt.new")
        with scratch.open("wb") as file:
            torch.save(value, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, path)

    def remove(self, stage: str, key: str) -> None:
        path = self.path(stage, key)
        path.unlink(missing_ok=True)
        # Left by a run that was killed while it stored.
        path.with_suffix(".pt.new").unlink(missing_ok=True)

    def remember(self, stage: str, key: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        value = self.load(stage, key)
        if value is None:
            value = make()
            self.save(stage, key, value)
        return value


def resumable_steps(
    cache: Cache,
    stage: str,
    key: str,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: int,
    history: list[Any],
) -> Iterator[int]:
    """Step numbers of a training loop, from its last checkpoint on.

    What a step draws must be a function of its number, so that model, optimizer, step and history are the whole state,
    and a run that was killed ends with the weights of one that was not. The caller saves the result and may then
    remove the checkpoint, which is stored as ``<stage>.partial``.
    """
    partial = f"{stage}.partial"
    state = cache.load(partial, key)
    first = 0
    if state is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        history.extend(state["history"])
        first = state["step"]
    saved = time.monotonic()
    for step in range(first, steps):
        yield step
        if time.monotonic() - saved >= cache.checkpoint_seconds:
            state = {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "history": history,
                "step": step + 1,
            }
            cache.save(partial, key, state)
            saved = time.monotonic()
