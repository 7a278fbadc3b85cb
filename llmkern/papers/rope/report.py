"""Tables, sentences, rope.csv, rope.json and rope.png of ``llmkern rope``."""

from __future__ import annotations

import csv
import io
import json
import math
import os
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from llmkern.papers.rope.measure import fitted_exponent

Results = dict[str, Any]


def speedup(results: Results, row: dict[str, Any], place: int) -> float | None:
    """torch's seconds over llmkern's at one length; None where the plan is exact and was not timed."""
    seconds = row["timings"][place]["seconds"]
    return None if seconds is None else results["sdpa"][place]["seconds"] / seconds


def final_loss(row: dict[str, Any]) -> float:
    return float(row["history"][-1][2])


def print_tables(console: Console, results: Results) -> None:
    console.print(
        f"\nHeads of {results['head_dim']}, causal, rtol {results['rtol']:g}. Loss: nats per token of held-out text; "
        f"s: scores; row err: of max|v - o|; logit err: in standard deviations of the logits; Δ loss: with llmkern",
        soft_wrap=True,
    )
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    names = (
        "B",
        "loss",
        "max |s|",
        "rms s",
        "degree",
        "features",
        "row err",
        "logit err",
        "Δ loss",
    )
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    for row in results["rows"]:
        q = row["quality"]
        shown = [row["bound"], f"{final_loss(row):.3f}", f"{q['largest_score']:.2f}", f"{q['spread']:.2f}"]
        if q["degree"]:
            shown += [str(q["degree"]), str(q["features"]), f"{q['row_error']:.1e}"]
            shown += [f"{q['logit_error'] / q['logit_scale']:.1e}", f"{q['loss_change']:+.1e}"]
        else:
            shown += ["exact", "", "", "", ""]
        table.add_row(*shown)
    console.print(table, soft_wrap=True)
    console.print(
        "Seconds of torch, one head, forward and backward; times as fast is llmkern, planning included, of degree g"
    )
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("tokens", justify="right", no_wrap=True)
    table.add_column("torch", justify="right", no_wrap=True)
    for row in results["rows"]:
        table.add_column(f"B = {row['bound']}", justify="right", no_wrap=True)
    for place, torchs in enumerate(results["sdpa"]):
        cells = [str(torchs["length"]), f"{torchs['seconds']:.3g}"]
        for row in results["rows"]:
            timing = row["timings"][place]
            ratio = speedup(results, row, place)
            how = f"g={timing['degree']}" if timing["method"] == "polynomial" else "exact"
            cells.append(how if ratio is None else f"{ratio:.1f}x {how}")
        table.add_row(*cells)
    console.print(table, soft_wrap=True)


def findings(results: Results) -> list[str]:
    """What the numbers say, for the bound and against it."""
    rows, last = results["rows"], len(results["sdpa"]) - 1
    free = next((row for row in rows if row["bound"] == "none"), None)
    sentences = []
    if free is not None:
        costs = [f"B = {row['bound']} {final_loss(row) - final_loss(free):+.3f}" for row in rows if row is not free]
        sentences.append(
            f"Held-out loss against no bound ({final_loss(free):.3f} nats per token), one training run each: "
            f"{', '.join(costs)}."
        )
    length = results["sdpa"][last]["length"] if last >= 0 else 0
    for row in rows:
        timing = row["timings"][last]
        if timing["method"] == "polynomial":
            known = [t for t in row["timings"] if t["method"] == "polynomial"]
            grows = fitted_exponent([t["length"] for t in known], [t["seconds"] for t in known])
            exponent = "" if math.isnan(grows) else f" Its time grows as n^{grows:.2f}."
            sentences.append(
                f"B = {row['bound']}: {speedup(results, row, last):.1f} times as fast as torch at {length} tokens, "
                f"with degree {timing['degree']}.{exponent}"
            )
        else:
            sentences.append(f"B = {row['bound']}: exact at {length} tokens, since {timing['reason']}.")
    known = results["sdpa"]
    grows = fitted_exponent([t["length"] for t in known], [t["seconds"] for t in known])
    if not math.isnan(grows):
        sentences.append(f"torch's time grows as n^{grows:.2f}.")
    kept = [row for row in rows if row["quality"]["degree"]]
    if kept:
        worst = max(kept, key=lambda row: row["quality"]["row_error"])
        sentences.append(
            f"The largest error of a row is {worst['quality']['row_error']:.1e} of max|v - o|, at "
            f"B = {worst['bound']}; certified is {results['rtol']:g}."
        )
    twin = next((row for row in rows if row["bound"] == results["loop"]["bound"]), None)
    if twin is not None:
        apart = max(abs(a[2] - b[2]) for a, b in zip(twin["history"], results["loop"]["history"]))
        sentences.append(
            f"Trained with llmkern forward and backward, B = {twin['bound']}, same seed: held-out loss "
            f"{final_loss(results['loop']):.3f} against {final_loss(twin):.3f} of exact training; along the curve they "
            f"are {apart:.3f} apart at most."
        )
    return sentences


