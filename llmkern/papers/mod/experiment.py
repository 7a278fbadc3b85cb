"""``llmkern reproduce mod``: the toy of ``llmkern.papers.mod.toy`` as a table, sentences, and files on request."""

from __future__ import annotations

import argparse
import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from llmkern._library import bad_value
from llmkern.papers.mod.toy import METHODS, WEIGHTS, Row, Size, Toy

COMMAND = "reproduce mod"


@dataclass(frozen=True)
class Regime:
    """A size of the toy and a beta, with the words for it."""

    words: str
    size: Size
    beta: float


def regimes(size: Size) -> list[Regime]:
    """Mild and strong tilt, and a network on which merging has an easy life."""
    easy = replace(size, hidden=(max(size.hidden) * 3 // 2,), learning_rate=size.learning_rate / 2)
    return [
        Regime("mild tilt, beta = 1", size, 1.0),
        Regime("mild tilt, beta = 1, one hidden layer, smaller steps", easy, 1.0),
        Regime("strong tilt, beta = 0.3", size, 0.3),
        Regime("strong tilt, beta = 0.1", size, 0.1),
    ]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seeds", type=int, default=2, metavar="N", help="corpora, networks and rewards (default 2)")
    parser.add_argument("--steps", type=int, default=300, metavar="N", help="training steps per network (default 300)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write toy.csv and toy.png there")


def run(arguments: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.progress import Progress

    for name in ("seeds", "steps"):
        if getattr(arguments, name) < 1:
            raise bad_value(COMMAND, f"--{name} of at least 1", getattr(arguments, name))
    if arguments.out is not None:
        _make_folder(arguments.out)
    size = replace(Size(), reference_steps=arguments.steps, policy_steps=arguments.steps)
    console = Console(highlight=False)
    found: dict[str, list[Row]] = {}
    chosen = regimes(size)
    # The matrices are small: more threads than one only wait for each other.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with Progress(console=console) as progress:
            task = progress.add_task("training policies, scoring every sequence", total=len(chosen) * arguments.seeds)
            for regime in chosen:
                found[regime.words] = []
                for seed in range(arguments.seeds):
                    found[regime.words] += Toy(regime.size, seed).rows(regime.beta)
                    progress.advance(task)
    finally:
        torch.set_num_threads(threads)
    sequences = size.vocabulary**size.length
    console.print(f"{sequences} sequences of {size.length} tokens out of {size.vocabulary}, every value exact")
    for words, rows in found.items():
        _print_table(console, words, rows)
    console.print()
    for sentence in conclusions(found):
        console.print(f"- {sentence}", soft_wrap=True, markup=False)
    if arguments.out is not None:
        _write_csv(arguments.out / "toy.csv", found)
        _plot(arguments.out / "toy.png", found)
        console.print(f"written: {arguments.out / 'toy.csv'}, {arguments.out / 'toy.png'}", soft_wrap=True)
    return 0


def conclusions(found: dict[str, list[Row]]) -> list[str]:
    """What the tables show, for MOD and against it, counted from them."""
    sentences = []
    for words, rows in found.items():
        ahead, cells = _count(rows, "MOD, tokens", "merge", "objective")
        reward, _ = _count(rows, "MOD, tokens", "merge", "reward")
        sentences.append(
            f"{words}: on J, MOD token by token is ahead of merging in {ahead} of {cells} cells; on raw reward in "
            f"{reward}. Mean gap to the optimum in J: MOD over sequences {_gap(rows, 'MOD, sequences'):.3f}, MOD over "
            f"tokens {_gap(rows, 'MOD, tokens'):.3f}, merging {_gap(rows, 'merge'):.3f}, retraining "
            f"{_gap(rows, 'retrain'):.3f}."
        )
    everything = [row for rows in found.values() for row in rows]
    beaten, cells = _count(everything, "merge", "merge, symmetry", "objective")
    sentences.append(
        "Permuting and sign-flipping hidden units of the policies changes none of their outputs, and so not MOD; "
        f"merging loses by it in {beaten} of {cells} cells (mean J {_mean(everything, 'merge'):.2f} to "
        f"{_mean(everything, 'merge, symmetry'):.2f})."
    )
    sentences.append(
        "Against MOD: only the mix of whole sequences is the theory's, and what can be decoded is the mix of tokens; "
        "where policies are tilted strongly and trained briefly, their errors far from the reference are multiplied, "
        "so that even the mix of sequences misses the optimum and retraining for the weights is better; and merging, "
        "which costs one model at decoding where MOD costs several, draws level where the policies stay near to each "
        "other in parameters."
    )
    sentences.append("Raw reward favours whoever drifts further from the reference: compare J, or reward at equal KL.")
    return sentences


def _count(rows: Sequence[Row], method: str, other: str, field: str) -> tuple[int, int]:
    """Cells where the method is ahead of the other, and all cells; both list their cells in the same order."""
    ours, theirs = ([getattr(row.outcome, field) for row in rows if row.method == name] for name in (method, other))
    return sum(a > b for a, b in zip(ours, theirs)), len(ours)


def _gap(rows: Sequence[Row], method: str) -> float:
    return _mean(rows, "optimum") - _mean(rows, method)


def _mean(rows: Sequence[Row], method: str) -> float:
    values = [row.outcome.objective for row in rows if row.method == method and row.outcome is not None]
    return _average(values)


def _average(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


# Table and files ------------------------------------------------------------------------------------------------------


def _weights_text(weights: Sequence[float]) -> str:
    return ", ".join(f"{w:.2g}".replace("0.", ".") for w in weights)


def _print_table(console: Any, words: str, rows: Sequence[Row]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    seeds = len({row.seed for row in rows})
    table = Table(box=SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    table.add_column("method", no_wrap=True)
    for weights in WEIGHTS:
        table.add_column(_weights_text(weights), justify="right", no_wrap=True)
    for method in METHODS:
        cells, details = [], []
        for weights in WEIGHTS:
            outcomes = [row.outcome for row in rows if row.method == method and row.weights == weights]
            known = [outcome for outcome in outcomes if outcome is not None]
            objective, reward, kl = (_average([o[i] for o in known]) for i in range(3))
            each = "/".join(f"{o.objective:.2f}" for o in known)
            cells.append((each if seeds <= 2 else f"{objective:.2f}") if known else "")
            details.append(f"{reward:.2f}, {kl:.2f}" if known else "")
        table.add_row(method, *cells)
        table.add_row("", *details, style="dim")
    console.print(f"\n{words}", style="bold")
    each = "for each seed" if seeds <= 2 else "mean over seeds"
    console.print(f"J = E[R_w] - beta KL, {each}; below it E[R_w] and KL, mean over seeds; weights in columns")
    console.print(table)


def _write_csv(path: Path, found: dict[str, list[Row]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["regime", "seed", "beta", "weights", "method", "J", "reward", "kl"])
        for words, rows in found.items():
            for row in rows:
                values = ["", "", ""] if row.outcome is None else [f"{value:.6f}" for value in row.outcome]
                writer.writerow([words, row.seed, row.beta, _weights_text(row.weights), row.method, *values])


def _plot(path: Path, found: dict[str, list[Row]]) -> None:
    """What each method leaves of the optimum's J, a panel a regime and a point a seed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = [method for method in METHODS if method not in ("optimum", "merge, symmetry")]
    figure, axes = plt.subplots(1, len(found), figsize=(4.2 * len(found), 4), layout="constrained", squeeze=False)
    for axis, (words, rows) in zip(axes[0], found.items()):
        best = {(row.seed, row.weights): row.outcome for row in rows if row.method == "optimum"}
        for i, method in enumerate(shown):
            for place, weights in enumerate(WEIGHTS):
                values = []
                for row in rows:
                    top = best[row.seed, row.weights]
                    if (row.method, row.weights) == (method, weights) and row.outcome is not None and top is not None:
                        values.append(row.outcome.objective - top.objective)
                label = method if place == 0 else None
                axis.plot([place + (i - 2) * 0.14] * len(values), values, "o", color=f"C{i}", markersize=4, label=label)
        axis.set_xticks(range(len(WEIGHTS)), [_weights_text(weights) for weights in WEIGHTS], fontsize=9)
        axis.set_title(words.replace("beta = 1, ", "beta = 1,\n"), fontsize=10)
        axis.grid(axis="y", color="#e5e7eb")
    axes[0][0].set_ylabel("J less J of the optimum")
    axes[0][0].legend(fontsize=9)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise bad_value(COMMAND, "--out as a folder that can be written", f"{folder} ({error.strerror})") from None
