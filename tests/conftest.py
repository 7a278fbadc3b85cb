"""Devices of the suite, the seed of every test, and rates that plans are made with."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from llmkern.ops.rope_attention import cost

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "device" in metafunc.fixturenames:
        metafunc.parametrize("device", DEVICES)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def slow_exact_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """On every machine a plan of rope_attention finds polynomials faster than exact attention."""
    slow = dataclasses.replace(cost.RATES["avx2"], torch_pair=(1e-6,) * len(cost.SIZES), tile_pair=1e-6)
    monkeypatch.setattr(cost, "rates", lambda device: slow)
