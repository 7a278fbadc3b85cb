"""What a benchmark run leaves behind: rows in a CSV file, a table of ratios, growth exponents and plots."""

from __future__ import annotations

import csv
from pathlib import Path

import torch
from _harness import Measurement, growth_exponent
from _machine import commit, device_name

from llmkern import _library

COLUMNS = (
    "op", "case", "provider", "mode", "dtype", "shape", "device", "torch", "commit", "median", "p20", "p80",
    "peak_memory", "beyond_outputs", "floor", "ratio_to_floor", "implementation",
)  # fmt: skip


def implementation(provider: str, device: str) -> str:
    """What ran: for ours the kernels, for a peer nothing more than its name says."""
    if provider != "llmkern":
        return "peer"
    if device != "cpu":
        problems = {op.gpu_problem for op in _library.OPS.values()} - {None}
        return f"torch reference ({problems.pop()})" if problems else "Triton"
    build = _library.cpu_build
    return f"C++ {build.isa}" if build.isa else f"torch reference ({build.reason})"


def row(one: Measurement) -> dict[str, str]:
    case, floor = one.case, one.extra["floor"]
    values = (
        case.op,
        case.name,
        one.provider,
        case.mode,
        case.dtype_name,
        " ".join(f"{letter}={size}" for letter, size in case.shape.items()),
        device_name(one.device),
        torch.__version__,
        commit(),
        f"{one.median:.4g}",
        f"{one.quantile(20):.4g}",
        f"{one.quantile(80):.4g}",
        str(one.peak),
        str(one.beyond_outputs),
        f"{floor:.4g}",
        f"{one.median / floor:.3f}" if floor else "",
        implementation(one.provider, one.device),
    )
    return dict(zip(COLUMNS, values))


def append_rows(path: Path, measurements: list[Measurement]) -> None:
    """Add rows at the end of the file, which is made with its header where it is absent."""
    header = ",".join(COLUMNS)
    if path.exists():
        found = path.read_text().partition("\n")[0].strip()
        if found != header:
            raise ValueError(f"bench: expected {path} to begin with the columns {header}, got {found}; move it away")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if file.tell() == 0:
            writer.writeheader()
        writer.writerows(map(row, measurements))


def table(measurements: list[Measurement]) -> list[str]:
    """A line for each provider: median, how many times ours it takes, how many times the floor."""
    lines = []
    for group in _groups(measurements):
        case, device, floor = group[0].case, group[0].device, group[0].extra["floor"]
        ours = next((one.median for one in group if one.provider == "llmkern"), None)
        sizes = " ".join(f"{letter}={size}" for letter, size in case.shape.items())
        lines.append(
            f"{case.op} {case.name} ({case.mode}, {str(case.dtype).removeprefix('torch.')}, {device}, {sizes}), "
            f"floor {_time(floor)}"
        )
        for one in group:
            ratio = f"{one.median / ours:8.2f} x llmkern " if ours else ""
            above = f"{one.median / floor:8.2f} x floor " if floor else ""
            extra = f"{one.beyond_outputs / 2**20:9.2f} MiB beyond outputs"
            lines.append(f"  {one.provider:24s} {_time(one.median)}  {ratio}{above}{extra}")
    return lines


def growth(measurements: list[Measurement]) -> dict[tuple[str, ...], tuple[list[float], list[float]]]:
    """Curves (op, mode, dtype, device, other sizes, letter, provider) -> sizes, medians; of three sizes or more."""
    curves: dict[tuple[str, ...], dict[float, float]] = {}
    for one in measurements:
        case = one.case
        if case.sweep is None:
            continue
        others = " ".join(f"{letter}={size}" for letter, size in case.shape.items() if letter != case.sweep)
        key = (case.op, case.mode, case.dtype_name, one.device, others, case.sweep, one.provider)
        curves.setdefault(key, {})[case.shape[case.sweep]] = one.median
    return {
        key: (sorted(points), [points[size] for size in sorted(points)])
        for key, points in curves.items()
        if len(points) >= 3
    }


def growth_lines(measurements: list[Measurement]) -> list[str]:
    return [
        f"{op} {mode} {dtype} {device} {others}: time of {provider} grows as {letter}^{growth_exponent(*curve):.2f}"
        for (op, mode, dtype, device, others, letter, provider), curve in growth(measurements).items()
    ]


def plot(measurements: list[Measurement], folder: Path) -> list[Path]:
    """One SVG of ratios for each op and device, one for each growth curve; nothing where matplotlib is absent."""
    try:
        import matplotlib
    except ImportError:
        return []
    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    written = []
    by_op: dict[tuple[str, str], list[Measurement]] = {}
    for one in measurements:
        by_op.setdefault((one.case.op, one.device), []).append(one)
    for (op, device), rows in by_op.items():
        groups = _groups(rows)
        figure, axes = plt.subplots(figsize=(8, 1.2 + 0.2 * len(rows) + 0.2 * len(groups)), layout="constrained")
        position, ticks, labels = 0.0, [], []
        colors = {name: f"C{index}" for index, name in enumerate(dict.fromkeys(one.provider for one in rows))}
        for group in groups:
            ticks.append(position + (len(group) - 1) / 2)
            labels.append(f"{group[0].case.name}\n{group[0].case.mode}, {group[0].case.dtype_name}")
            for one in group:
                axes.barh(position, one.median * 1e3, color=colors[one.provider], height=0.9)
                position += 1
            floor = group[0].extra["floor"] * 1e3
            axes.plot([floor, floor], [position - len(group) - 0.5, position - 0.5], color="black", linestyle=":")
            position += 1
        axes.set(
            xscale="log", xlabel="median, ms (dotted: floor)", yticks=ticks, yticklabels=labels, title=f"{op}, {device}"
        )
        axes.invert_yaxis()
        axes.legend([plt.Rectangle((0, 0), 1, 1, color=color) for color in colors.values()], list(colors))
        written.append(folder / f"{op}_{device}.svg")
        figure.savefig(written[-1])
        plt.close(figure)
    written += _plot_growth(measurements, folder)
    return written


def _plot_growth(measurements: list[Measurement], folder: Path) -> list[Path]:
    import matplotlib.pyplot as plt

    figures: dict[tuple[str, ...], list[tuple[str, list[float], list[float]]]] = {}
    for (*key, provider), (sizes, medians) in growth(measurements).items():
        figures.setdefault(tuple(key), []).append((provider, sizes, medians))
    written = []
    for (op, mode, dtype, device, others, letter), curves in figures.items():
        figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
        for provider, sizes, medians in curves:
            label = f"{provider}: {letter}^{growth_exponent(sizes, medians):.2f}"
            axes.loglog(sizes, [t * 1e3 for t in medians], marker="o", label=label)
        axes.set(xlabel=letter, ylabel="median, ms", title=f"{op} {mode} {dtype} {device} {others}")
        axes.legend()
        name = f"{op}_{mode}_{dtype}_{device}_{others}_over_{letter}".replace(" ", "_").replace("=", "")
        written.append(folder / f"{name}.svg")
        figure.savefig(written[-1])
        plt.close(figure)
    return written


def _groups(measurements: list[Measurement]) -> list[list[Measurement]]:
    groups: dict[tuple[int, str], list[Measurement]] = {}
    for one in measurements:
        groups.setdefault((id(one.case), one.device), []).append(one)
    return list(groups.values())


def _time(seconds: float) -> str:
    return f"{seconds * 1e6:10.1f} us" if seconds < 1e-3 else f"{seconds * 1e3:10.3f} ms"
