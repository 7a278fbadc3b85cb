"""The page: one HTML file with its pictures inside, nothing loaded from anywhere."""

from __future__ import annotations

import html
import io
import os
import platform
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure

from llmkern import __version__, _library
from llmkern.demo.base import Context

COLORS = {"blue": "#2563a8", "orange": "#c8611a", "green": "#3a7d44", "grey": "#6b7280", "purple": "#7a4ea3"}

matplotlib.rcParams.update(
    {
        "font.size": 11.5,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titleweight": "bold",
        "axes.titlesize": 12,
        "axes.grid": True,
        "grid.color": "#e5e7eb",
        "axes.axisbelow": True,
        "legend.frameon": False,
    }
)

STYLE = """
:root { --ink: #1d2330; --soft: #5b6472; --line: #d9dde4; --paper: #ffffff; --wash: #f5f6f8; --accent: #2563a8; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); line-height: 1.55;
  font: 17px/1.55 Charter, "Bitstream Charter", "Source Serif 4", Georgia, "DejaVu Serif", serif; }
main { max-width: 58rem; margin: 0 auto; padding: 3rem 1.5rem 5rem; }
h1 { font-size: 2rem; line-height: 1.2; margin: 0 0 .4rem; }
h2 { font-size: 1.5rem; margin: 3.2rem 0 .6rem; padding-top: 1.2rem; border-top: 2px solid var(--ink); }
h3 { font-size: 1.12rem; margin: 2.2rem 0 .4rem; }
p, li { max-width: 44rem; }
.lead, figcaption, .note { color: var(--soft); }
figure { margin: 1.4rem 0; }
figure svg { width: 100%; height: auto; display: block; }
figcaption { font-size: .92rem; max-width: 44rem; margin-top: .4rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font: 14px/1.45 system-ui, "DejaVu Sans", sans-serif;
  font-variant-numeric: tabular-nums; }
th, td { padding: .34rem .7rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th { font-weight: 600; vertical-align: bottom; border-bottom: 2px solid var(--ink); }
th:first-child, td:first-child { text-align: left; }
tr.rule td { border-top: 2px solid var(--line); }
pre { background: var(--wash); border: 1px solid var(--line); border-radius: 6px; padding: .8rem 1rem;
  margin: .5rem 0 1rem; overflow-x: auto; font: 13px/1.45 ui-monospace, "DejaVu Sans Mono", monospace;
  white-space: pre-wrap; }
pre .given { color: #8a92a0; }
code { font: .88em ui-monospace, "DejaVu Sans Mono", monospace; }
.samples { display: grid; grid-template-columns: repeat(auto-fit, minmax(24rem, 1fr)); gap: 0 1.4rem; }
.samples h4 { margin: .6rem 0 0; font: 600 14px system-ui, "DejaVu Sans", sans-serif; }
"""


@dataclass
class Section:
    """One operation: what it shows, in sentences for the terminal, and its part of the page."""

    title: str
    sentences: list[str]
    body: str


def figure_svg(figure: Figure, name: str) -> str:
    """The figure as an <svg> element to stand in HTML: no XML head, no metadata, ids of its own."""
    buffer = io.StringIO()
    with plt.rc_context({"svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    plt.close(figure)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    # HTML knows the namespaces of svg by itself.
    return re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", text)


def new_axes(columns: int, width: float = 11.0, height: float = 4.2) -> tuple[Figure, list[plt.Axes]]:
    figure, axes = plt.subplots(1, columns, figsize=(width, height), layout="constrained", squeeze=False)
    return figure, list(axes[0])


def html_table(header: Sequence[str], rows: Sequence[Sequence[str]], ruled: Sequence[int] = ()) -> str:
    """Cells are HTML already; a line is drawn above the rows whose numbers are in ``ruled``."""
    head = "".join(f"<th>{cell}</th>" for cell in header)
    body = "".join(
        f"<tr{' class=rule' if i in ruled else ''}>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>"
        for i, row in enumerate(rows)
    )
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def write(folder: Path, context: Context, sections: Sequence[Section], fast: bool) -> Path:
    body = "".join(f"<section><h2>{html.escape(section.title)}</h2>{section.body}</section>" for section in sections)
    miniature = "<p><strong>A miniature made with --fast: its numbers mean nothing.</strong></p>" if fast else ""
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>llmkern demo</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head><body><main>'
        "<h1>llmkern on real text</h1>"
        '<p class="lead">Operations of the library at work on a small language model, trained here on the source of '
        "Python's standard library. Written by <code>llmkern demo</code>.</p>"
        f"{miniature}{_base_section(context)}{body}"
        "</main></body></html>\n"
    )
    path = folder / "index.html"
    scratch = folder / "index.html.new"
    scratch.write_text(page, encoding="utf-8")
    os.replace(scratch, path)
    return path


def _base_section(context: Context) -> str:
    facts, build, sizes = context.corpus.summary, _library.cpu_build, context.settings.base
    figure, (axes,) = new_axes(1, width=8, height=3.2)
    steps, train, held_out = zip(*context.loss_curve)
    axes.plot(steps, train, color=COLORS["grey"], label="training batch")
    axes.plot(steps, held_out, "o-", color=COLORS["blue"], label="held-out modules", markersize=4)
    axes.set(xlabel="step", ylabel="nats per token", title="Loss of the base model")
    axes.legend()
    bits = held_out[-1] / 0.6931 * facts["held_out_tokens"] / facts["held_out_bytes"]
    kernels = f"compiled for {build.isa}" if build.isa else "none compiled; every op runs on its torch reference"
    rows = [
        ("llmkern", f"{__version__}; kernels: {kernels} ({html.escape(build.reason)})"),
        ("Python, torch", f"{platform.python_version()}, {torch.__version__}, {torch.get_num_threads()} threads"),
        (
            "text",
            f"{facts['modules']} modules of the standard library, {facts['bytes'] / 1e6:.1f} MB, "
            f"{facts['tokens'] / 1e6:.2f} M tokens; {facts['held_out_modules']} whole modules held out",
        ),
        (
            "base model",
            f"Llama, {sum(p.numel() for p in context.model.parameters()) / 1e6:.2f} M parameters: "
            f"{sizes.layers} layers, width {sizes.hidden}, "
            f"byte-level BPE of {context.corpus.tokenizer.get_vocab_size()} tokens; "
            f"{sizes.steps} steps of {sizes.batch} &times; {sizes.context} tokens",
        ),
        ("held-out loss", f"{held_out[-1]:.3f} nats per token, {bits:.2f} bits per byte"),
    ]
    lines = "".join(
        f'<tr><td>{name}</td><td style="text-align:left;white-space:normal">{text}</td></tr>' for name, text in rows
    )
    return f"<h3>What ran</h3><table>{lines}</table><figure>{figure_svg(figure, 'base')}</figure>"
