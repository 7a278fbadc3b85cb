"""Tables, sentences, csv and plot of the experiment; what loses stays in."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from llmkern.papers.data_selection.files import atomic
from llmkern.papers.data_selection.toy.arms import ARMS, FIRST, SECOND
from llmkern.papers.data_selection.toy.hubness import STRENGTHS, HubRow

Found = dict[str, list[dict[str, Any]]]
BASE = "CLIPScore"
SHOWN = ("accuracy", "first ten", "reciprocal rank")
# Numbers cut short would be wrong ones: a narrow terminal breaks the lines instead.
WIDTH = 116


class Estimate(NamedTuple):
    """Mean and half of the 95 % interval (Student's t)."""

    mean: float
    half: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} ± {self.half:.3f}"


def estimate(values: Sequence[float]) -> Estimate:
    from scipy.stats import t

    x = np.asarray(values, float)
    return Estimate(float(x.mean()), float(t.ppf(0.975, len(x) - 1) * x.std(ddof=1) / np.sqrt(len(x))))


def metric(found: list[dict[str, Any]], arm: str, name: str) -> list[float]:
    return [seed["arms"][arm][name] for seed in found]


def paired(found: list[dict[str, Any]], arm: str, other: str, name: str) -> Estimate:
    return estimate([a - b for a, b in zip(metric(found, arm, name), metric(found, other, name))])


def print_all(found: Found, hubs: list[HubRow], metrics: dict[str, str]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, width=max(Console().width, WIDTH))
    for corpus, seeds in found.items():
        table = Table(
            box=SIMPLE_HEAD, pad_edge=False, title=f"{corpus}: {len(seeds)} seeds, mean ± half of the 95 % interval"
        )
        table.add_column("kept for the student", no_wrap=True)
        for name in (metrics[corpus], f"less {BASE}", "less random", "clean", "off-target"):
            table.add_column(name, justify="right", no_wrap=True)
        for arm in ARMS:
            table.add_row(arm, *cells(seeds, arm, metrics[corpus]))
        console.print(table, soft_wrap=True)
        areas = {name: estimate([seed["auc"][name]["matched"] for seed in seeds]) for name in seeds[0]["auc"]}
        clean = {name: estimate([seed["auc"][name]["clean"] for seed in seeds]) for name in seeds[0]["auc"]}
        console.print("AUC of matched pairs against the rest: " + "; ".join(f"{n} {e}" for n, e in areas.items()))
        console.print(
            "AUC of clean pairs on target against the rest: " + "; ".join(f"{n} {e}" for n, e in clean.items())
        )
    table = Table(box=SIMPLE_HEAD, pad_edge=False, title="hubness: AUC, and precision of the top 30 %")
    for name in (
        "strength",
        "AUC CLIPScore",
        "AUC negCLIPLoss",
        "difference",
        "precision CLIPScore",
        "precision negCLIPLoss",
    ):
        table.add_column(name, justify="right")
    for strength in STRENGTHS:
        table.add_row(f"{strength:g}", *hub_cells(hubs, strength))
    console.print(table, soft_wrap=True)


def cells(seeds: list[dict[str, Any]], arm: str, name: str) -> list[str]:
    kinds = [float(np.mean([seed["arms"][arm]["kinds"][k] for seed in seeds])) for k in ("clean", "off-target")]
    differences = ["" if arm == other else str(paired(seeds, arm, other, name)) for other in (BASE, "random")]
    return [str(estimate(metric(seeds, arm, name))), *differences, *(f"{share:.2f}" for share in kinds)]


def hub_values(hubs: list[HubRow], strength: float, score: str, field: str) -> list[float]:
    return [getattr(row, field) for row in hubs if (row.strength, row.score) == (strength, score)]


def hub_cells(hubs: list[HubRow], strength: float) -> list[str]:
    clip, neg = (hub_values(hubs, strength, score, "auc") for score in ("CLIPScore", "negCLIPLoss"))
    precision = [estimate(hub_values(hubs, strength, s, "precision")) for s in ("CLIPScore", "negCLIPLoss")]
    return [
        str(estimate(clip)),
        str(estimate(neg)),
        str(estimate([b - a for a, b in zip(clip, neg)])),
        *map(str, precision),
    ]


