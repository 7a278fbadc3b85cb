"""The benchmark harness: its gate refuses wrong providers, and its figures are those of the calls that it times."""

from __future__ import annotations

import csv
import importlib
import json
import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

BENCH = Path(__file__).resolve().parent.parent / "bench"


@pytest.fixture(scope="module", autouse=True)
def bench_on_path():
    sys.path.insert(0, str(BENCH))
    yield
    sys.path.remove(str(BENCH))


@pytest.fixture
def harness():
    return importlib.import_module("_harness")


@pytest.fixture
def machine():
    return importlib.import_module("_machine")


@pytest.fixture
def report():
    return importlib.import_module("_report")


@pytest.fixture
def one_thread():
    """Threads that wait for each other on a busy machine take as long as a turn of its scheduler."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def softmax(x: Tensor) -> Tensor:
    return x.softmax(-1)


def make_case(harness, provider=softmax, *, rows: int = 8, dtype=torch.bfloat16, **options):
    case = {
        "op": "softmax",
        "name": f"rows{rows}",
        "dtype": dtype,
        "shape": {"B": rows, "V": 100},
        "inputs": lambda device: (torch.randn(rows, 100, device=device).to(dtype),),
        "providers": {"llmkern": provider, "torch": softmax},
        "bytes": 2 * rows * 100 * dtype.itemsize,
        **options,
    }
    return harness.Case(**case)


@pytest.mark.parametrize("mode", ["forward", "backward", "full"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_gate_lets_an_equal_provider_pass(harness, mode: str, dtype: torch.dtype) -> None:
    def in_float32(x: Tensor) -> Tensor:
        return x.float().softmax(-1).to(x.dtype)

    taken = harness.take(make_case(harness, in_float32, dtype=dtype, mode=mode), "cpu", 0.01)
    assert [one.provider for one in taken] == ["llmkern", "torch"]
    assert all(len(one.samples) >= 3 and min(one.samples) > 0 for one in taken)


@pytest.mark.parametrize(
    ("wrong", "mode", "text"),
    [
        (lambda x: x.softmax(-1) * 1.1, "forward", "is off by"),
        (lambda x: x.softmax(-1) + 0 * x.sum().log(), "forward", "is off by nan"),
        (lambda x: x.log_softmax(-1).masked_fill(x > -2, -torch.inf).exp(), "forward", "is off by"),
        (lambda x: x.softmax(-1)[:, :-1], "forward", "has shape"),
        (lambda x: (x.softmax(-1), x), "forward", "2 outputs"),
        (lambda x: x.detach().softmax(-1) + x - x.detach(), "backward", "is off by"),
    ],
    ids=["scaled", "nan", "masked", "shape", "count", "gradient"],
)
def test_the_gate_refuses_a_wrong_provider(harness, wrong, mode: str, text: str) -> None:
    case = make_case(harness, wrong, mode=mode, inputs=lambda device: (-torch.rand(8, 100).bfloat16() - 1,))
    with pytest.raises(AssertionError, match=text):
        harness.take(case, "cpu", 0.01)


def test_whole_numbers_have_to_be_equal_and_a_case_may_bring_its_own_gate(harness) -> None:
    def last(x: Tensor) -> Tensor:
        return x.argmin(-1)

    case = make_case(harness, last, providers={"llmkern": last, "torch": lambda x: x.argmax(-1)})
    with pytest.raises(AssertionError, match="differs from torch"):
        harness.take(case, "cpu", 0.01)

    def agree(results: dict[str, Tensor], inputs: tuple[Tensor]) -> None:
        assert results["llmkern"].shape == results["torch"].shape == inputs[0].shape[:1]

    own = make_case(harness, last, providers=case.providers, agree=agree)
    assert len(harness.take(own, "cpu", 0.01)) == 2


def test_samples_are_the_time_of_one_call(harness, one_thread: None) -> None:
    def slow(x: Tensor) -> Tensor:
        time.sleep(0.02)
        return x.softmax(-1)

    ours, peer = harness.take(make_case(harness, slow), "cpu", 0.3)
    assert ours.median >= 0.02
    assert min(peer.samples) < 0.01


def test_memory_beyond_outputs(harness) -> None:
    rows = 1000

    def with_scratch(x: Tensor) -> Tensor:
        scratch = torch.empty(x.numel(), dtype=torch.float64)
        assert scratch.numel()
        return x.softmax(-1)

    case = make_case(harness, with_scratch, rows=rows, dtype=torch.float32)
    ours, peer = harness.take(case, "cpu", 0.01)
    assert peer.peak == rows * 100 * 4
    assert peer.beyond_outputs == 0
    assert ours.beyond_outputs == rows * 100 * 8


def test_floor_is_the_larger_of_traffic_and_work(harness, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "read_bandwidth", lambda device: 1e9)
    monkeypatch.setattr(harness, "matmul_rate", lambda device, dtype: 1e12)
    assert make_case(harness, bytes=2e9, flops=1e12).floor("cpu") == 2.0
    assert make_case(harness, bytes=2e9, flops=5e12).floor("cpu") == 5.0


def test_machine_rates_hold_against_a_plain_copy(machine) -> None:
    """A copy reads and writes, so that a streaming read cannot be slower than it by much, nor above any memory."""
    numbers = torch.ones(2**25)
    out = torch.empty_like(numbers)
    seconds = min(machine.seconds_per_call(lambda: out.copy_(numbers), 1, "cpu") for _ in range(5))
    assert 0.5 * numbers.numel() * 4 / seconds < machine.read_bandwidth("cpu") < 5e12
    assert machine.matmul_rate("cpu", torch.float32) > 1e9


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_growth_exponent(harness, power: float) -> None:
    sizes = [100.0, 300.0, 1000.0, 5000.0]
    seconds = [3e-6 * size**power for size in sizes]
    assert math.isclose(harness.growth_exponent(sizes, seconds), power, rel_tol=1e-9)


def measured(harness, case, samples: dict[str, list[float]], floor: float = 1e-4) -> list:
    return [
        harness.Measurement(case, "cpu", name, times, 5000, 1000, {"floor": floor}) for name, times in samples.items()
    ]


def test_rows_are_appended_under_one_header(harness, report, tmp_path: Path) -> None:
    path = tmp_path / "new" / "results.csv"
    rows = measured(harness, make_case(harness), {"llmkern": [1e-3, 2e-3, 3e-3], "torch": [4e-3, 4e-3, 4e-3]})
    report.append_rows(path, rows)
    report.append_rows(path, rows[:1])
    with path.open() as file:
        found = list(csv.DictReader(file))
    assert [row["provider"] for row in found] == ["llmkern", "torch", "llmkern"]
    expected = {"op": "softmax", "case": "rows8", "mode": "forward", "dtype": "bfloat16", "shape": "B=8 V=100"}
    expected |= {"median": "0.002", "p20": "0.0014", "p80": "0.0026", "peak_memory": "5000", "beyond_outputs": "1000"}
    expected |= {"floor": "0.0001", "ratio_to_floor": "20.000", "torch": torch.__version__}
    assert {key: found[0][key] for key in expected} == expected
    assert found[1]["implementation"] == "peer"
    assert os.sep not in found[0]["device"]


def test_foreign_results_are_left_alone(harness, report, tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    path.write_text("something,else\n")
    with pytest.raises(ValueError, match=r"expected .* to begin with the columns op,case"):
        report.append_rows(path, measured(harness, make_case(harness), {"torch": [1.0, 1.0]}))
    assert path.read_text() == "something,else\n"


def test_report_shows_ratios_growth_and_plots(harness, report, tmp_path: Path) -> None:
    rows = []
    for size in (10, 100, 1000):
        case = make_case(harness, rows=size, sweep="B")
        rows += measured(harness, case, {"llmkern": [size * 1e-5] * 3, "torch": [size**2 * 1e-5] * 3})
    text = "\n".join(report.table(rows))
    assert "100.00 x llmkern" in text
    assert "0.10 x floor" not in text.splitlines()[-1]
    growth = "\n".join(report.growth_lines(rows))
    assert "llmkern grows as B^1.00" in growth
    assert "torch grows as B^2.00" in growth
    plots = report.plot(rows, tmp_path)
    assert len(plots) == 2
    assert all("<svg" in path.read_text() for path in plots)


TOY = """
import torch
from _harness import Case, measure

