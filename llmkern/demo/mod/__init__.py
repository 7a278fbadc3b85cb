"""Section of the demo: multi-objective decoding (arXiv 2406.18853) of two policies tuned from one base model."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text

from llmkern.demo.base import Context
from llmkern.demo.mod import page
from llmkern.demo.mod.evaluate import BASE, Row, evaluate_all, logit_averaging_difference
from llmkern.demo.mod.findings import findings
from llmkern.demo.mod.policies import load_policies
from llmkern.demo.mod.samples import draw_samples
from llmkern.demo.mod.speed import measure_speed
from llmkern.demo.report import Section

TITLE = "Multi-objective decoding: mixing the logits of two policies"


def run(context: Context) -> Section:
    policies, scale, key = load_policies(context)
    rows = evaluate_all(context, policies, scale, key)
    averaging = logit_averaging_difference(context, policies)
    samples = draw_samples(context, policies)
    speed = measure_speed(context, policies)
    sentences = findings(context, rows, averaging, speed)
    histories = page.histories(context, key)
    body = page.body(context, rows, scale, samples, speed, sentences, histories)
    return Section(TITLE, _table(rows), sentences, body)


def _table(rows: list[Row]) -> Table:
    table = Table(title="mean ± half of the 95 % interval over decoding seeds; weights: comments, calls")
    table.add_column("method")
    for name in ("weights", "comments", "calls", "KL to base", "J"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        weights = "" if row.method == BASE else f"{row.weights[0]:g}, {row.weights[1]:g}"
        table.add_row(Text(row.method), weights, *page.cells(row))
    return table


__all__ = ["TITLE", "run"]
