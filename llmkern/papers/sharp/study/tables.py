"""Table, sentences and files of the study; the rows that speak against sharing stay in."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmkern.papers.data_selection.files import atomic
from llmkern.papers.data_selection.toy.tables import estimate
from llmkern.papers.sharp.study.settings import BOTH, DIRECT, LONGER, ORIGINAL, ORIGINAL_LONGER

OP = "reproduce sharp"
# rows: {name: {seed: what make_row gave}}
Found = dict[str, Any]
IN = "held-out modules"


def mean_and_half(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half of the 95 % interval; nan for a single seed."""
    if len(values) < 2:
        return values[0], math.nan
    found = estimate(values)
    return found.mean, found.half


def text_of(values: Sequence[float], digits: int = 2) -> str:
    mean, half = mean_and_half(values)
    return f"{mean:.{digits}f}" + ("" if math.isnan(half) else f" ± {half:.{digits}f}")


def perplexities(found: Found, row: str, text: str = IN) -> list[float]:
    return [math.exp(one["losses"][text]) for one in found["rows"][row].values()]


def closed(found: Found, row: str, text: str = IN) -> list[float]:
    """Share of the perplexity that direct sharing adds to the original's and that this row takes away again."""
    seeds = found["rows"][row].keys() & found["rows"][DIRECT].keys() & found["rows"][ORIGINAL].keys()

    def at(name: str, seed: str) -> float:
        return math.exp(found["rows"][name][seed]["losses"][text])

    return [
        (at(DIRECT, s) - at(row, s)) / (at(DIRECT, s) - at(ORIGINAL, s))
        for s in sorted(seeds)
        if at(DIRECT, s) != at(ORIGINAL, s)
    ]


def difference(found: Found, ours: str, other: str) -> list[float]:
    """Nats of one row above another, seed by seed."""
    rows = found["rows"]
    seeds = sorted(rows[ours].keys() & rows[other].keys())
    return [rows[ours][s]["losses"][IN] - rows[other][s]["losses"][IN] for s in seeds]


def relation(found: Found, ours: str, other: str) -> str:
    """Better or worse only where the 95 % interval of the differences leaves out zero."""
    values = difference(found, ours, other)
    mean, half = mean_and_half(values)
    if not math.isnan(half) and abs(mean) <= half:
        return f"cannot be told, over {len(values)} seeds, from"
    return "is better than" if mean < 0 else "is worse than"


def saved(found: Found, row: str, what: str = "mlp_parameters") -> float | None:
    one, original = (next(iter(found["rows"][name].values())) for name in (row, ORIGINAL))
    return 1 - one[what] / original[what] if one[what] else None


def table(found: Found) -> tuple[list[str], list[list[str]]]:
    texts = list(next(iter(found["rows"][ORIGINAL].values()))["losses"])
    header = ["", "seeds", "MLP saved", "bytes", *texts, "nats above", "gap closed"]
    rows = []
    for name, by_seed in found["rows"].items():
        one = next(iter(by_seed.values()))
        share = saved(found, name)
        part = "" if share is None else f"{100 * share:.0f} %"
        cells = [name, str(len(by_seed)), part, f"{one['bytes'] / 1e6:.2f} M"]
        cells += [text_of(perplexities(found, name, text)) for text in texts]
        cells.append("" if name == ORIGINAL else text_of(difference(found, name, ORIGINAL), 3))
        same = DIRECT in found["rows"] and one["groups"] == next(iter(found["rows"][DIRECT].values()))["groups"]
        gap = closed(found, name) if same and name != DIRECT else []
        rows.append([*cells, f"{100 * mean_and_half(gap)[0]:.0f} %" if gap else ""])
    return header, rows


def form_table(found: Found) -> tuple[list[str], list[list[str]]]:
    header = ["form", "parameters of a layer", "relative squared error after SLW"]
    forms: dict[str, Any] = next(iter(found["forms"].values()), {})
    rows = []
    for form in forms:
        errors = [by_form[form]["error"] for by_form in found["forms"].values()]
        rows.append([form, f"{forms[form]['parameters']:.0f}", text_of(errors, 4)])
    return header, rows