# Files ----------------------------------------------------------------------------------------------------------------


def write(folder: Path, results: Results, sentences: list[str]) -> list[Path]:
    """Each file whole or not at all."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["bound", "tokens", "method", "degree", "seconds", "torch_seconds", "loss", "row_error"])
    for row in results["rows"]:
        for timing, torchs in zip(row["timings"], results["sdpa"]):
            seconds = "" if timing["seconds"] is None else f"{timing['seconds']:.6g}"
            values = [row["bound"], timing["length"], timing["method"], timing["degree"], seconds]
            writer.writerow(
                [*values, f"{torchs['seconds']:.6g}", f"{final_loss(row):.5f}", f"{row['quality']['row_error']:.3g}"]
            )
    picture = io.BytesIO()
    plot(picture, results)
    stored = json.dumps({**results, "findings": sentences}, indent=1)
    files = {"rope.csv": text.getvalue().encode(), "rope.json": stored.encode(), "rope.png": picture.getvalue()}
    for name, content in files.items():
        scratch = folder / f"{name}.new"
        scratch.write_bytes(content)
        os.replace(scratch, folder / name)
    return [folder / name for name in files]


def plot(target: Any, results: Results) -> None:
    """Frontier of loss and speed, time against length, and the two loss curves."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(14, 4.2), layout="constrained")
    draw(axes, results)
    figure.savefig(target, format="png", dpi=130)
    plt.close(figure)


def draw(axes: Any, results: Results) -> None:
    left, middle, right = axes
    draw_frontier(left, results)
    draw_times(middle, results)
    for row in results["rows"]:
        if row["bound"] == results["loop"]["bound"]:
            steps, _, losses = zip(*row["history"])
            right.plot(steps, losses, "-", lw=4, alpha=0.35, label=f"exact, B = {row['bound']}")
    steps, _, losses = zip(*results["loop"]["history"])
    right.plot(steps, losses, "--", label=f"llmkern, B = {results['loop']['bound']}")
    right.set(xlabel="step", ylabel="held-out nats per token", title="Trained with llmkern in the loop")
    right.legend()


def draw_frontier(axis: Any, results: Results) -> None:
    last = len(results["sdpa"]) - 1
    for row in results["rows"]:
        ratio = speedup(results, row, last) if row["timings"][last]["method"] == "polynomial" else 1.0
        axis.plot(ratio, final_loss(row), "o")
        axis.annotate(f"B = {row['bound']}", (ratio, final_loss(row)), (6, 4), textcoords="offset points")
    axis.set(
        xscale="log",
        xlabel=f"times as fast as torch, {results['sdpa'][last]['length']} tokens",
        ylabel="held-out nats per token",
        title="Frontier (lower right is better)",
    )
    axis.margins(0.15)


def draw_times(axis: Any, results: Results) -> None:
    axis.plot(*_points(results["sdpa"]), "k.-", label="torch, exact")
    for row in results["rows"]:
        known = [t for t in row["timings"] if t["method"] == "polynomial"]
        if known:
            axis.plot(*_points(known), ".-", label=f"B = {row['bound']}, degree {known[-1]['degree']}")
    axis.set(
        xscale="log", yscale="log", xlabel="tokens", ylabel="seconds, forward and backward", title="Time of one head"
    )
    axis.legend()


def _points(timings: list[dict[str, Any]]) -> tuple[list[int], list[float]]:
    return [t["length"] for t in timings], [t["seconds"] for t in timings]
