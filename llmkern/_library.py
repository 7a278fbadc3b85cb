"""The machinery of every operation: definition, choice of the CPU module, refusal of bad input.

A call goes from the public function to ``torch.ops.llmkern.<op>``. The dispatcher then takes, by device, the C++ kernel
of the module loaded here, the Triton kernel of ``kernels/<stem>.py`` (imported on the first such call), or the plain
torch reference that every op is defined with.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import re
import sysconfig
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

ISAS = ("avx512", "avx2", "generic")

_CAPABILITY_TO_ISAS = {"AVX512": ISAS, "AVX2": ISAS[1:]}
_library = torch.library.Library("llmkern", "FRAGMENT")


@dataclass
class Op:
    """One registered operation: what it is called, how it is typed, and which file holds its Triton kernel."""

    name: str
    schema: str
    reference: Callable[..., Any]
    stem: str
    gpu_problem: str | None = field(default=None)


@dataclass
class CpuBuild:
    """The CPU module in use, or why there is none."""

    isa: str | None
    reason: str
    info: dict[str, str]


OPS: dict[str, Op] = {}
cpu_build = CpuBuild(None, "not loaded yet", {})


# Definition -----------------------------------------------------------------------------------------------------------


def define_op(name: str, schema: str, *, stem: str, reference: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Define ``llmkern::<name>``: the schema, the reference that serves every device, and the shape function.

    ``llmkern.kernels.<stem>`` is to hold a function ``<name>`` of the same arguments for CUDA and ROCm tensors.
    """
    op = OPS[name] = Op(name, schema, reference, stem)
    _library.define(name + schema)
    _library.impl(name, reference, "CompositeExplicitAutograd")
    _library.impl(name, lambda *args: _call_gpu(op, args), "CUDA")
    torch.library.register_fake(f"llmkern::{name}", fake, lib=_library)


def schema_hash() -> str:
    """Short hash of all schemas; a CPU module built for other schemas is refused."""
    text = "\n".join(op.name + op.schema for op in sorted(OPS.values(), key=lambda op: op.name))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _call_gpu(op: Op, args: tuple[Any, ...]) -> Any:
    if op.gpu_problem is None:
        try:
            return getattr(importlib.import_module(f"llmkern.kernels.{op.stem}"), op.name)(*args)
        except ModuleNotFoundError as error:
            if error.name is None or error.name.partition(".")[0] != "triton":
                raise
            op.gpu_problem = "triton is not installed (pip install triton)"
            warnings.warn(f"llmkern: {op.name} runs on its torch reference: {op.gpu_problem}", stacklevel=2)
    return op.reference(*args)


# Choice of the CPU module ---------------------------------------------------------------------------------------------


def supported_isas() -> tuple[str, ...]:
    """Instruction sets of this host for which a module may exist, best first."""
    return _CAPABILITY_TO_ISAS.get(torch.backends.cpu.get_cpu_capability(), ISAS[2:])


def load_cpu_module() -> None:
    """Load the best CPU module of this host, or the one that ``LLMKERN_CPU`` names, and register its kernels.

    Without any module the references serve, and one warning says so. A module that does not fit raises ImportError.
    """
    wish = os.environ.get("LLMKERN_CPU", "").lower()
    if wish == "off":
        cpu_build.reason = "LLMKERN_CPU=off"
        return
    if wish and wish not in ISAS:
        raise ImportError(f"llmkern: expected LLMKERN_CPU to be one of {', '.join(ISAS)} or off, got {wish!r}")
    runnable = supported_isas()
    if wish and wish not in runnable:
        raise ImportError(
            f"llmkern: LLMKERN_CPU={wish}, but this host runs only {', '.join(runnable)}; unset it or name one of these"
        )
    for isa in [wish] if wish else runnable:
        path = _module_path(isa)
        if path.exists():
            _register(isa, path)
            return
    _report_missing(wish)


def built_modules() -> list[str]:
    """File names of the CPU modules that lie beside this file, for whatever Python they were built."""
    return sorted(path.name for path in Path(__file__).parent.glob("_cpu_*.so"))


