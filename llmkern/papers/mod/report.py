"""Table and plot of a sweep over mixing weights."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text


def print_table(rows: list[dict[str, str]], models: int, reference: bool) -> None:
    """Weights, log-probabilities and divergences per token, then the start of the first text at each point."""
    numbers = [str(i + 1) for i in range(models)]
    names = [*numbers, *(["reference"] if reference else [])]
    shown = {f"weight_{n}": f"w{n}" for n in numbers}
    shown |= {f"logprob_{n}": f"log p{n[:3]}" for n in names}
    shown |= {f"kl_{n}": f"KL {n[:3]}" for n in names}
    console = Console()
    console.print("Nats per generated token: log-probability under each model, and KL(mix || model)", soft_wrap=True)
    table = Table(box=box.SIMPLE)
    for title in shown.values():
        table.add_column(title, justify="right", no_wrap=True, min_width=6)
    for row in rows:
        table.add_row(*(f"{float(row[column]):.3f}" for column in shown))
    # Numbers cut short would be wrong ones; a narrow terminal breaks the lines instead.
    console.print(table, width=max(console.width, 12 * len(shown)), soft_wrap=True)
    for row in rows:
        texts = json.loads(row["samples"])
        if texts:
            weights = ",".join(row[f"weight_{n}"] for n in numbers)
            line = Text(f"{weights}: {' '.join(texts[0].split())}", no_wrap=True, overflow="ellipsis")
            console.print(line)


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
