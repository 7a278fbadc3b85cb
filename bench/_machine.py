"""What the benchmarks need to know of the machine: names, bandwidth, matrix rate, clocks, allocated memory."""

from __future__ import annotations

import contextlib
import functools
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from llmkern._memory import zeros_to_stream

HERE = Path(__file__).resolve().parent


@functools.cache
def device_name(device: str) -> str:
    """Model of the GPU, or model of the CPU with the number of threads in use."""
    if device != "cpu":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{models[0] if models else platform.machine()}, {torch.get_num_threads()} threads"


@functools.cache
def commit() -> str:
    """Commit of the checkout, with a plus where tracked files differ from it."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=HERE, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short=10", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def synchronize(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize(device)


def seconds_per_call(call: Callable[[], object], iterations: int, device: str) -> float:
    """Mean time of back-to-back calls: wall clock on the CPU, events on a GPU."""
    if device == "cpu":
        start = time.perf_counter()
        for _ in range(iterations):
            call()
        return (time.perf_counter() - start) / iterations
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(iterations):
        call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / iterations


def _best_median(calls: list[Callable[[], object]], device: str, rounds: int = 7) -> float:
    for call in calls:
        call()
    return min(statistics.median(seconds_per_call(call, 1, device) for _ in range(rounds)) for call in calls)


@functools.cache
def read_bandwidth(device: str) -> float:
    """Bytes per second of a streaming read with all threads, over a buffer far above any cache.

    The fastest of several reductions of torch, since none of them is built as a bandwidth test, over huge pages.
    """
    shape = (2**27 if device == "cpu" else 2**30,)
    numbers = zeros_to_stream(torch.empty(0, device=device), [(shape, torch.float32)])[0].fill_(1)
    vector = torch.ones(4096, device=device)
    reductions = [
        lambda: numbers.sum(),
        lambda: numbers.view(torch.int32).amax(),
        lambda: torch.linalg.vector_norm(numbers),
        lambda: numbers.view(-1, 4096) @ vector,
    ]
    return numbers.numel() * numbers.element_size() / _best_median(reductions, device)


@functools.cache
def matmul_rate(device: str, dtype: torch.dtype) -> float:
    """Floating-point operations per second of a large matrix product, by the faster library of those in torch.

    On some CPUs the BLAS behind ``@`` leaves half of the rate unused, and oneDNN does not.
    """
    n = 1536 if device == "cpu" else 8192
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    calls = [lambda: a @ b]
    # oneDNN refuses what the CPU has no instructions for.
    with contextlib.suppress(RuntimeError):
        left, right = a.to_mkldnn(), b.to_mkldnn()
        torch.nn.functional.linear(left, right)
        calls.append(lambda: torch.nn.functional.linear(left, right))
    return 2 * n**3 / _best_median(calls, device)


def peak_bytes(call: Callable[[], object], device: str) -> int:
    """Largest number of bytes that torch's allocator held for this call at one time, its result included."""
    if device != "cpu":
        synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        result = call()
        synchronize(device)
        del result
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = call()
    del result
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak
