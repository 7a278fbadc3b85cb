"""Table and plot of a sweep over mixing weights."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from rich.console import Console
from rich.table import Table
from rich.text import Text


def print_table(rows: list[dict[str, str]], models: int, reference: bool) -> None:
    """Weights, log-probabilities and divergences per token, and the start of the first sample."""
    names = [*(str(i + 1) for i in range(models)), *(["reference"] if reference else [])]
    table = Table(title="nats per generated token")
    columns = [
        *(f"weight_{i + 1}" for i in range(models)),
        *(f"logprob_{n}" for n in names),
        *(f"kl_{n}" for n in names),
    ]
    for column in columns:
        table.add_column(column.replace("_", " "), justify="right")
    table.add_column("sample", no_wrap=True, max_width=40)
    for row in rows:
        texts = json.loads(row["samples"])
        sample = " ".join(texts[0].split()) if texts else ""
        table.add_row(*(f"{float(row[column]):.3f}" for column in columns), Text(sample))
    Console().print(table)


def plot(path: Path, rows: list[dict[str, str]], models: int) -> None:
    """Left: log-probability under each model against the first weight. Right: the frontier between the first two."""
    values = {name: [float(row[name]) for row in rows] for name in rows[0] if name.startswith(("weight_", "logprob_"))}
    order = sorted(range(len(rows)), key=lambda i: values["weight_1"][i])
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    for model in range(1, models + 1):
        # For more than two models one first weight has many points, which no line should join.
        style = "o-" if models == 2 else "o"
        left.plot(
            [values["weight_1"][i] for i in order],
            [values[f"logprob_{model}"][i] for i in order],
            style,
            label=f"model {model}",
        )
    left.set(xlabel="weight of model 1", ylabel="log-probability per token (nats)", title="Under each model")
    left.legend()
    second = "2" if models > 1 else "1"
    points = right.scatter(values["logprob_1"], values[f"logprob_{second}"], c=values["weight_1"], cmap="viridis")
    right.set(xlabel="under model 1", ylabel=f"under model {second}", title="Log-probability per token (nats)")
    figure.colorbar(points, ax=right, label="weight of model 1")
    figure.savefig(path, dpi=120)
    plt.close(figure)