def case(name, ours):
    return Case(
        op="double", name=name, dtype=torch.float32, shape={"N": 1000},
        inputs=lambda device: (torch.randn(1000, device=device),),
        providers={"llmkern": ours, "torch": lambda x: 2 * x}, bytes=8000, devices=("cpu",),
    )

test_double = measure([case("right", lambda x: x + x), case("wrong", lambda x: x + 1)])
"""


def test_a_run_records_what_is_right_and_fails_for_what_is_wrong(tmp_path: Path) -> None:
    folder = tmp_path / "bench"
    shutil.copytree(BENCH, folder, ignore=shutil.ignore_patterns("__pycache__", "out", "*.csv", "[!_c]*.py"))
    (folder / "toy.py").write_text(TOY)
    (tmp_path / "pytest.ini").write_text("[pytest]\npython_files = bench/[!_]*.py\n")
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "bench", "--quick", "--benchmark-json=out.json"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(BENCH.parent), "OUT": str(tmp_path / "out")},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert "2 failed, 2 passed" in result.stdout, result.stdout + result.stderr
    assert "double wrong: output 0 of llmkern is off by" in result.stdout
    assert "x floor" in result.stdout
    with (tmp_path / "out" / "quick.csv").open() as file:
        rows = {row["provider"]: row for row in csv.DictReader(file)}
    assert {row["case"] for row in rows.values()} == {"right"}
    assert not (folder / "results.csv").exists()
    # pytest-benchmark reports the samples that were taken in turns.
    stats = json.loads((tmp_path / "out.json").read_text())["benchmarks"]
    replayed = {one["params"]["provider"]: one["stats"]["median"] for one in stats}
    for provider, row in rows.items():
        assert math.isclose(replayed[provider], float(row["median"]), rel_tol=1e-3)


def test_figures_of_the_readme_are_those_of_the_results() -> None:
    _figures = importlib.import_module("_figures")
    text = _figures.README.read_text()
    assert _figures.with_figures(text) == text, "run: python bench/_figures.py"
    assert len(_figures.table()) > 10
