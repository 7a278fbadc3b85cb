r"""Single Layer Warmup: each replaced layer by itself learns to give what its own MLP gave.

    min over the factors of layer p:   E |MLP_p(x) - MLP_shared,p(x)|^2 / E |MLP_p(x)|^2

x being what layer p gets in the original model. Layers know nothing of one another: a run may take some of them, and
several machines all. What the original gives is computed once and kept on disk (SHARP, arXiv 2502.07832, first stage).
"""

from __future__ import annotations

import hashlib
import math
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmkern._library import bad_value
from llmkern.demo.cache import Cache, resumable_steps, stage_key
from llmkern.papers.data_selection.files import atomic
from llmkern.papers.sharp.files import base_fingerprint, check_factors, enough_disk, raw_bytes
from llmkern.papers.sharp.finetuning import training_in_float32
from llmkern.papers.sharp.observe import Show, watch_mlps

OP = "sharp warmup"


@dataclass(frozen=True)
class WarmupSettings:
    """``tokens`` of the text make a step; the rate falls from ``learning_rate`` along a cosine."""

    steps: int = 300
    tokens: int = 512
    learning_rate: float = 2e-3
    evaluate_every: int = 50
    seed: int = 0


class TeacherCache:
    """Inputs and outputs of a model's own MLPs on a text, as files of ``shard_rows`` rows of it each.

    A file is written whole or not at all, and is found again by model, text and layers; the last one is kept from
    training and measures it.
    """

    def __init__(self, folder: str | Path, teacher: Any, ids: Tensor, layers: Iterable[int], shard_rows: int = 16):
        self.teacher, self.ids, self.layers = teacher, ids, sorted(layers)
        self.parts = ids.split(shard_rows)
        if len(self.parts) < 2:
            raise bad_value(OP, f"more than {shard_rows} rows of text", len(ids), "give a longer text")
        text = hashlib.sha256(raw_bytes(ids.long())).hexdigest()
        self.key = stage_key(base_fingerprint(teacher), text, self.layers, shard_rows, str(teacher.dtype))
        self.folder = Path(folder) / f"teacher-{self.key}"
        self._read: dict[int, dict[str, Tensor]] = {}

    @property
    def nbytes(self) -> int:
        """Of all files together, apart from their headers."""
        row = 2 * len(self.layers) * self.teacher.config.hidden_size * torch.finfo(self.teacher.dtype).bits // 8
        return self.ids.numel() * row

    def path(self, part: int) -> Path:
        return self.folder / f"{part:05d}.safetensors"

    def fill(self, show: Show = lambda done, note: None) -> None:
        """Make the files that are missing."""
        from safetensors.torch import save as to_bytes

        with enough_disk(self.folder, OP):
            self.folder.mkdir(parents=True, exist_ok=True)
            missing = [part for part in range(len(self.parts)) if not self.path(part).exists()]
            needed, free = self.nbytes * len(missing) // len(self.parts), shutil.disk_usage(self.folder).free
            if needed > free:
                fix = "free some, or take less text or fewer layers"
                raise bad_value(OP, f"{_size(needed)} of free disk under {self.folder}", _size(free), fix)
            for part in missing:
                found: dict[str, Tensor] = {}

                def see(layer: int, x: Tensor, y: Tensor, found: dict[str, Tensor] = found) -> None:
                    found[f"{layer}.x"], found[f"{layer}.y"] = x.contiguous(), y.contiguous()

                watch_mlps(self.teacher, self.parts[part], see, self.layers, len(self.parts[part]))
                with atomic(self.path(part), OP) as file:
                    file.write(to_bytes(found))
                show(part + 1, "")

    def read(self, part: int, layer: int) -> tuple[Tensor, Tensor]:
        """x and y (tokens, H) of one layer, mapped into memory."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        if part not in self._read:
            try:
                self._read[part] = load_file(self.path(part))
            except (OSError, SafetensorError) as error:
                self.path(part).unlink(missing_ok=True)
                fix = "run the same command again, it makes the file anew"
                raise bad_value(OP, f"a readable {self.path(part)}", error, fix) from error
        return self._read[part][f"{layer}.x"], self._read[part][f"{layer}.y"]


def warm_up(
    model: Any,
    teacher: TeacherCache,
    settings: WarmupSettings = WarmupSettings(),
    work: Cache | None = None,
    layers: Iterable[int] | None = None,
    show: Show = lambda done, note: None,
) -> dict[int, list[list[float]]]:
    """In place: the factors of each layer, trained alone; returns {layer: [[step, relative error], ...]}.

    Factors in half precision train in float32.

    Args:
        model: from ``convert``. teacher: filled, of the model that it was made from.
        work: where finished layers and checkpoints lie; a run that was killed goes on from there to the same bits.
        layers: some of those with factors, all by default.
    """
    trainable = layers_with_factors(model)
    chosen = trainable if layers is None else sorted(layers)
    unknown = [layer for layer in chosen if layer not in trainable or layer not in teacher.layers]
    if unknown:
        known = [layer for layer in trainable if layer in teacher.layers]
        raise bad_value(OP, f"layers among those with factors and outputs of the original, {known}", unknown)
    teacher.fill()
    with training_in_float32(model):
        return _warm_up(model, teacher, settings, work, chosen, show)


def layers_with_factors(model: Any) -> list[int]:
    """Ascending; a model without any is refused."""
    return sorted({int(name.split(".")[1]) for name in check_factors(OP, model)})


def _warm_up(
    model: Any, teacher: TeacherCache, settings: WarmupSettings, work: Cache | None, layers: list[int], show: Show
) -> dict[int, list[list[float]]]:
    histories = {}
    for place, layer in enumerate(layers):
        mlp = model.model.layers[layer].mlp
        key = stage_key(settings, teacher.key, base_fingerprint(model), _digest(mlp), layer)
        made = None if work is None else work.load(f"warmup.{layer}", key)
        if made is None:

            def note(step: int, error: float, place: int = place, layer: int = layer) -> None:
                show(place * settings.steps + step, f"layer {layer}: {error:.4f}")

            with enough_disk(teacher.folder.parent, OP), keeping(mlp):
                history = train_layer(mlp, layer, teacher, settings, work, key, note)
                made = {"history": history, "factors": mlp.state_dict()}
                if work is not None:
                    work.save(f"warmup.{layer}", key, made)
                    work.remove(f"warmup.{layer}.partial", key)
        mlp.load_state_dict(made["factors"])
        mlp.train(model.training)
        histories[layer] = made["history"]
        show((place + 1) * settings.steps, f"layer {layer}: {made['history'][-1][1]:.4f}")
    return histories


@contextmanager
def keeping(mlp: Any) -> Iterator[None]:
    """Of one layer and a step's tokens what is kept for the backward pass takes little memory and much less time."""
    before, mlp.keep = mlp.keep, True
    try:
        yield
    finally:
        mlp.keep = before


