"""The Triton kernels in Triton's interpreter against the references: values, gradients, tokens, random bits.

fp32, fp16 and float64; the interpreter multiplies bf16 wrongly.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from triton_interpreter_worker import cases

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def problems(request: pytest.FixtureRequest) -> dict[str, str]:
    """What failed, by case, from one process for all selected cases."""
    selected = [item.callspec.params["case"] for item in request.session.items if "problems" in item.fixturenames]
    # The process tests kernels alone: no CPU module has to be there, and the launchers get CPU tensors.
    environment = {**os.environ, "TRITON_INTERPRET": "1", "LLMKERN_CPU": "off", "PYTHONPATH": str(HERE.parent)}
    run = subprocess.run(
        [sys.executable, HERE / "triton_interpreter_worker.py"],
        input="\n".join(selected),
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return {result["case"]: result["problem"] for result in map(json.loads, run.stdout.splitlines())}


@pytest.mark.parametrize("case", [name for name, _ in cases()])
def test_agrees_with_the_reference(case: str, problems: dict[str, str]) -> None:
    assert not problems[case], problems[case]
