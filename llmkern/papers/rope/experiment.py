"""``llmkern reproduce rope``: what the papers claim of almost linear attention, on Gaussian data, measured.

Time against length, error and certificate against degree and bound, the bound beyond which the polynomial no longer
pays (that there is one is the papers' lower bound), the error of gradients, and the general case (``general.py``).
"""

from __future__ import annotations

import argparse
import csv
import io
import math
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from llmkern._library import bad_value

COMMAND = "reproduce rope"
BOUNDS = (0.5, 1.0, 2.0, 4.0)
DEGREES = (2, 3, 4, 5, 6)
RTOLS = (1e-1, 1e-2, 1e-3)
ROWS, DIM = 1024, 16
TIME_DIM, TIME_BOUND, TIME_RTOL = 16, 1.0, 1e-2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--longest", type=int, default=32768, metavar="N", help="tokens of the longest timing")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write rope.csv and rope.png there")


def run(arguments: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.progress import Progress

    if arguments.longest < 512:
        raise bad_value(COMMAND, "--longest of at least 512", arguments.longest)
    if arguments.out is not None:
        try:
            arguments.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            got = f"{arguments.out} ({error.strerror})"
            raise bad_value(COMMAND, "--out as a folder that can be written", got) from None
    console = Console(highlight=False)
    with Progress(console=console) as progress:
        task = progress.add_task("measuring", total=None)
        found = measure(arguments.longest, lambda text: progress.update(task, description=text))
        progress.update(task, total=1, completed=1)
    for title, header, rows in tables(found):
        _print_table(console, title, header, rows)
    for sentence in conclusions(found):
        console.print(f"- {sentence}", soft_wrap=True, markup=False)
    if arguments.out is not None:
        for path in write(arguments.out, found):
            console.print(f"written: {path}", soft_wrap=True)
    return 0


def measure(longest: int, show: Callable[[str], object], rows: int = ROWS, dim: int = DIM) -> dict[str, Any]:
    """Plain values of the five parts."""
    from llmkern.papers.rope import measure as timing
    from llmkern.papers.rope.general import measure_general
    from llmkern.papers.rope.synthetic import degree_row, gaussian_heads, gradient_row, largest_fast_bound

    lengths = [n for n in (512 * 2**i for i in range(16)) if n <= longest]
    found: dict[str, Any] = {"times": [], "degrees": [], "thresholds": [], "gradients": [], "dim": dim}
    for bound in BOUNDS:
        for degree in DEGREES:
            show(f"error: B = {bound:g}, degree {degree}")
            found["degrees"].append(asdict(degree_row(rows, dim, bound, degree)))
    for causal in (False, True):
        for rtol in RTOLS:
            show(f"gradients: rtol {rtol:g}")
            row = gradient_row(rows, dim, TIME_BOUND, rtol, causal)
            if row is not None:
                found["gradients"].append({"causal": causal, **asdict(row)})
    for n in lengths:
        show(f"threshold: {n} tokens")
        found["thresholds"].append({"length": n, "bound": largest_fast_bound(n, TIME_DIM, TIME_RTOL, True)})
    for n in lengths[len(lengths) // 3 :]:
        show(f"time: {n} tokens")
        heads = gaussian_heads(n, TIME_DIM, TIME_BOUND)
        ours, torchs = timing.time_llmkern(heads, TIME_RTOL), timing.time_sdpa(heads)
        found["times"].append({"length": n, "llmkern": ours.seconds, "torch": torchs.seconds, "method": ours.method})
    show("a W that does not factorise")
    found["general"] = measure_general(lengths[len(lengths) // 3 :])
    return found


def exponents(found: dict[str, Any]) -> tuple[float, float]:
    """Of n in the time of the polynomial and of torch."""
    from llmkern.papers.rope.measure import fitted_exponent

    known = [row for row in found["times"] if row["method"] == "polynomial"]
    lengths = [row["length"] for row in known]
    return tuple(fitted_exponent(lengths, [row[name] for row in known]) for name in ("llmkern", "torch"))  # type: ignore[return-value]


def conclusions(found: dict[str, Any]) -> list[str]:
    """What the tables show, for the papers' claims and against them, computed from the tables."""
    from llmkern.papers.rope import general

    sentences = []
    ours, torchs = exponents(found)
    known = [row for row in found["times"] if row["method"] == "polynomial"]
    if not math.isnan(ours):
        last = known[-1]
        sentences.append(
            f"Time, forward and backward, d = {TIME_DIM}, B = {TIME_BOUND:g}, rtol {TIME_RTOL:g}, causal: n^{ours:.2f} "
            f"against n^{torchs:.2f} of exact attention; {last['torch'] / last['llmkern']:.1f} times as fast at "
            f"{last['length']} tokens."
        )
    rows = found["degrees"]
    broken = [row for row in rows if row["error"] > row["moment"] * (1 + 1e-9) + 1e-12]
    slack = sorted(row["error"] / row["moment"] for row in rows if math.isfinite(row["moment"]) and row["moment"] > 0)
    sentences.append(
        f"The moment certificate holds in {len(rows) - len(broken)} of {len(rows)} cells; the error is "
        f"{slack[len(slack) // 2]:.2f} of it in the median."
    )
    gains = [row["uniform"] / row["moment"] for row in rows if math.isfinite(row["moment"]) and row["moment"] > 0]
    ahead = sum(gain > 1 for gain in gains)
    sentences.append(
        f"It is below the uniform certificate in {ahead} of {len(gains)} cells: the papers' bound on all scores wastes "
        "degree, since scores are far smaller than their bound."
    )
    for rtol in (1e-2, 1e-3):
        need = []
        for bound in BOUNDS:
            fits = [row for row in rows if row["bound"] == bound and row["moment"] <= rtol]
            best = min(fits, key=lambda row: row["degree"], default=None)
            need.append(
                f"B = {bound:g} " + (f"degree {best['degree']}, {best['features']} features" if best else "none here")
            )
        sentences.append(f"Degree that certifies {rtol:g} at d = {found['dim']}: {'; '.join(need)}.")
    edges = found["thresholds"]
    alive = [edge for edge in edges if edge["bound"] > 0]
    if alive:
        first, last = alive[0], alive[-1]
        factor = math.sqrt(math.log(last["length"]) / math.log(first["length"]))
        sentences.append(
            f"The almost linear route pays up to B = {first['bound']:.2g} at {first['length']} tokens and up to "
            f"B = {last['bound']:.2g} at {last['length']}: {last['bound'] / first['bound']:.1f} times as far, where "
            f"sqrt(log n) grows {factor:.2f} times. Beyond it the plan is exact. The papers' lower bound says that it "
            "must end near sqrt(log n) in the limit; at these lengths the number of features decides."
        )
    else:
        sentences.append("At these lengths the almost linear route pays for no bound.")
    if found["gradients"]:
        worst = max(found["gradients"], key=lambda row: max(row["dq"], row["dk"], row["dv"]) / row["rtol"])
        over = max(worst["dq"], worst["dk"], worst["dv"]) / worst["rtol"]
        sentences.append(
            f"Gradients: the largest error is {over:.2g} times rtol, relative to the largest entry of the gradient "
            f"(at rtol {worst['rtol']:g}); rtol certifies the output, and of gradients it says nothing."
        )
    return sentences + general.conclusions(found["general"])


# Tables and files -----------------------------------------------------------------------------------------------------


def tables(found: dict[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    """Title, header and rows of each table."""
    from llmkern.papers.rope import general

    ours = [
        [
            str(row["length"]),
            f"{row['torch']:.4f}",
            "" if row["llmkern"] is None else f"{row['llmkern']:.4f}",
            "" if row["llmkern"] is None else f"{row['torch'] / row['llmkern']:.2f}",
            row["method"],
        ]
        for row in found["times"]
    ]
    degrees = [
        [
            f"{row['bound']:g}",
            str(row["degree"]),
            str(row["features"]),
            f"{row['error']:.1e}",
            f"{row['moment']:.1e}",
            f"{row['uniform']:.1e}",
        ]
        for row in found["degrees"]
    ]
    edges = [[str(row["length"]), f"{row['bound']:.3g}" if row["bound"] else "none"] for row in found["thresholds"]]
    grads = [
        ["causal" if row["causal"] else "full", f"{row['rtol']:g}", str(row["degree"])]
        + [f"{row[name]:.1e}" for name in ("error", "dq", "dk", "dv")]
        for row in found["gradients"]
    ]
    return [
        ("Seconds, forward and backward", ["tokens", "torch", "llmkern", "ratio", "method"], ours),
        (
            f"Error of the worst row over max|v - o|, d = {found['dim']}",
            ["B", "degree", "features", "error", "moment certificate", "uniform certificate"],
            degrees,
        ),
        (f"Largest B that pays, rtol {TIME_RTOL:g}, d = {TIME_DIM}", ["tokens", "B"], edges),
        (f"Errors of the op, B = {TIME_BOUND:g}", ["mask", "rtol", "degree", "row", "dq", "dk", "dv"], grads),
        *general.tables(found["general"]),
    ]


def _print_table(console: Any, title: str, header: list[str], rows: list[list[str]]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False, title=title, title_justify="left")
    for name in header:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def write(folder: Path, found: dict[str, Any]) -> list[Path]:
    text = io.StringIO()
    writer = csv.writer(text)
    for title, header, rows in tables(found):
        writer.writerow([title])
        writer.writerow(header)
        writer.writerows(rows)
    picture = io.BytesIO()
    plot(picture, found)
    paths = []
    for name, content in {"rope.csv": text.getvalue().encode(), "rope.png": picture.getvalue()}.items():
        scratch = folder / f"{name}.new"
        scratch.write_bytes(content)
        os.replace(scratch, folder / name)
        paths.append(folder / name)
    return paths


def plot(target: Any, found: dict[str, Any]) -> None:
    """Time against length, error and certificate against degree, the largest bound against length, the general case."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from llmkern.papers.rope import general

    figure, (left, middle, right, last) = plt.subplots(1, 4, figsize=(18, 4.2), layout="constrained")
    for (name, label), exponent in zip({"llmkern": "llmkern", "torch": "torch, exact"}.items(), exponents(found)):
        known = [row for row in found["times"] if row[name] is not None]
        left.plot([r["length"] for r in known], [r[name] for r in known], ".-", label=f"{label}: n^{exponent:.2f}")
    left.set(xscale="log", yscale="log", xlabel="tokens", ylabel="seconds", title="Forward and backward")
    for i, bound in enumerate(BOUNDS):
        rows = [row for row in found["degrees"] if row["bound"] == bound]
        degrees = [row["degree"] for row in rows]
        middle.plot(degrees, [row["error"] for row in rows], f"C{i}o-", label=f"B = {bound:g}")
        middle.plot(degrees, [row["moment"] for row in rows], f"C{i}--")
    middle.set(yscale="log", xlabel="degree", title="Error (solid) and certificate (dashed)")
    right.plot([e["length"] for e in found["thresholds"]], [e["bound"] for e in found["thresholds"]], "o-")
    right.set(xscale="log", xlabel="tokens", ylabel="B", title="Largest B that pays")
    general.draw(last, found["general"])
    left.legend()
    middle.legend()
    figure.savefig(target, format="png", dpi=130)
    plt.close(figure)
