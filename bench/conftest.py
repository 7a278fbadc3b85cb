"""Options and closing report of the benchmarks; what a case is stands in _harness.py."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from _harness import Measurement
from _report import append_rows, growth_lines, plot, table

HERE = Path(__file__).resolve().parent


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("llmkern benchmarks")
    group.addoption("--quick", action="store_true", help="a fast run; rows go to the output folder")
    group.addoption("--seconds", type=float, help="time for each case (default 4, with --quick 0.3)")
    group.addoption("--results", type=Path, help="CSV file to add rows to (default bench/results.csv)")
    group.addoption("--device", choices=("all", "cpu", "cuda"), default="all", help="where to run (default all)")
    group.addoption("--no-plots", action="store_true", help="draw nothing")
    group.addoption("--out", type=Path, default=Path(os.environ.get("OUT", HERE / "out")), help="folder for plots")


class BenchSession:
    """Measurements of this run; each case is on disk as soon as it is taken."""

    def __init__(self, config: pytest.Config) -> None:
        quick = config.getoption("--quick")
        self.out: Path = config.getoption("--out")
        self.seconds: float = config.getoption("--seconds") or (0.3 if quick else 4.0)
        self.results: Path = config.getoption("--results") or (
            self.out / "quick.csv" if quick else HERE / "results.csv"
        )
        self.measurements: list[Measurement] = []

    def record(self, measurements: list[Measurement]) -> None:
        append_rows(self.results, measurements)
        self.measurements += measurements


SESSION = pytest.StashKey[BenchSession]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[SESSION] = BenchSession(config)
    # The closing report below has the comparison; pytest-benchmark's own tables stay narrow.
    config.option.benchmark_columns = ["median", "iqr", "rounds"]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    wanted = config.getoption("--device")
    devices = {item: item.callspec.params.get("device") for item in items if hasattr(item, "callspec")}
    others = [] if wanted == "all" else [item for item in items if devices.get(item, wanted) != wanted]
    if others:
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if item not in set(others)]


@pytest.fixture(scope="session")
def bench_session(pytestconfig: pytest.Config) -> BenchSession:
    return pytestconfig.stash[SESSION]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    session = config.stash[SESSION]
    if not session.measurements:
        return
    plots = [] if config.getoption("--no-plots") else plot(session.measurements, session.out)
    terminalreporter.section("medians, ratios to llmkern and to the floor")
    for line in [*table(session.measurements), *growth_lines(session.measurements)]:
        terminalreporter.write_line(line)
    terminalreporter.write_line(f"rows: {session.results}" + (f", plots: {session.out}" if plots else ""))
