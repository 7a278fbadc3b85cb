"""Builds csrc/ into one extension module per instruction set, and maps kernels/ to llmkern.kernels.

LLMKERN_BUILD_ISA names the modules to build: all (default), native (what this host would load), none, or some of
generic,avx2,avx512. LLMKERN_SANITIZE=address|thread adds a sanitizer, MAX_JOBS limits the parallel compilers. Without a
C++ compiler nothing is built, and the library runs on its torch references.
"""

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from unittest.mock import patch

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

HERE = Path(__file__).resolve().parent
ISA_FLAGS = {
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx2", "-mfma", "-mf16c"],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "generic": [],
}
if platform.machine() not in ("x86_64", "AMD64"):
    ISA_FLAGS = {"generic": []}
# torch's name for the same choice: its Vectorized class is compiled for CPU_CAPABILITY.
CAPABILITY = {"generic": "DEFAULT", "avx2": "AVX2", "avx512": "AVX512"}
# What makes fused multiply-adds of products and sums, without which logits would round otherwise than torch's.
FUSED = "-fexpensive-optimizations"
SANITIZE = {
    "": ["-O3", "-DNDEBUG"],
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-O1", FUSED, "-g"],
    "thread": ["-fsanitize=thread", "-O1", FUSED, "-g"],
}


def fail(sentence):
    sys.exit(f"llmkern: {sentence}")


def import_torch():
    try:
        import torch
    except (ImportError, OSError) as error:
        fail(
            f"torch cannot be imported in the build environment ({error}); install it first, then run: "
            "pip install --no-build-isolation ."
        )
    return torch


def compiler():
    """The C++ compiler as a list of words, or None."""
    words = shlex.split(os.environ.get("CXX", ""))
    for candidate in [words] if words else (["g++"], ["c++"], ["clang++"]):
        if shutil.which(candidate[0]):
            return candidate
    return None


def missing_for_build():
    """What keeps this machine from building modules, or an empty string."""
    if compiler() is None:
        return f"no C++ compiler was found ({os.environ.get('CXX') or 'g++, c++, clang++ or $CXX'})"
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        return "the header Python.h was not found (Debian and Ubuntu have it in python3-dev)"
    return ""


def isas_of(wish):
    """Modules that LLMKERN_BUILD_ISA asks for."""
    if wish in ("all", "native"):
        return list(ISA_FLAGS)
    isas = [] if wish == "none" else wish.split(",")
    if not set(isas) <= set(ISA_FLAGS):
        fail(f"expected LLMKERN_BUILD_ISA to be all, native, none or some of {','.join(ISA_FLAGS)}, got {wish!r}")
    return isas


def schema_hash():
    """The hash that the loader will compare, from the schemas as Python defines them."""
    with patch.dict(os.environ, LLMKERN_CPU="off"), patch.object(sys, "path", [str(HERE), *sys.path]):
        import llmkern._library

        return llmkern._library.schema_hash()


def ninja_text(torch, modules, objects):
    """The build as one ninja file, so that all modules compile in parallel and only what changed compiles again.

    modules: {isa: file to make}. The hash of the schemas goes to module.cpp alone.
    Modules leave OpenMP to the library that torch loads: linked to another copy they would have threads of their own,
    which torch.set_num_threads does not reach.
    """
    from torch.utils.cpp_extension import include_paths, library_paths

    includes = [*include_paths(), sysconfig.get_path("include")]
    sanitize = SANITIZE[os.environ.get("LLMKERN_SANITIZE", "")]
    compile_flags = [
        "-std=c++20 -fPIC -fopenmp -fvisibility=hidden -Wall -Wno-unknown-pragmas",
        # GCC warns here of its own intrinsics and of torch's containers, a hundred times.
        "-Wno-uninitialized -Wno-maybe-uninitialized",
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
        # Headers of torch are system headers, which ninja does not follow: its version in the flags stands for them.
        f"-DLLMKERN_TORCH={torch.__version__.split('+')[0]}",
        *sanitize,
        *(["-fno-omit-frame-pointer"] if "-g" in sanitize else []),
        *(f"-isystem {shlex.quote(path)}" for path in includes),
    ]
    link_flags = [
        *(flag for flag in sanitize if flag.startswith("-fsanitize")),
        *(f"-L{shlex.quote(path)}" for path in library_paths()),
        "-lc10 -ltorch_cpu -ltorch -ltorch_python",
        *([] if "-g" in sanitize else ["-s"]),
    ]
    schemas = f"-DLLMKERN_SCHEMAS={schema_hash()}"
    lines = [
        f"cxx = {shlex.join(compiler())}",
        f"flags = {' '.join(compile_flags)}",
        f"ldflags = {' '.join(link_flags)}",
        "rule compile",
        "  command = $cxx -MMD -MF $out.d $flags $isa $schemas -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = compile $out",
        "rule link",
        "  command = $cxx -shared $in -o $out $ldflags",
        "  description = link $out",
    ]
    for isa, target in modules.items():
        macros = f"-DCPU_CAPABILITY={CAPABILITY[isa]} -DCPU_CAPABILITY_{CAPABILITY[isa]} -DLLMKERN_ISA={isa}"
        made = []
        for source in sorted((HERE / "csrc").glob("*.cpp")):
            made.append(f"{isa}/{source.stem}.o")
            lines += [
                f"build {made[-1]}: compile {ninja_path(source)}",
                f"  isa = {' '.join(ISA_FLAGS[isa])} {macros} -DLLMKERN_MODULE=_cpu_{isa}",
                f"  schemas = {schemas if source.stem == 'module' else ''}",
            ]
        lines.append(f"build {ninja_path(target)}: link {' '.join(made)}")
    (objects / "build.ninja").write_text("\n".join(lines) + "\n")


def ninja_path(path):
    return re.sub(r"([ :$])", r"$\1", str(path))


class BuildModules(build_ext):
    """build_ext by ninja; torch is imported when compiling starts, so that metadata and sdist do not need it."""

    def run(self):
        if missing_for_build():
            print(f"llmkern: {missing_for_build()}; going on without compiled kernels", file=sys.stderr)
        if os.environ.get("LLMKERN_BUILD_ISA") == "native" and self.extensions:
            capability = import_torch().backends.cpu.get_cpu_capability()
            native = next((isa for isa, name in CAPABILITY.items() if name == capability), "generic")
            self.extensions = [ext for ext in self.extensions if ext.name == f"llmkern._cpu_{native}"]
        super().run()

    def build_extensions(self):
        torch = import_torch()
        ninja = shutil.which("ninja") or shutil.which("ninja", path=sysconfig.get_path("scripts"))
        if ninja is None:
            fail("ninja was not found; install it first: pip install ninja")
        objects = HERE / self.build_temp
        objects.mkdir(parents=True, exist_ok=True)
        modules = {ext.name.rpartition("_cpu_")[2]: HERE / self.get_ext_fullpath(ext.name) for ext in self.extensions}
        ninja_text(torch, modules, objects)
        jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        if subprocess.run([ninja, "-C", str(objects), *jobs]).returncode:
            fail("a C++ kernel does not compile (see above); LLMKERN_BUILD_ISA=none installs without compiled kernels")


wish = os.environ.get("LLMKERN_BUILD_ISA", "all")
if os.environ.get("LLMKERN_SANITIZE", "") not in SANITIZE:
    fail(f"expected LLMKERN_SANITIZE to be address or thread, got {os.environ['LLMKERN_SANITIZE']!r}")
sources = sorted(str(path.relative_to(HERE)) for path in (HERE / "csrc").glob("*.cpp"))
isas = isas_of(wish) if sources and not missing_for_build() else []

HF = ["transformers>=5", "peft>=0.18", "safetensors", "accelerate"]
TRL = [*HF, "trl"]
SELECT = ["pyarrow", "rich", "matplotlib", "scipy"]
RAY = [*SELECT, "ray"]
DEMO = [*HF, "rich", "matplotlib", "scikit-learn"]
TOOLS = ["triton", "setuptools>=77", "ninja", "build", "ruff", "mypy", "clang-format"]
TEST = ["pytest", "pytest-benchmark", "hypothesis", "scipy"]

setup(
    name="llmkern",
    version=re.search(r'^__version__ = "(.*)"$', (HERE / "llmkern" / "__init__.py").read_text(), re.M)[1],
    description="C++ and Triton kernels for language and vision-language models, as differentiable torch ops",
    long_description=(HERE / "README.md").read_text() if (HERE / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=[*find_packages(include=["llmkern", "llmkern.*"]), "llmkern.kernels"],
    package_dir={"llmkern.kernels": "kernels"},
    include_package_data=True,
    install_requires=["torch>=2.11,<2.14", "numpy"],
    extras_require={
        "hf": HF,
        "trl": TRL,
        "select": SELECT,
        "ray": RAY,
        "demo": DEMO,
        "test": TEST,
        "dev": [
            *DEMO,
            *TRL,
            *RAY,
            *TEST,
            "triton",
            "setuptools>=77",
            "ninja",
            "build",
            "ruff",
            "mypy",
            "clang-format",
        ],
    },
    entry_points={"console_scripts": ["llmkern=llmkern.__main__:main"]},
    ext_modules=[Extension(f"llmkern._cpu_{isa}", sources=sources, language="c++") for isa in isas],
    cmdclass={"build_ext": BuildModules},
)