def rebuild_command() -> str:
    """What mends or adds CPU modules: in a checkout they lie beside the package, else they came with it."""
    root = Path(__file__).resolve().parent.parent
    if (root / "setup.py").exists():
        return f"cd {root} && python setup.py build_ext --inplace"
    return "pip install --no-build-isolation --force-reinstall --no-deps PATH, with PATH a checkout of llmkern"


def _report_missing(wish: str) -> None:
    built = built_modules()
    found = f"found only {', '.join(built)}" if built else "none is built"
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    if wish or any(not name.endswith(suffix) for name in built):
        wanted = f"_cpu_{wish or supported_isas()[0]}{suffix}"
        raise ImportError(
            f"llmkern: expected the CPU module {wanted} in {Path(__file__).parent}, {found}; build it with: "
            f"{rebuild_command()} (LLMKERN_CPU=off runs on the torch references instead)"
        )
    cpu_build.reason = f"no CPU module for {' or '.join(supported_isas())} is built"
    warnings.warn(
        f"llmkern: {cpu_build.reason}, so every op runs on its slower torch reference; with a C++ compiler installed, "
        f"build one with: {rebuild_command()}",
        stacklevel=3,
    )


def _module_path(isa: str) -> Path:
    return Path(__file__).parent / f"_cpu_{isa}{sysconfig.get_config_var('EXT_SUFFIX')}"


def _release(version: str) -> str:
    """Major and minor number: within these torch keeps its binary interface."""
    return ".".join(version.split("+")[0].split(".")[:2])


def _register(isa: str, path: Path) -> None:
    expected = {"torch": _release(torch.__version__), "isa": isa, "schemas": schema_hash()}
    try:
        module: ModuleType = importlib.import_module(f"llmkern.{path.name.partition('.')[0]}")
    except ImportError as error:
        raise ImportError(_stale(path, _read_stamp(path), expected, f" and does not load ({error})")) from error
    info = dict(module.build_info())
    if any(_comparable(key, info.get(key, "")) != value for key, value in expected.items()):
        raise ImportError(_stale(path, info, expected))
    module.register_ops()
    cpu_build.isa, cpu_build.info = isa, info
    cpu_build.reason = "LLMKERN_CPU" if os.environ.get("LLMKERN_CPU") else f"best of {', '.join(supported_isas())}"


def _comparable(key: str, value: str) -> str:
    return _release(value) if key == "torch" else value


def _stale(path: Path, built: dict[str, str], found: dict[str, str], problem: str = "") -> str:
    def describe(info: dict[str, str]) -> str:
        if not info:
            return "an unknown purpose (it has no build stamp)"
        return f"torch {info.get('torch', '?')}, {info.get('isa', '?')}, schemas {info.get('schemas', '?')}"

    return (
        f"llmkern: {path.name} was built for {describe(built)}{problem}, but needed is one for {describe(found)}; "
        f"rebuild with: {rebuild_command()}"
    )


def _read_stamp(path: Path) -> dict[str, str]:
    """Build stamp of a module that does not load, read from its bytes."""
    match = re.search(rb"llmkern-build:torch=([^;\0]*);isa=([^;\0]*);schemas=([^;\0]*);", path.read_bytes())
    return dict(zip(("torch", "isa", "schemas"), (group.decode() for group in match.groups()))) if match else {}


# Refusal of bad input -------------------------------------------------------------------------------------------------


def bad_value(op: str, expected: str, got: object, fix: str = "") -> ValueError:
    """The one form of a refusal: what was expected, what came, what to do."""
    return ValueError(_sentence(op, expected, got, fix))


def has_values(tensor: Tensor) -> bool:
    """Whether one can look at its numbers; not while the compiler traces, nor under FakeTensorMode."""
    return not torch.compiler.is_compiling() and not isinstance(tensor, FakeTensor)


def bad_type(op: str, expected: str, got: object, fix: str = "") -> TypeError:
    return TypeError(_sentence(op, expected, got, fix))


def _sentence(op: str, expected: str, got: object, fix: str) -> str:
    return f"{op}: expected {expected}, got {got}" + (f"; {fix}" if fix else "")
