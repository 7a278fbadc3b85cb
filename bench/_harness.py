"""Benchmarks by declaration: a case names inputs, peers and floor; the harness checks, times and records it.

A whole benchmark file, bench/scale.py::

    import torch
    from _harness import Case, measure

    import llmkern

    def eager(x, s):
        return x * s

    def case(n, dtype=torch.float32):
        return Case(
            op="scale",
            name=f"n{n}",
            dtype=dtype,
            shape={"N": n},
            inputs=lambda device: (torch.randn(n, device=device).to(dtype), 2.0),
            providers={"llmkern": llmkern.scale, "torch": eager, "torch.compile": torch.compile(eager)},
            bytes=2 * n * dtype.itemsize,
            sweep="N",
        )

    test_scale = measure(case(2**k) for k in range(10, 21, 2))

``make bench ARGS="-k scale"`` then refuses to time providers that disagree, times them in turns within one process, and
appends a row for each to bench/results.csv. ``--quick`` is a fast run that records nothing there.
"""

from __future__ import annotations

import gc
import math
import statistics
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from _machine import matmul_rate, peak_bytes, read_bandwidth, seconds_per_call, synchronize
from torch import Tensor

MIN_ROUNDS, MIN_ROUNDS_QUICK, MAX_ROUNDS = 9, 3, 400
# Rounds longer than this vary less than short ones: the fewest are enough.
LONG_ROUND_SECONDS = 5.0
# A sample shorter than this is several calls, so that the clock's own cost does not count.
SAMPLE_SECONDS, PILOT_SECONDS = 5e-4, 0.05
PEER_FACTOR = 8


@dataclass(frozen=True, eq=False)
class Case:
    """One comparison: every provider is called with the same inputs.

    Attributes:
        op, name: what the row says; (op, name, mode, dtype) should be unique.
        dtype: of the inputs; it sets the matrix rate of the floor and the allowance of the agreement test.
        shape: sizes by letter, for the row.
        inputs: device -> arguments, tensors or (nested) lists of tensors beside plain values. Made once.
        providers: name -> function of these arguments. "llmkern" is ours, the others are peers.
        bytes, flops: least traffic and least work of the operation; the floor is the larger of their times.
        products: type of the operands of products, where ``precision`` sets it apart from ``dtype``.
        mode: "forward", or "backward" (gradients of all floating tensors), or "full" (both).
        base: the plain peer. In float64 it gives the truth, in ``dtype`` the error that others may have: the rule of
            ``check_agreement``.
        agree: own agreement test in place of that rule: called with {provider: result} and the inputs, raises
            AssertionError. For operations that draw random numbers, or peers that compute something coarser.
        sweep: the letter of ``shape`` in which cases that are alike otherwise form a growth curve.
        devices: where the case makes sense; devices that the machine lacks are left out.
    """

    op: str
    name: str
    dtype: torch.dtype
    shape: dict[str, int]
    inputs: Callable[[str], tuple[Any, ...]]
    providers: dict[str, Callable[..., Any]]
    bytes: float
    flops: float = 0.0
    products: torch.dtype | None = None
    mode: str = "forward"
    base: str = "torch"
    agree: Callable[[dict[str, Any], tuple[Any, ...]], None] | None = None
    sweep: str | None = None
    devices: tuple[str, ...] = ("cpu", "cuda")

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def floor(self, device: str) -> float:
        """Seconds below which this machine cannot be."""
        compute = 0.0
        if self.flops:
            # Storage may be widened first: CPUs without instructions for half types multiply float32 far faster.
            compute = self.flops / max(
                matmul_rate(device, dtype) for dtype in {self.products or self.dtype, torch.float32}
            )
        return max(self.bytes / read_bandwidth(device), compute)


@dataclass
class Measurement:
    """Samples (seconds) and memory of one provider on one case."""

    case: Case
    device: str
    provider: str
    samples: list[float]
    peak: int
    beyond_outputs: int
    extra: dict[str, Any] = field(default_factory=dict)

    def quantile(self, percent: int) -> float:
        return statistics.quantiles(self.samples, n=100, method="inclusive")[percent - 1]

    @property
    def median(self) -> float:
        return statistics.median(self.samples)


