"""Units of work on a Ray cluster: ``llmkern select ... --ray``.

Every node needs the pool and the store under the same paths (a shared file system). A unit writes its result whole or
not at all, so a worker that dies costs the units that it had in hand, which Ray gives to another.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch

from llmkern._library import bad_value


def run_units(
    function: Callable[..., Any],
    units: Sequence[tuple[Any, ...]],
    *,
    workers: int,
    done: Callable[[int, Any], None] = lambda index, result: None,
) -> list[Any]:
    """As ``run_units`` of local processes; joins the cluster that RAY_ADDRESS names, or starts one on this machine."""
    try:
        import ray
    except ModuleNotFoundError:
        raise bad_value("select", "the package ray for --ray", "none", "pip install 'llmkern[ray]'") from None
    if not ray.is_initialized():
        ray.init(log_to_driver=False, include_dashboard=False, logging_level=logging.ERROR)
    remote = ray.remote(num_cpus=1, max_retries=3)(_on_one_thread)
    results: dict[int, Any] = {}
    running: dict[Any, int] = {}
    waiting = iter(range(len(units)))
    while len(results) < len(units):
        # Twice as many as there are workers: they stay busy, and the driver does not hold every unit at once.
        while len(running) < 2 * max(1, workers) and (index := next(waiting, None)) is not None:
            running[remote.remote(function, units[index])] = index
        (ended,), _ = ray.wait(list(running), num_returns=1)
        index = running.pop(ended)
        results[index] = ray.get(ended)
        done(index, results[index])
    return [results[index] for index in range(len(units))]


def _on_one_thread(function: Callable[..., Any], unit: tuple[Any, ...]) -> Any:
    torch.set_num_threads(1)
    return function(*unit)
