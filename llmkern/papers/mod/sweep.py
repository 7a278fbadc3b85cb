"""``llmkern mod sweep``: what the weights of the mixture do to the text that it writes.

For each point of a grid over the simplex the mixture continues every prompt, and every model then reads the result.
Means are over generated tokens, in nats:

    logprob_i   log pi_i(token | text so far)
    kl_i        sum_v mix(v) log(mix(v) / pi_i(v)) of the next-token distributions along the text

with mix as ``llmkern.mix_logits`` gives it, before temperature and filters.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmkern._library import bad_value
from llmkern.ops.mix_logits import mix_logits
from llmkern.papers.mod.command import encode, load_mixture, read_prompts, sampling_options

_OP = "mod sweep"


def sweep(arguments: argparse.Namespace) -> None:
    """Compute the points that sweep.csv lacks, then show all: table, sweep.csv, sweep.png."""
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        from llmkern.papers.mod.report import plot, print_table
    except ModuleNotFoundError as error:
        raise ImportError(
            f"{_OP}: expected {error.name} to be installed, got none; pip install 'llmkern[demo]'"
        ) from None

    prompts = read_prompts(_OP, "--prompts", arguments.prompts)
    mixture = load_mixture(arguments)
    encoded = encode(_OP, mixture, prompts, arguments.max_new_tokens)
    settings = _settings(arguments, prompts)
    points = [*simplex(len(arguments.model), arguments.grid), *(tuple(w) for w in arguments.weights)]
    points = list(dict.fromkeys(points))
    try:
        arguments.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise bad_value(_OP, "--out to be a folder that can be made", f"{arguments.out}: {error.strerror}") from error
    path = arguments.out / "sweep.csv"
    columns = _columns(len(arguments.model), arguments.reference is not None)
    rows = read_rows(path, columns, settings)

    open_points = [point for point in points if _key(point) not in rows]
    progress = Progress(
        TextColumn("weights {task.fields[weights]}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )
    batches = [
        range(i, min(i + arguments.batch_size, len(prompts))) for i in range(0, len(prompts), arguments.batch_size)
    ]
    with progress:
        task = progress.add_task("", total=len(open_points) * len(batches), weights="")
        for point in open_points:
            progress.update(task, weights=",".join(_key(point)))
            measured = _Means()
            for batch in batches:
                measured.add(_continue(mixture, point, [encoded[i] for i in batch], batch, arguments))
                progress.advance(task)
            row = dict(zip(columns, _key(point))) | measured.row(arguments.samples) | {"settings": settings}
            rows[_key(point)] = {name: row[name] for name in columns}
            write_rows(path, columns, rows)

    shown = [rows[_key(point)] for point in points]
    print_table(shown, len(arguments.model), arguments.reference is not None)
    plot(arguments.out / "sweep.png", shown, len(arguments.model))
    print(f"{path}: {len(open_points)} of {len(points)} points computed now; plot in {arguments.out / 'sweep.png'}")


def simplex(models: int, steps: int) -> Iterator[tuple[float, ...]]:
    """Weights k / steps that sum to one, the first model's falling."""
    for bars in itertools.combinations(range(steps + models - 1), models - 1):
        edges = [-1, *bars, steps + models - 1]
        yield tuple((right - left - 1) / steps for left, right in itertools.pairwise(edges))[::-1]


# Measurement ----------------------------------------------------------------------------------------------------------