def sentences(found: Found, hubs: list[HubRow], metrics: dict[str, str]) -> list[str]:
    """What the tables show, for the methods and against them."""
    out = []
    for corpus, seeds in found.items():
        for other in (BASE, "random", "none"):
            differences = {
                arm: paired(seeds, arm, other, metrics[corpus]) for arm in ARMS if arm not in (other, "oracle")
            }
            ahead = [arm for arm, d in differences.items() if d.mean - d.half > 0]
            behind = [arm for arm, d in differences.items() if d.mean + d.half < 0]
            out.append(
                f"{corpus}, {metrics[corpus]}: ahead of {other} beyond the interval: {'; '.join(ahead) or 'no arm'}. "
                f"Behind it: {'; '.join(behind) or 'no arm'}."
            )
    zero, top = (
        estimate([b - a for a, b in zip(*(hub_values(hubs, s, n, "auc") for n in ("CLIPScore", "negCLIPLoss")))])
        for s in (STRENGTHS[0], STRENGTHS[-1])
    )
    out.append(
        f"Hubness: without it negCLIPLoss gains {zero} of AUC on the CLIP score, at strength {STRENGTHS[-1]:g} {top}."
    )
    out.append(
        f"Every arm but none keeps {SECOND:.0%} of the pool (of two scores the first keeps {FIRST:.0%}), and every "
        "student takes the same number of steps. Nothing here is a result on DataComp."
    )
    return out


def write_csv(path: Path, found: Found) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        ["corpus", "seed", "arm", "accuracy", "first ten", "reciprocal rank", "rows", "clean", "off-target"]
    )
    for corpus, seeds in found.items():
        for seed in seeds:
            for arm, row in seed["arms"].items():
                numbers = [f"{row[name]:.6f}" for name in SHOWN]
                shares = [f"{row['kinds'][name]:.6f}" for name in ("clean", "off-target")]
                writer.writerow([corpus, seed["seed"], arm, *numbers, row["rows"], *shares])
    with atomic(path) as file:
        file.write(text.getvalue().encode())


def write_plot(path: Path, found: Found, hubs: list[HubRow], metrics: dict[str, str]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure = draw(found, hubs, metrics)
    with atomic(path) as file:
        figure.savefig(file, format="png", dpi=120)
    plt.close(figure)


def draw(found: Found, hubs: list[HubRow], metrics: dict[str, str]) -> Any:
    """A panel a corpus with a point a seed, and one for the hubness."""
    import matplotlib.pyplot as plt

    panels = len(found) + bool(hubs)
    figure, axes = plt.subplots(1, panels, figsize=(4.6 * panels, 3.9), layout="constrained", squeeze=False)
    for axis, (corpus, seeds) in zip(axes[0], found.items()):
        for place, arm in enumerate(reversed(ARMS)):
            values = metric(seeds, arm, metrics[corpus])
            axis.plot(values, [place] * len(values), "o", color="#2563a8", alpha=0.45, markersize=4)
            axis.plot(np.mean(values), place, "|", color="#c8611a", markersize=14, markeredgewidth=2)
        axis.set_yticks(range(len(ARMS)), list(reversed(ARMS)) if axis is axes[0][0] else [""] * len(ARMS), fontsize=9)
        axis.set(xlabel=metrics[corpus], title=corpus)
        axis.grid(axis="x", color="#e5e7eb")
    if hubs:
        for score, color in (("CLIPScore", "#6b7280"), ("negCLIPLoss", "#2563a8")):
            means = [estimate(hub_values(hubs, s, score, "auc")) for s in STRENGTHS]
            axes[0][-1].errorbar(
                STRENGTHS, [m.mean for m in means], [m.half for m in means], color=color, label=score, capsize=3
            )
        axes[0][-1].set(xlabel="strength of the hub", ylabel="AUC of matched pairs", title="hubness")
        axes[0][-1].legend(frameon=False)
    return figure