class ReplayClock:
    """A timer for pytest-benchmark that shows samples taken before.

    pytest-benchmark times one test after the other; providers are compared in turns instead, which cancels drift of the
    machine. So the samples are taken first, and each provider's test replays its own.
    """

    def __init__(self) -> None:
        self._now = 0.0
        self._samples: Iterator[float] = iter(())

    def load(self, samples: list[float]) -> None:
        self._samples = iter(samples)

    def advance(self) -> None:
        self._now += next(self._samples, 0.0)

    def __call__(self) -> float:
        return self._now


_clock = ReplayClock()
_taken: dict[tuple[int, str], list[Measurement] | Exception] = {}


def measure(cases: Iterable[Case]) -> Callable[..., None]:
    """A test function, one test for each case, device and provider; to be bound to a name that begins with test_."""
    params = [
        pytest.param(
            case,
            device,
            provider,
            id=f"{device}-{case.name}-{case.dtype_name}-{case.mode}-{provider}",
            marks=pytest.mark.benchmark(
                group=f"{case.op} {case.name} {case.dtype_name} {case.mode} {device}", timer=_clock
            ),
        )
        for case in cases
        for device in case.devices
        if device == "cpu" or torch.cuda.is_available()
        for provider in case.providers
    ]

    @pytest.mark.parametrize(("case", "device", "provider"), params)
    def run(case: Case, device: str, provider: str, benchmark: Any, bench_session: Any) -> None:
        key = (id(case), device)
        if key not in _taken:
            try:
                _taken[key] = take(case, device, bench_session.seconds)
                bench_session.record(_taken[key])
            except Exception as error:
                _taken[key] = error
        taken = _taken[key]
        if isinstance(taken, Exception):
            raise taken
        mine = next(one for one in taken if one.provider == provider)
        benchmark.extra_info.update(mine.extra)
        _clock.load(mine.samples)
        benchmark.pedantic(_clock.advance, rounds=len(mine.samples))

    return run


def take(case: Case, device: str, seconds: float) -> list[Measurement]:
    """Check that the providers agree, then time them in turns for about this many seconds."""
    torch.compiler.reset()
    torch.manual_seed(0)
    arguments = case.inputs(device)
    calls = {name: _call(case, function, arguments) for name, function in case.providers.items()}
    results = {name: call() for name, call in calls.items()}
    if case.agree is not None:
        case.agree(results, arguments)
    else:
        wide = _call(case, case.providers[case.base], _map_tensors(arguments, _to_float64))()
        check_agreement(case, results, wide)
    outputs = {name: sum(t.numel() * t.element_size() for t in _tensors(result)) for name, result in results.items()}
    results.clear()
    peaks = {name: peak_bytes(call, device) for name, call in calls.items()}
    samples = _time_in_turns(calls, device, seconds)
    floor = case.floor(device)
    return [
        Measurement(
            case, device, name, samples[name], peaks[name], max(0, peaks[name] - outputs[name]), {"floor": floor}
        )
        for name in calls
    ]


