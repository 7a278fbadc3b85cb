"""Section of the demo: multi-objective decoding (arXiv 2406.18853) of two policies tuned from one base model."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from llmkern.demo.base import Context
from llmkern.demo.mod import page
from llmkern.demo.mod.evaluate import BASE, Row, evaluate_all, logit_averaging_difference, weights_text
from llmkern.demo.mod.findings import findings
from llmkern.demo.mod.policies import load_policies
from llmkern.demo.mod.samples import draw_samples
from llmkern.demo.mod.speed import measure_speed
from llmkern.demo.report import Section

TITLE = "Multi-objective decoding: mixing the logits of two policies"


def run(context: Context) -> Section:
    policies, scale, key = load_policies(context)
    rows = evaluate_all(context, policies, scale, key)
    context.console.print(_table(rows))
    averaging = logit_averaging_difference(context, policies)
    samples = draw_samples(context, policies)
    speed = measure_speed(context, policies)
    sentences = findings(context, rows, averaging, speed)
    histories = page.histories(context, key)
    body = page.body(context, rows, scale, samples, speed, sentences, histories)
    return Section(TITLE, sentences, body)


def _table(rows: list[Row]) -> Table:
    table = Table(
        box=SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
        title="mean ± half of the 95 % interval over decoding seeds",
    )
    table.add_column("method", no_wrap=True)
    for name in ("weights", "comments", "calls", "KL to base", "J"):
        table.add_column(name, justify="right", no_wrap=True)
    for before, row in zip([None, *rows], rows):
        weights = "" if row.method == BASE else weights_text(row.weights)
        name = "" if before is not None and before.method == row.method else row.method
        table.add_row(Text(name), weights, *(cell.replace(" ± ", "±") for cell in page.cells(row)))
    return table


__all__ = ["TITLE", "run"]