def sentences(found: Found) -> list[str]:
    """What the rows say, for sharing and against it."""
    rows, said = found["rows"], []
    plain = mean_and_half(perplexities(found, ORIGINAL))[0]
    count = max(len(by_seed) for by_seed in rows.values())
    said.append(
        f"The original's perplexity is {plain:.2f} on held-out modules, {count} seed{'s' if count > 1 else ''}; "
        f"its last held-out losses: {', '.join(f'{h[-1][2]:.3f}' for h in found['histories'].values())}."
    )
    if DIRECT in rows:
        worse = mean_and_half(perplexities(found, DIRECT))[0] / plain
        said.append(f"Sharing alone multiplies it by {worse:.2f}.")
    for name in ("SVD start", "SLW", "SFT", BOTH, LONGER):
        if name in rows and DIRECT in rows:
            share = mean_and_half(closed(found, name))[0]
            said.append(f"{name} closes {100 * share:.1f} % of that gap, to {text_of(perplexities(found, name))}.")
    compared = (
        (BOTH, "original, SFT of as many factors", "the original with the same fine-tuning"),
        (LONGER, ORIGINAL_LONGER, "the original with the same longer fine-tuning"),
        (BOTH, "smaller model", "a smaller model of equal size and budget"),
        (BOTH, "dropped layers, SFT", "dropping layers at equal size"),
        (BOTH, "SFT", "fine-tuning without warmup"),
        ("2 later layers, direct", "2 earlier layers, direct", "sharing as many earlier layers, untrained"),
        ("2 later layers, SLW + SFT", "2 earlier layers, SLW + SFT", "sharing as many earlier layers, trained"),
        ("int8, SLW + SFT", BOTH, "the same in float32"),
        ("int4, SLW + SFT", BOTH, "the same in float32"),
    )
    for ours, other, words in compared:
        if ours in rows and other in rows:
            a, b = (mean_and_half(perplexities(found, name))[0] for name in (ours, other))
            nats = text_of(difference(found, ours, other), 3)
            said.append(f"{ours} ({a:.2f}) {relation(found, ours, other)} {words} ({b:.2f}), by {nats} nats.")
    for text in list(next(iter(rows[ORIGINAL].values()))["losses"])[1:]:
        if BOTH in rows and DIRECT in rows:
            before, after = (mean_and_half(perplexities(found, name, text))[0] for name in (ORIGINAL, BOTH))
            share = 100 * mean_and_half(closed(found, BOTH, text))[0]
            said.append(f"On {text}: {before:.2f} before, {after:.2f} after {BOTH}, {share:.1f} % of the gap closed.")
    if found["forms"]:
        by_seed = found["forms"].values()
        errors = {form: mean_and_half([one[form]["error"] for one in by_seed])[0] for form in next(iter(by_seed))}
        best = min(errors, key=lambda form: errors[form])
        said.append(
            f"Of the forms at equal count {best} leaves least after SLW, {errors[best]:.4f} of the squared output; "
            f"additive {errors['additive']:.4f}."
        )
    return said


# Files ----------------------------------------------------------------------------------------------------------------


def write(folder: Path, found: Found) -> list[Path]:
    text = io.StringIO()
    writer = csv.writer(text)
    texts = list(next(iter(found["rows"][ORIGINAL].values()))["losses"])
    writer.writerow(["row", "seed", "parameters", "mlp_parameters", "bytes", *(f"nats {name}" for name in texts)])
    for name, by_seed in found["rows"].items():
        for seed, one in by_seed.items():
            sizes = [one["parameters"], one["mlp_parameters"], one["bytes"]]
            writer.writerow([name, seed, *sizes, *(f"{one['losses'][t]:.5f}" for t in texts)])
    picture = io.BytesIO()
    plot(picture, found)
    stored = json.dumps({**found, "findings": sentences(found)}, indent=1)
    files = {"sharp.csv": text.getvalue().encode(), "sharp.json": stored.encode(), "sharp.png": picture.getvalue()}
    for name, content in files.items():
        with atomic(folder / name, OP) as file:
            file.write(content)
    return [folder / name for name in files]


def plot(target: Any, found: Found) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 4, figsize=(19, 4.4), layout="constrained")
    draw_sizes(axes[0], found)
    draw_heat_map(axes[1], next(iter(found["distances"].values())))
    for seed, history in found["histories"].items():
        axes[2].plot([h[0] for h in history], [h[2] for h in history], ".-", label=f"base, seed {seed}")
    axes[2].set(xlabel="step", ylabel="held-out nats per token", title="Training of the base models")
    for name in (BOTH, "SFT", "dropped layers, SFT"):
        for one in list(found["rows"].get(name, {}).values())[:1]:
            axes[3].plot([h[0] for h in one["tuning"]], [h[2] for h in one["tuning"]], ".-", label=name)
    axes[3].set(xlabel="step", ylabel="held-out nats per token", title="Fine-tuning")
    for axis in (axes[2], axes[3]):
        axis.legend(fontsize=8)
    figure.savefig(target, format="png", dpi=120)
    plt.close(figure)


def draw_sizes(axis: Any, found: Found) -> None:
    """Perplexity against stored bytes, a point a row."""
    for i, name in enumerate(found["rows"]):
        mean, half = mean_and_half(perplexities(found, name))
        size = next(iter(found["rows"][name].values()))["bytes"] / 1e6
        error = None if math.isnan(half) else half
        axis.errorbar(size, mean, error, fmt="osv^D"[i % 5], color=f"C{i % 10}", markersize=5, label=name)
    axis.set(xlabel="stored MB", ylabel="perplexity, held-out modules", yscale="log", title="Perplexity against size")
    axis.legend(fontsize=5.5)


def draw_heat_map(axis: Any, distances: Sequence[Sequence[float]]) -> None:
    shown = axis.imshow([[min(v, 10.0) for v in row] for row in distances], cmap="viridis")
    axis.set(xlabel="in the place of layer", ylabel="MLP of layer", title="Relative error of an exchange")
    axis.grid(False)
    axis.figure.colorbar(shown, ax=axis, shrink=0.8)