class _Means:
    """Sums over tokens of every quantity, and the texts."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = {}
        self.tokens = 0
        self.texts: list[str] = []

    def add(self, part: tuple[dict[str, float], int, list[str]]) -> None:
        sums, tokens, texts = part
        self.sums = {name: self.sums.get(name, 0.0) + value for name, value in sums.items()}
        self.tokens += tokens
        self.texts += texts

    def row(self, samples: int) -> dict[str, str]:
        means = {name: f"{value / self.tokens:.6g}" for name, value in self.sums.items()}
        return means | {"tokens": str(self.tokens), "samples": json.dumps(self.texts[:samples], ensure_ascii=False)}


@torch.no_grad()
def _continue(
    mixture: Any, weights: tuple[float, ...], prompts: list[list[int]], numbers: range, arguments: argparse.Namespace
) -> tuple[dict[str, float], int, list[str]]:
    """Continue a batch of prompts; sums over its generated tokens, their count, and the texts."""
    width, device = max(map(len, prompts)), mixture.device
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    options = sampling_options(arguments)
    if arguments.temperature > 0:
        # A seed for each prompt, the same at every weight: points differ by their weights, not by their luck.
        options["seed"] = [arguments.seed + number for number in numbers]
    out = mixture.generate(ids, attention_mask=mask, weights=weights, **options)
    new = out[:, width:]
    generated = _until_end(new, mixture.generation_config.eos_token_id)
    sums = _read(mixture, weights, out, torch.cat([mask, generated.long()], -1), generated)
    texts = [mixture.tokenizer.decode(row[keep], skip_special_tokens=True) for row, keep in zip(new, generated)]
    return sums, int(generated.sum()), texts


def _until_end(tokens: Tensor, ends: int | list[int] | None) -> Tensor:
    """Mask of the tokens up to the first end-of-text, that one included; padding comes after it."""
    if ends is None:
        return torch.ones_like(tokens, dtype=torch.bool)
    is_end = torch.isin(tokens, torch.tensor(ends, device=tokens.device)).long()
    return is_end.cumsum(-1) - is_end == 0


def _read(mixture: Any, weights: tuple[float, ...], ids: Tensor, mask: Tensor, generated: Tensor) -> dict[str, float]:
    """Sums over the generated tokens of log-probabilities and divergences."""
    rows, steps = generated.shape
    policies, reference = mixture.policy_logits(ids, mask, logits_to_keep=steps + 1)
    everything = [*policies, *([] if reference is None else [reference])]
    log_probs = [logits[:, :-1].double().log_softmax(-1) for logits in everything]
    tokens = ids[:, -steps:].unsqueeze(-1)
    chosen = [row.gather(-1, tokens).squeeze(-1).where(generated, 0.0) for row in log_probs]
    carry = None
    if mixture.prefix:
        count = len(policies)
        gained = torch.stack(chosen[:count], -1)
        if reference is not None and mixture.runs_reference(weights):
            gained = gained - chosen[count].unsqueeze(-1)
        gained = gained.where(gained.new_tensor(weights) != 0, 0.0)
        carry = (gained.cumsum(1) - gained).flatten(0, 1)
    mix = mix_logits(
        [row.flatten(0, 1) for row in log_probs[: len(policies)]],
        list(weights),
        reference=None if reference is None else log_probs[-1].flatten(0, 1),
        carry=carry,
        **mixture.mix_options,
    )
    # With Z = 0 the mix is a score; what is drawn from is its softmax.
    mix = mix.log_softmax(-1).unflatten(0, (rows, steps))
    names = [*(str(i + 1) for i in range(len(policies))), *([] if reference is None else ["reference"])]
    sums = {"logprob_mix": float(mix.gather(-1, tokens).squeeze(-1).where(generated, 0.0).sum())}
    for name, row, picked in zip(names, log_probs, chosen):
        sums[f"logprob_{name}"] = float(picked.sum())
        terms = torch.where(mix == -torch.inf, torch.zeros_like(mix), mix.exp() * (mix - row))
        # Never below zero but by rounding.
        sums[f"kl_{name}"] = float(terms.sum(-1).clamp(min=0).where(generated, 0.0).sum())
    return sums


# sweep.csv ------------------------------------------------------------------------------------------------------------


def _columns(models: int, reference: bool) -> list[str]:
    names = [*(str(i + 1) for i in range(models)), *(["reference"] if reference else [])]
    return [
        *(f"weight_{i + 1}" for i in range(models)),
        "logprob_mix",
        *(f"logprob_{name}" for name in names),
        *(f"kl_{name}" for name in names),
        "tokens",
        "samples",
        "settings",
    ]


def _key(weights: tuple[float, ...]) -> tuple[str, ...]:
    return tuple(f"{weight:.6g}" for weight in weights)


def _settings(arguments: argparse.Namespace, prompts: list[str]) -> str:
    """Hash of all that a row depends on but its weights."""
    files = [
        [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in sorted(Path(path).glob("*.safetensors"))]
        for path in [*arguments.model, *([arguments.reference] if arguments.reference else [])]
    ]
    names = [
        "divergence",
        "alpha",
        "normalizer",
        "prefix",
        "max_new_tokens",
        "temperature",
        "top_k",
        "top_p",
        "min_p",
        "seed",
        "samples",
    ]
    text = json.dumps([files, prompts, [getattr(arguments, name) for name in names]])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def read_rows(path: Path, columns: list[str], settings: str) -> dict[tuple[str, ...], dict[str, str]]:
    """Finished rows by weights; refused where the file is of another sweep or none."""
    if not path.exists():
        return {}
    fix = "choose another --out, or remove the file"
    expected = f"{path} to be a sweep of the same models, prompts and options"
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            rows = list(reader)
            found = list(reader.fieldnames or [])
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise bad_value(_OP, expected, f"a file that cannot be read ({error})", fix) from error
    if found != columns:
        raise bad_value(_OP, expected, f"columns {','.join(found)[:80]}", fix)
    if any(row["settings"] != settings for row in rows):
        raise bad_value(_OP, expected, "rows of others", fix)
    weights = [name for name in columns if name.startswith("weight_")]
    return {tuple(row[name] for name in weights): row for row in rows}


def write_rows(path: Path, columns: list[str], rows: dict[tuple[str, ...], dict[str, str]]) -> None:
    """All rows, put in place at once: an interruption leaves the old file or the new one."""
    part = path.with_suffix(".csv.part")
    with part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows.values())
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
