"""Every Triton kernel, in every configuration of its AOT list, compiled for NVIDIA and AMD GPUs; no GPU is needed."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

KERNELS = Path(__file__).parent.parent / "kernels"
PTXAS = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
# Target, bytes of shared memory that one program may use.
TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), 163 * 1024),
    "sm_90": (GPUTarget("cuda", 90, 32), 227 * 1024),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 64 * 1024),
}
# Scalars that do not fit the 102 scalar registers of gfx942 go to lanes of a vector register: a move, no access to
# memory. Vector registers must not spill at all.
SCALAR_SPILLS = 102


def module_of(path: Path) -> Any:
    return importlib.import_module(f"llmkern.kernels.{path.stem}")


def entries() -> list[Any]:
    """(kernel, signature, constants, warps, stages), and the targets if not all, with each of its targets."""
    return [
        pytest.param(entry[:5], target, id=f"{path.stem}-{number}-{entry[0].__name__}-{target}")
        for path in sorted(KERNELS.glob("*.py"))
        for number, entry in enumerate(getattr(module_of(path), "AOT", []))
        for target in (entry[5] if len(entry) > 5 else TARGETS)
    ]


@pytest.mark.parametrize("path", sorted(KERNELS.glob("*.py")), ids=lambda path: path.name)
def test_every_kernel_is_in_an_aot_list(path: Path) -> None:
    functions = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)]
    kernels = {node.name for node in functions if node.name.endswith("_kernel")}
    compiled = {entry[0].__name__ for entry in getattr(module_of(path), "AOT", [])}
    assert kernels == compiled
    assert kernels or path.name.startswith("_"), "a file without a kernel holds device functions: _<name>.py"


@pytest.mark.parametrize(("entry", "target"), entries())
def test_compiles_within_the_limits_of(entry: tuple[Any, ...], target: str, tmp_path: Path) -> None:
    kernel, signature, constants, warps, stages = entry
    gpu, shared_limit = TARGETS[target]
    compiled = triton.compile(
        ASTSource(kernel, signature, constants), target=gpu, options={"num_warps": warps, "num_stages": stages}
    )
    assert compiled.metadata.shared <= shared_limit
    if gpu.backend == "hip":
        spills = dict(re.findall(r"\.(\w+_spill_count):\s+(\d+)", compiled.asm["amdgcn"]))
        assert int(spills["vgpr_spill_count"]) == 0
        assert int(spills["sgpr_spill_count"]) <= SCALAR_SPILLS
    else:
        ptx = tmp_path / "kernel.ptx"
        ptx.write_text(compiled.asm["ptx"])
        chip = re.search(r"\.target\s+(\w+)", compiled.asm["ptx"])[1]
        command = [PTXAS, "-v", f"-arch={chip}", ptx, "-o", tmp_path / "kernel.cubin"]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        spills = [int(size) for size in re.findall(r"(\d+) bytes spill", report)]
        assert spills, report
        assert not any(spills), report
