"""Units of `llmkern select --ray` on a local cluster of two workers."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

pytest.importorskip("ray")
pytest.importorskip("pyarrow")

import ray
import select_units
from datacomp_tree import make_tree

from llmkern.papers.data_selection import engine
from llmkern.papers.data_selection.score import Options, Run, score_pool
from llmkern.papers.data_selection.shards import open_pool


@pytest.fixture(scope="module", autouse=True)
def cluster():
    path = os.pathsep.join([str(Path(__file__).parent.parent), str(Path(__file__).parent)])
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="error",
        object_store_memory=80 * 2**20,
        runtime_env={"env_vars": {"PYTHONPATH": path}},
    )
    yield
    ray.shutdown()


def test_a_worker_that_is_killed_loses_nothing(tmp_path: Path) -> None:
    units = [(str(tmp_path), x) for x in range(8)]
    seen: dict[int, int] = {}
    found = engine.run_units(select_units.die_once, units, workers=2, ray=True, done=lambda i, r: seen.update({i: r}))
    assert (tmp_path / "died").exists()
    assert found == [x * x for x in range(8)] == [seen[x] for x in range(8)]


def test_scores_are_those_of_local_processes(tmp_path: Path) -> None:
    make_tree(tmp_path / "pool", rows=300, shards=5, bad=1)
    options = Options(batch_size=64, num_partitions=2)
    for name, ray_too in (("ray", True), ("local", False)):
        run = Run(workers=2 if ray_too else 1, on_bad_shard="skip", ray=ray_too, quiet=True)
        score_pool(open_pool(tmp_path / "pool"), tmp_path / name, options, run)
    for file in ("scores.parquet", "manifest.json", "bad_shards.json"):
        assert (tmp_path / "ray" / file).read_bytes() == (tmp_path / "local" / file).read_bytes()
