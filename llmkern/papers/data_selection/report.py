"""``llmkern select report``: one HTML file about the scores of a store and about subsets of it, nothing loaded."""

from __future__ import annotations

import html
import io
import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from llmkern import __version__
from llmkern.papers.data_selection.files import atomic
from llmkern.papers.data_selection.filter import Scores, load_scores
from llmkern.papers.data_selection.metadata import captions
from llmkern.papers.data_selection.rank import ranks
from llmkern.papers.data_selection.store import Store
from llmkern.papers.data_selection.uids import contains, hex_uids

# A plot or a rank of more samples than these shows no more; a fixed stride takes them.
SHOWN = 200_000
MONTAGE = 6
NAMES = {
    "clip": "CLIP score",
    "neg_clip": "negCLIPLoss",
    "vas": "VAS",
    "norm_sim": "NormSim",
    "stored_clip": "stored CLIP score",
}
CAPTIONS = {
    "histograms": "Each score over all samples that have one (grey), and over each subset; every curve has area one.",
    "pairs": "Density of samples; the number is the rank correlation (Spearman).",
    "convergence": "Share of the top {top:.0%} by negCLIPLoss that fewer random divisions find, too.",
    "overlap": "Share of the row's subset that lies in the column's.",
}
RC: Any = {"axes.spines.top": False, "axes.spines.right": False, "svg.fonttype": "path", "font.size": 11}

STYLE = """
body { margin: 0; color: #1d2330; font: 17px/1.55 Charter, "Source Serif 4", Georgia, "DejaVu Serif", serif; }
main { max-width: 60rem; margin: 0 auto; padding: 2.5rem 1.5rem 4rem; }
h1 { font-size: 1.9rem; margin: 0 0 .4rem; } h2 { font-size: 1.35rem; margin: 2.6rem 0 .6rem; }
p, li, figcaption { max-width: 46rem; } figcaption, .note { color: #5b6472; font-size: .93rem; }
figure { margin: 1.2rem 0; } figure svg { width: 100%; height: auto; }
table { border-collapse: collapse; font: 14px/1.45 system-ui, "DejaVu Sans", sans-serif;
  font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .7rem; text-align: right; border-bottom: 1px solid #d9dde4; }
th:first-child, td:first-child, td.text { text-align: left; }
.wide { overflow-x: auto; } code { font: .86em ui-monospace, "DejaVu Sans Mono", monospace; }
"""


def write_report(store: Store, subsets: dict[str, np.ndarray], out: Path) -> Path:
    """Write ``out/index.html``; ``subsets`` are (N, 2) uids by name."""
    manifest, scores = store.manifest(), load_scores(store)
    fine = np.flatnonzero(scores.flags == 0)
    kept = {name: contains(uids, scores.uids[fine]) for name, uids in subsets.items()}
    values = {n: v[fine] for n, v in scores.values.items() if n in NAMES and np.isfinite(v[fine]).any()}
    parts = [_facts(manifest), _sizes(subsets, kept, len(scores.flags))]
    with plt.rc_context(RC):
        parts.append(_section("Scores before and after", _histograms(values, kept), CAPTIONS["histograms"]))
        if len(values) > 1:
            parts.append(_section("Scores against each other", _pairs(values), CAPTIONS["pairs"]))
        if len(manifest["convergence"]) > 1:
            caption = CAPTIONS["convergence"].format(top=manifest["convergence"][0]["top"])
            parts.append(_section("Convergence in K", _convergence(manifest["convergence"]), caption))
        if len(kept) > 1:
            parts.append(_section("Overlap of subsets", _overlap(kept), CAPTIONS["overlap"]))
    parts.append(_montage(store, scores, values, fine))
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>llmkern select</title>'
        f"<style>{STYLE}</style></head><body><main><h1>Data selection</h1>{''.join(parts)}</main></body></html>\n"
    )
    with atomic(out / "index.html", "select report") as file:
        file.write(page.encode())
    return out / "index.html"