def check_agreement(case: Case, results: dict[str, Any], truth: Any) -> None:
    """max|x - truth| <= 2 max|base - truth| + 4 eps max|truth| for each floating output; others are equal to base's.

    Peers may err eight times as much: how they round is their affair, as long as they compute the same.
    """
    eps = torch.finfo(case.products or case.dtype).eps
    for name, result in results.items():
        outputs, wanted, exact = _tensors(result), _tensors(results[case.base]), _tensors(truth)
        assert len(outputs) == len(wanted), (
            f"{case.op} {case.name}: {name} has {len(outputs)} outputs, not {len(wanted)}"
        )
        for index, (got, base, true) in enumerate(zip(outputs, wanted, exact)):
            where = f"{case.op} {case.name}: output {index} of {name}"
            assert got.shape == base.shape, (
                f"{where} has shape {tuple(got.shape)}, that of {case.base} {tuple(base.shape)}"
            )
            if not got.is_floating_point():
                assert torch.equal(got, base), f"{where} differs from {case.base}"
                continue
            special = ~true.isfinite()
            same = torch.allclose(got[special].double(), true[special], equal_nan=True)
            assert same, f"{where} differs from float64 where that is infinite or NaN"
            # What overflows in the plain peer of this dtype says nothing about the others.
            finite = ~special & base.isfinite()
            largest = float(true[finite].abs().max() if finite.any() else 0)
            allowed = 2 * _distance(base, true, finite) + 4 * eps * largest
            if name != "llmkern":
                allowed *= PEER_FACTOR
            error = _distance(got, true, finite)
            assert error <= allowed, f"{where} is off by {error:.3g}, allowed is {allowed:.3g}"


def growth_exponent(sizes: list[float], seconds: list[float]) -> float:
    """Slope of log time over log size, by least squares."""
    return statistics.linear_regression([math.log(s) for s in sizes], [math.log(t) for t in seconds]).slope


def _distance(a: Tensor, truth: Tensor, where: Tensor) -> float:
    return float((a.double() - truth)[where].abs().max()) if bool(where.any()) else 0.0


def _time_in_turns(calls: dict[str, Callable[[], Any]], device: str, seconds: float) -> dict[str, list[float]]:
    repeats = {}
    cost = 0.0
    for name, call in calls.items():
        pilot = _pilot(call, device)
        repeats[name] = max(1, math.ceil(SAMPLE_SECONDS / pilot))
        cost += pilot * repeats[name]
    fewest = MIN_ROUNDS if seconds >= 1 and cost < LONG_ROUND_SECONDS else MIN_ROUNDS_QUICK
    rounds = max(fewest, min(MAX_ROUNDS, int(seconds / cost)))
    samples: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    gc.collect()
    gc.disable()
    try:
        for turn in range(rounds):
            # Another one begins each time, so that none always finds the caches as the same peer left them.
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                synchronize(device)
                samples[name].append(seconds_per_call(calls[name], repeats[name], device))
    finally:
        gc.enable()
    return samples


def _pilot(call: Callable[[], Any], device: str) -> float:
    """Shortest of some calls; the first ones after compiling or waiting take many times as long as those to come."""
    shortest, spent = math.inf, 0.0
    while spent < PILOT_SECONDS:
        seconds = max(seconds_per_call(call, 1, device), 1e-7)
        shortest, spent = min(shortest, seconds), spent + seconds
    return shortest


def _call(case: Case, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Callable[[], Any]:
    """The call that is timed, by mode; its result is what must agree."""
    if case.mode == "forward":
        return torch.no_grad()(lambda: function(*arguments))
    arguments = _map_tensors(arguments, lambda t: t.detach().requires_grad_(t.is_floating_point()))
    leaves = [t for t in _tensors(arguments) if t.requires_grad]
    outputs = [t for t in _tensors(function(*arguments)) if t.requires_grad]
    # Fixed upstream gradients without a pattern that a wrong backward would also satisfy.
    upstream = [torch.linspace(-1, 1, t.numel(), device=t.device).roll(7).view(t.shape).to(t.dtype) for t in outputs]
    if case.mode == "backward":
        return lambda: torch.autograd.grad(outputs, leaves, upstream, retain_graph=True)
    return lambda: torch.autograd.grad([t for t in _tensors(function(*arguments)) if t.requires_grad], leaves, upstream)


def _to_float64(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def _map_tensors(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_map_tensors(item, function) for item in value))
    if isinstance(value, list | tuple):
        return type(value)(_map_tensors(item, function) for item in value)
    if isinstance(value, dict):
        return {key: _map_tensors(item, function) for key, item in value.items()}
    return value


def _tensors(value: Any) -> list[Tensor]:
    found: list[Tensor] = []
    _map_tensors(value, lambda tensor: (found.append(tensor), tensor)[1])
    return found
