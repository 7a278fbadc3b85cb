"""Units of work over processes: every unit is done once, whatever becomes of the process that had it in hand.

Each process computes on one thread, so that a result depends neither on how many processes there are nor on how torch
would have split it. A function that is run here writes its result to a file or returns it; the order of results is that
of the units.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection
from typing import Any

import torch

# How often a unit may lose its process before the run gives up.
ATTEMPTS = 3


def run_units(
    function: Callable[..., Any],
    units: Sequence[tuple[Any, ...]],
    *,
    workers: int,
    ray: bool = False,
    done: Callable[[int, Any], None] = lambda index, result: None,
) -> list[Any]:
    """``function(*unit)`` of every unit; ``done(index, result)`` is told as they end."""
    if ray:
        from llmkern.integrations.ray import run_units as run_on_ray

        return run_on_ray(function, units, workers=workers, done=done)
    if workers <= 1 or len(units) <= 1:
        results = []
        with one_thread():
            for index, unit in enumerate(units):
                results.append(function(*unit))
                done(index, results[-1])
        return results
    return _run_on_processes(function, units, workers, done)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _run_on_processes(
    function: Callable[..., Any], units: Sequence[tuple[Any, ...]], workers: int, done: Callable[[int, Any], None]
) -> list[Any]:
    # A process that is forked from one with threads may hang, and one that is spawned imports torch each time: the
    # server imports it once and has no threads.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["llmkern.papers.data_selection.engine", function.__module__])
    results: dict[int, Any] = {}
    lost = [0] * len(units)
    while len(results) < len(units):
        left = [index for index in range(len(units)) if index not in results]
        pool = ProcessPoolExecutor(min(workers, len(left)), context, _begin)
        running: dict[Future[Any], int] = {}
        try:
            waiting = iter(left)
            more = True
            while more or running:
                # A few units more than there are processes: enough to keep them busy, and no more are lost with them.
                while more and len(running) < 2 * workers:
                    index = next(waiting, None)
                    more = index is not None
                    if index is not None:
                        running[pool.submit(function, *units[index])] = index
                if not running:
                    break
                ended, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in ended:
                    result = future.result()
                    index = running.pop(future)
                    results[index] = result
                    done(index, result)
        except BrokenProcessPool:
            # Which unit killed its process is not known; all in hand count, and all are done again.
            for future, index in running.items():
                if future.done() and future.exception() is None and index not in results:
                    results[index] = future.result()
                    done(index, results[index])
                elif index not in results:
                    lost[index] += 1
                    if lost[index] >= ATTEMPTS:
                        raise RuntimeError(
                            f"a worker process died {ATTEMPTS} times with unit {index} in hand: {units[index]!r}"
                        ) from None
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
    return [results[index] for index in range(len(units))]


def _begin() -> None:
    torch.set_num_threads(1)
    parent = multiprocessing.parent_process()
    assert parent is not None
    # A run that is killed takes its workers along: without this they would wait for work for ever.
    threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()


def _end_with(sentinel: int) -> None:
    connection.wait([sentinel])
    os._exit(1)
