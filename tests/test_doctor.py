"""``llmkern doctor`` says what is live and why."""

from __future__ import annotations

import json

import pytest
import torch

import llmkern
from llmkern import _library, doctor
from llmkern.__main__ import main


def test_json_and_text_hold_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert main(["doctor"]) == 0
    assert capsys.readouterr().out.strip() == doctor.as_text(found)
    assert found["versions"]["llmkern"] == llmkern.__version__
    assert found["versions"]["torch"] == torch.__version__
    assert found["cpu"]["threads"] == torch.get_num_threads()
    assert found["cpu"]["in_use"] == _library.cpu_build.isa
    assert set(found["ops"]) == set(_library.OPS)


def test_without_a_module_the_reason_stands_at_every_op(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_library, "cpu_build", _library.CpuBuild(None, "nothing is built", {}))
    found = doctor.examine()
    for live in found["ops"].values():
        assert live["cpu"] == {"live": "torch reference", "reason": "nothing is built"}
    assert "torch references: nothing is built" in doctor.as_text(found)


def test_an_op_that_the_module_lacks_is_told_from_one_that_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_library, "cpu_build", _library.CpuBuild("generic", "LLMKERN_CPU", {}))
    has_kernel = {"llmkern::mix_logits_fwd"}
    monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda name, key: name in has_kernel)
    ops = doctor.examine()["ops"]
    assert ops["mix_logits_fwd"]["cpu"] == {"live": "C++ generic", "reason": "LLMKERN_CPU"}
    assert ops["mix_logits_bwd"]["cpu"]["live"] == "torch reference"
    assert "holds no kernel" in ops["mix_logits_bwd"]["cpu"]["reason"]


@pytest.mark.parametrize(
    ("triton", "live", "reason"),
    [("3.7.1", "Triton", "kernels/mix_logits.py"), (None, "torch reference", "triton is not installed")],
)
def test_gpu_column(monkeypatch: pytest.MonkeyPatch, triton: str | None, live: str, reason: str) -> None:
    version = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: triton if name == "triton" else version(name))
    gpu = {"available": True, "reason": "", "devices": [{"text": "cuda:0 Some GPU, capability 9.0"}]}
    monkeypatch.setattr(doctor, "_gpu", lambda: gpu)
    found = doctor.examine()
    assert found["ops"]["mix_logits_fwd"]["gpu"]["live"] == live
    assert reason in found["ops"]["mix_logits_fwd"]["gpu"]["reason"]
    assert "Some GPU, capability 9.0" in doctor.as_text(found)
    gpu.update(available=False, devices=[], reason="none found")
    assert doctor.examine()["ops"]["mix_logits_fwd"]["gpu"]["live"] == "none"


def test_a_failed_import_of_triton_is_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_library.OPS["mix_logits_fwd"], "gpu_problem", "triton is not installed (pip install triton)")
    gpu = {"available": True, "reason": "", "devices": []}
    live = doctor._on_gpu(_library.OPS["mix_logits_fwd"], gpu)
    assert live == {"live": "torch reference", "reason": "triton is not installed (pip install triton)"}