def train_layer(
    mlp: nn.Module,
    layer: int,
    teacher: TeacherCache,
    settings: WarmupSettings,
    work: Cache | None,
    key: str,
    show: Callable[[int, float], None],
) -> list[list[float]]:
    factors = list(mlp.parameters())
    device = factors[0].device
    x, y = (rows.to(device) for rows in teacher.read(len(teacher.parts) - 1, layer))
    size = float(y.float().square().mean())
    optimizer = torch.optim.Adam(factors, lr=settings.learning_rate, betas=(0.9, 0.99), fused=True)
    history: list[list[float]] = []

    def error(ours: Tensor, theirs: Tensor) -> Tensor:
        return F.mse_loss(ours.float(), theirs.float()) / size

    def measure(step: int) -> None:
        with torch.no_grad():
            history.append([step, float(error(mlp.eval()(x), y))])

    steps: Iterable[int] = range(settings.steps)
    if work is not None:
        steps = resumable_steps(work, f"warmup.{layer}", key, mlp, optimizer, settings.steps, history)
    for step in steps:
        if step == 0:
            measure(0)
        x_step, y_step = (rows.to(device) for rows in _draw(teacher, layer, settings, step))
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * 0.5 * (1 + math.cos(math.pi * step / settings.steps))
        error(mlp.train()(x_step), y_step).backward()
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % settings.evaluate_every == 0 or step + 1 == settings.steps:
            measure(step + 1)
        show(step + 1, history[-1][1])
    return history


def _draw(teacher: TeacherCache, layer: int, settings: WarmupSettings, step: int) -> tuple[Tensor, Tensor]:
    """Rows of one file, a function of seed, layer and step alone."""
    generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + layer * 10_007 + step)
    part = int(torch.randint(len(teacher.parts) - 1, (), generator=generator))
    x, y = teacher.read(part, layer)
    rows = torch.randint(len(x), (settings.tokens,), generator=generator)
    return x[rows], y[rows]


def _size(nbytes: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if nbytes >= size:
            return f"{nbytes / size:.2f} {unit}"
    return f"{nbytes} bytes"


def _digest(module: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        digest.update(name.encode() + raw_bytes(tensor))
    return digest.hexdigest()


def record(histories: dict[int, list[list[float]]], settings: WarmupSettings) -> dict[str, Any]:
    return {"settings": asdict(settings), "layers": {str(layer): history for layer, history in histories.items()}}
