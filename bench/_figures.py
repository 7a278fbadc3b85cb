"""The table of measured figures in README.md, made from bench/results.csv and nothing else.

``python bench/_figures.py`` rewrites the block between the two markers; a test holds that the block is up to date.
"""

from __future__ import annotations

import csv
from pathlib import Path

HERE = Path(__file__).resolve().parent
RESULTS, README = HERE / "results.csv", HERE.parent / "README.md"
BEGIN, END = "<!-- figures from bench/results.csv -->", "<!-- end of figures -->"

Row = dict[str, str]


def latest(path: Path = RESULTS) -> dict[tuple[str, ...], dict[str, Row]]:
    """(op, case, mode, dtype, device) -> provider -> its last row; ours on the best module of the machine."""
    cases: dict[tuple[str, ...], dict[str, Row]] = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            key = tuple(row[name] for name in ("op", "case", "mode", "dtype", "device"))
            cases.setdefault(key, {})[row["provider"]] = row
    return cases


def table(path: Path = RESULTS) -> list[str]:
    lines = [
        "| op, case | device | llmkern | times the floor | peers, times as long | scratch |",
        "|---|---|---|---|---|---|",
    ]
    for (op, case, mode, dtype, device), rows in sorted(latest(path).items()):
        ours = rows["llmkern"]
        peers = ", ".join(f"{peer} {ratio(rows[peer], ours)}" for peer in rows if peer != "llmkern")
        name = f"`{op}` {case}, {dtype}" + ("" if mode == "forward" else f", {mode}")
        scratch = f"{int(ours['beyond_outputs']) / 2**20:.1f} MiB"
        time = f"{float(ours['median']) * 1e3:.3g} ms"
        where = f"{device}, {ours['implementation'].removeprefix('C++ ')}"
        lines.append(f"| {name} | {where} | {time} | {float(ours['ratio_to_floor']):.2f} | {peers} | {scratch} |")
    return lines


def ratio(peer: Row, ours: Row) -> str:
    value = float(peer["median"]) / float(ours["median"])
    return f"{value:.2f}x" if value < 1.5 else f"{value:.1f}x" if value < 100 else f"{value:.0f}x"


def with_figures(text: str, path: Path = RESULTS) -> str:
    before, _, rest = text.partition(BEGIN)
    after = rest.partition(END)[2]
    return before + BEGIN + "\n" + "\n".join(table(path)) + "\n" + END + after


if __name__ == "__main__":
    README.write_text(with_figures(README.read_text()))