def _section(title: str, figure: Figure, caption: str) -> str:
    buffer = io.StringIO()
    with plt.rc_context({"svg.hashsalt": title}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    plt.close(figure)
    svg = re.sub(r"<metadata>.*?</metadata>", "", buffer.getvalue()[buffer.getvalue().index("<svg") :], flags=re.DOTALL)
    # HTML knows the namespaces of svg by itself, and a page that names none cannot be said to load one.
    svg = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", svg)
    return f"<h2>{html.escape(title)}</h2><figure>{svg}<figcaption>{html.escape(caption)}</figcaption></figure>"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>'


def _facts(manifest: dict[str, Any]) -> str:
    counts, options = manifest["counts"], manifest["options"]
    rows = [(name.replace("_", " "), f"{counts[name]:,}") for name in sorted(counts)]
    bad = "".join(f"<li>{html.escape(shard['bad'])}</li>" for shard in manifest["bad_shards"])
    setting = ", ".join(f"{key} {value}" for key, value in options.items())
    return (
        f"<p>{counts['rows']:,} rows in {counts['shards']} shards of "
        f"<code>{html.escape(manifest['pool']['folder'])}</code>; "
        f"{manifest['kept']:,} of them have scores.</p><p class=note>llmkern {__version__}; {html.escape(setting)}; "
        f"configuration {manifest['config']}</p>{_table(('count', ''), rows)}"
        + (f"<h2>Bad shards</h2><ul>{bad}</ul>" if bad else "")
    )


def _sizes(subsets: dict[str, np.ndarray], kept: dict[str, np.ndarray], total: int) -> str:
    if not subsets:
        return ""
    rows = [
        (html.escape(n), f"{len(u):,}", f"{int(kept[n].sum()):,}", f"{kept[n].sum() / max(1, total):.1%}")
        for n, u in subsets.items()
    ]
    return "<h2>Subsets</h2>" + _table(("subset", "uids", "of this pool", "share of the pool"), rows)


def _some(count: int) -> slice:
    return slice(0, None, max(1, count // SHOWN))


def _histograms(values: dict[str, np.ndarray], kept: dict[str, np.ndarray]) -> Figure:
    columns = min(2, len(values))
    lines = -(-len(values) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(11, 3.3 * lines), layout="constrained", squeeze=False)
    for axis in axes.flat[len(values) :]:
        axis.set_axis_off()
    for axis, (name, found) in zip(axes.flat, values.items()):
        low, high = np.nanquantile(found, (0.001, 0.999))
        edges = np.linspace(float(low), float(high), 80)
        axis.hist(found, edges, density=True, color="#c9ced6", label="pool")
        for i, (subset, inside) in enumerate(kept.items()):
            if inside.any():
                axis.hist(found[inside], edges, density=True, histtype="step", lw=1.8, color=f"C{i}", label=subset)
        axis.set(title=NAMES[name], yticks=[])
    axes[0][0].legend(frameon=False, fontsize=10)
    return figure


def _pairs(values: dict[str, np.ndarray]) -> Figure:
    pairs = list(itertools.combinations(values, 2))
    columns = min(3, len(pairs))
    lines = -(-len(pairs) // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(3.7 * columns, 3.5 * lines), layout="constrained", squeeze=False
    )
    for axis in axes.flat[len(pairs) :]:
        axis.set_axis_off()
    for axis, (a, b) in zip(axes.flat, pairs):
        x, y = values[a][_some(len(values[a]))], values[b][_some(len(values[b]))]
        live = np.isfinite(x) & np.isfinite(y)
        x, y = x[live], y[live]
        axis.hexbin(x, y, gridsize=45, bins="log", cmap="Blues", mincnt=1, linewidths=0.1)
        correlation = np.corrcoef(ranks(x), ranks(y))[0, 1] if len(x) > 1 else np.nan
        axis.set(xlabel=NAMES[a], ylabel=NAMES[b], title=f"{correlation:.3f}")
    return figure


def _convergence(found: list[dict[str, float]]) -> Figure:
    figure, axis = plt.subplots(figsize=(7, 3.2), layout="constrained")
    axis.plot([row["partitions"] for row in found], [row["overlap"] for row in found], "o-")
    axis.set(xlabel="random divisions K", ylabel="overlap with all of them")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def _overlap(kept: dict[str, np.ndarray]) -> Figure:
    names = list(kept)
    share = np.array([[(kept[a] & kept[b]).sum() / max(1, kept[a].sum()) for b in names] for a in names])
    size = 1.6 + 0.9 * len(names)
    figure, axis = plt.subplots(figsize=(size + 1.5, size), layout="constrained")
    axis.imshow(share, cmap="Blues", vmin=0, vmax=1)
    for (i, j), value in np.ndenumerate(share):
        axis.text(j, i, f"{value:.2f}", ha="center", va="center", color="white" if value > 0.6 else "black")
    axis.set_xticks(range(len(names)), names, rotation=30, ha="right")
    axis.set_yticks(range(len(names)), names)
    axis.spines[:].set_visible(False)
    return figure


# Montage --------------------------------------------------------------------------------------------------------------


def _montage(store: Store, scores: Scores, values: dict[str, np.ndarray], fine: np.ndarray) -> str:
    """Captions of the best and the worst by each score, and of those on which two scores disagree most."""
    picked: dict[str, np.ndarray] = {}
    for name, found in values.items():
        order = np.argsort(np.nan_to_num(found, nan=-np.inf), kind="stable")
        order = order[np.isfinite(found[order])]
        picked[f"Best by {NAMES[name]}"] = order[::-1][:MONTAGE]
        picked[f"Worst by {NAMES[name]}"] = order[:MONTAGE]
    if {"clip", "neg_clip"} <= set(values):
        gap = ranks(values["clip"]) - ranks(values["neg_clip"])
        order = np.argsort(gap, kind="stable")
        picked["Most disputed: negCLIPLoss ranks them far higher than the CLIP score"] = order[:MONTAGE]
        picked["Most disputed: the CLIP score ranks them far higher than negCLIPLoss"] = order[::-1][:MONTAGE]
    wanted = np.unique(np.concatenate([fine[p] for p in picked.values()] or [fine[:0]]))
    texts = dict(zip(wanted.tolist(), captions(store, wanted)))
    shown = [name for name in ("clip", "neg_clip", "vas", "norm_sim") if name in values]
    body = []
    for title, places in picked.items():
        rows = []
        for place in places:
            text, url = texts[int(fine[place])]
            words = html.escape(text[:160]) or "<i>no caption</i>"
            link = f'<br><span class="note">{html.escape(url[:120])}</span>' if url else ""
            uid = hex_uids(scores.uids[fine[place]][None])[0]
            numbers = [f"{values[name][place]:.4f}" for name in shown]
            rows.append((f"<code>{uid[:12]}</code>", *numbers, f'<div style="text-align:left">{words}{link}</div>'))
        body.append(f"<h3>{html.escape(title)}</h3>" + _table(("uid", *(NAMES[n] for n in shown), "caption"), rows))
    return "<h2>Samples</h2>" + "".join(body)
