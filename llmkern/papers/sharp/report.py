"""The page of ``llmkern sharp``: table, heat map of layers, curves, perplexity against stored parameters."""

from __future__ import annotations

import html
import json
from pathlib import Path
from typing import Any

from llmkern.demo.report import COLORS, STYLE, figure_svg, html_table, new_axes
from llmkern.papers.data_selection.files import atomic
from llmkern.papers.sharp.command import RECORDS
from llmkern.papers.sharp.evaluate import perplexity


def write(folder: Path, evaluated: dict[str, Any] | None) -> Path:
    """report.html from the records of a model's folder, or from those of all models of an evaluation."""
    if evaluated is None:
        records = {path.stem: json.loads(path.read_text()) for path in sorted((folder / RECORDS).glob("*.json"))}
        body = record_sections(records)
    else:
        body = _eval_section(evaluated)
        for entry in evaluated["models"]:
            if entry["records"]:
                body += f"<h2>{html.escape(Path(entry['folder']).name)}</h2>{record_sections(entry['records'])}"
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>llmkern sharp</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head><body><main>'
        f"<h1>Layers that share an MLP</h1>{body}</main></body></html>\n"
    )
    path = folder / "report.html"
    with atomic(path, "sharp") as file:
        file.write(page.encode())
    return path


def eval_table(found: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    texts = list(found["models"][0]["losses"])
    rows = []
    for entry in found["models"]:
        cells = [Path(entry["folder"]).name, f"{entry['parameters']:,}"]
        rows.append([*cells, *(f"{perplexity(entry['losses'][name]):.3f}" for name in texts)])
    return ["model", "parameters", *(f"perplexity, {name}" for name in texts)], rows


def _eval_section(found: dict[str, Any]) -> str:
    header, rows = eval_table(found)
    figure, (axes,) = new_axes(1, width=8, height=3.8)
    for place, name in enumerate(found["models"][0]["losses"]):
        color = list(COLORS.values())[place % len(COLORS)]
        for i, entry in enumerate(found["models"]):
            label = name if i == 0 else None
            point = (entry["parameters"] / 1e6, perplexity(entry["losses"][name]))
            axes.plot(*point, "o" if entry["shared"] else "s", color=color, label=label)
            axes.annotate(Path(entry["folder"]).name, point, (5, 4), textcoords="offset points", fontsize=8)
    axes.set(xlabel="stored parameters, millions", ylabel="perplexity", yscale="log")
    axes.margins(0.2)
    axes.legend()
    samples = "".join(
        f"<h3>{html.escape(prompt)}</h3>"
        + "".join(
            f"<h4>{html.escape(Path(entry['folder']).name)}</h4><pre><span class=given>{html.escape(prompt)}</span>"
            f"{html.escape(entry['samples'][i])}</pre>"
            for entry in found["models"]
        )
        for i, prompt in enumerate(found["prompts"])
    )
    cells = [[html.escape(cell) for cell in row] for row in rows]
    picture = f"<figure>{figure_svg(figure, 'sizes')}<figcaption>Squares: not shared.</figcaption></figure>"
    return f"<h2>Perplexity</h2>{html_table([html.escape(h) for h in header], cells)}{picture}{samples}"


def record_sections(records: dict[str, Any]) -> str:
    """Conversion, warmup and fine-tuning, each where it has been done."""
    body = ""
    if "convert" in records:
        found = records["convert"]
        rows = [
            [name.replace("_", " "), f"{before:,}", f"{after:,}", f"{100 * (1 - after / before):.1f} %"]
            for name, (before, after) in ((n, found[n]) for n in ("parameters", "mlp_parameters"))
        ]
        body += f"<h3>Conversion</h3><p>Groups of layers that share: {html.escape(found['groups'])}.</p>"
        body += html_table(["", "before", "after", "saved"], rows)
        if found.get("distances"):
            body += (
                f"<figure>{heat_map_svg(found['distances'])}<figcaption>What the MLP of one layer gives in the place "
            )
            body += "of another: squared error over the square of what belongs there.</figcaption></figure>"
    if "warmup" in records:
        layers = records["warmup"]["layers"]
        figure, (axes,) = new_axes(1, width=8, height=3.2)
        for layer, history in layers.items():
            axes.plot([h[0] for h in history], [h[1] for h in history], ".-", label=f"layer {layer}")
        axes.set(xlabel="step", ylabel="relative squared error", yscale="log")
        axes.legend(fontsize=8)
        rows = [[f"layer {i}", f"{h[0][1]:.4f}", f"{h[-1][1]:.4f}"] for i, h in layers.items()]
        body += f"<h3>Warmup</h3>{html_table(['', 'before', 'after'], rows)}"
        body += f"<figure>{figure_svg(figure, 'warmup')}</figure>"
    if "finetune" in records:
        history = records["finetune"]["history"]
        figure, (axes,) = new_axes(1, width=8, height=3.2)
        axes.plot([h[0] for h in history], [h[1] for h in history], color=COLORS["grey"], label="training")
        axes.plot([h[0] for h in history], [h[2] for h in history], "o-", color=COLORS["blue"], label="held out")
        axes.set(xlabel="step", ylabel="nats per token")
        axes.legend()
        body += f"<h3>Fine-tuning</h3><figure>{figure_svg(figure, 'finetune')}</figure>"
    return body


def heat_map_svg(distances: list[list[float]]) -> str:
    figure, (axes,) = new_axes(1, width=5.6, height=4.4)
    shown = axes.imshow([[min(value, 10.0) for value in row] for row in distances], cmap="viridis")
    axes.set(xlabel="in the place of layer", ylabel="MLP of layer")
    axes.grid(False)
    figure.colorbar(shown, ax=axes)
    return figure_svg(figure, "distances")
