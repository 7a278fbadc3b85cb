"""``llmkern doctor``: what is installed, what this machine can run, and which implementation of each op is live.

It says why, too, since each op always runs: where a kernel is missing its torch reference takes over.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
from typing import Any

import torch

import llmkern
from llmkern import _library

PACKAGES = ("torch", "triton", "transformers", "numpy")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="the same as one JSON object")


def run(arguments: argparse.Namespace) -> int:
    found = examine()
    print(json.dumps(found, indent=2) if arguments.json else as_text(found))
    return 0


def examine() -> dict[str, Any]:
    """All that the command prints: versions, cpu, gpu, ops."""
    gpu = _gpu()
    return {
        "versions": {
            "llmkern": llmkern.__version__,
            "python": platform.python_version(),
            **{name: _version(name) for name in PACKAGES},
        },
        "cpu": {
            "capability": torch.backends.cpu.get_cpu_capability(),
            "runnable": list(_library.supported_isas()),
            "built": _library.built_modules(),
            "in_use": _library.cpu_build.isa,
            "reason": _library.cpu_build.reason,
            "LLMKERN_CPU": os.environ.get("LLMKERN_CPU"),
            "threads": torch.get_num_threads(),
        },
        "gpu": gpu,
        "ops": {name: {"cpu": _on_cpu(name), "gpu": _on_gpu(op, gpu)} for name, op in sorted(_library.OPS.items())},
    }


def as_text(found: dict[str, Any]) -> str:
    cpu, gpu = found["cpu"], found["gpu"]
    rows = [(name, version or "not installed") for name, version in found["versions"].items()]
    rows += [
        ("CPU", f"{cpu['capability']}, runs {', '.join(cpu['runnable'])}; {cpu['threads']} threads"),
        ("CPU modules", ", ".join(cpu["built"]) or "none built"),
        ("in use", f"{cpu['in_use'] or 'torch references'}: {cpu['reason']}"),
        ("GPU", "; ".join(device["text"] for device in gpu["devices"]) or gpu["reason"]),
    ]
    lines = [f"{label:14s}{text}" for label, text in rows]
    for name, live in found["ops"].items():
        lines += ["", name]
        lines += [f"  {device.upper():12s}{one['live']}: {one['reason']}" for device, one in live.items()]
    return "\n".join(lines)


def _version(package: str) -> str | None:
    if package == "torch":
        return str(torch.__version__)
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _gpu() -> dict[str, Any]:
    if not torch.cuda.is_available():
        built_for = torch.version.cuda or torch.version.hip
        reason = "none found" if built_for else "none found (this torch is built without CUDA and ROCm)"
        return {"available": False, "reason": reason, "devices": []}
    devices = []
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        name = torch.cuda.get_device_name(index)
        text = f"cuda:{index} {name}, capability {major}.{minor}"
        devices.append({"name": name, "capability": [major, minor], "text": text})
    return {"available": True, "reason": "", "devices": devices}


def _on_cpu(name: str) -> dict[str, str]:
    build = _library.cpu_build
    if build.isa is None:
        return {"live": "torch reference", "reason": build.reason}
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"llmkern::{name}", "CPU"):
        return {"live": "torch reference", "reason": f"the {build.isa} module holds no kernel of this op"}
    return {"live": f"C++ {build.isa}", "reason": build.reason}


def _on_gpu(op: _library.Op, gpu: dict[str, Any]) -> dict[str, str]:
    try:
        installed = importlib.util.find_spec(f"llmkern.kernels.{op.stem}") is not None
    except ModuleNotFoundError:
        installed = False
    if op.gpu_problem is not None:
        live, reason = "torch reference", op.gpu_problem
    elif not installed:
        live, reason = "torch reference", f"there is no kernels/{op.stem}.py"
    elif _version("triton") is None:
        live, reason = "torch reference", "triton is not installed (pip install triton)"
    else:
        live, reason = "Triton", f"kernels/{op.stem}.py"
    if not gpu["available"]:
        return {"live": "none", "reason": f"no GPU; on one: {live} ({reason})"}
    return {"live": live, "reason": reason}
