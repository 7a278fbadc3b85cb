"""Builds csrc/ into one extension module per instruction set, and maps kernels/ to llmkern.kernels.

LLMKERN_BUILD_ISA names the modules to build: all (default), native (what this host would load), or a comma-separated
list of generic, avx2, avx512. LLMKERN_SANITIZE=address|thread adds the sanitizer. Without a C++ compiler nothing is
built, and the library runs on its torch references.
"""

import os
import shutil
import sys
from pathlib import Path

from setuptools import Extension, setup

HERE = Path(__file__).parent
ISA_FLAGS = {
    "generic": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx2", "-mfma", "-mf16c"],
}
CAPABILITY = {"generic": "DEFAULT", "avx2": "AVX2", "avx512": "AVX512"}
SANITIZE = {
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer", "-g"],
    "thread": ["-fsanitize=thread", "-g"],
}


def import_torch():
    try:
        import torch
    except ImportError as error:
        sys.exit(
            f"llmkern: torch cannot be imported in the build environment ({error}); install it first, then run: "
            "pip install --no-build-isolation ."
        )
    return torch


def schema_hash():
    """The hash that the loader will compare, from the schemas as Python defines them."""
    os.environ["LLMKERN_CPU"] = "off"
    sys.path.insert(0, str(HERE))
    import llmkern._library

    return llmkern._library.schema_hash()


def isas_to_build():
    wish = os.environ.get("LLMKERN_BUILD_ISA", "all")
    if wish == "all":
        return list(ISA_FLAGS)
    if wish == "native":
        capability = import_torch().backends.cpu.get_cpu_capability()
        return [{"AVX512": "avx512", "AVX2": "avx2"}.get(capability, "generic")]
    isas = wish.split(",")
    unknown = [isa for isa in isas if isa not in ISA_FLAGS]
    if unknown:
        sys.exit(f"llmkern: expected LLMKERN_BUILD_ISA to be all, native or among {', '.join(ISA_FLAGS)}, got {wish!r}")
    return isas


def extensions(torch):
    from torch.utils.cpp_extension import include_paths, library_paths

    sanitize = SANITIZE.get(os.environ.get("LLMKERN_SANITIZE", ""), [])
    hash_ = schema_hash()
    made = []
    for isa in isas_to_build():
        macros = [
            ("CPU_CAPABILITY", CAPABILITY[isa]),
            (f"CPU_CAPABILITY_{CAPABILITY[isa]}", None),
            ("LLMKERN_ISA", isa),
            ("LLMKERN_TORCH", torch.__version__.split("+")[0]),
            ("LLMKERN_SCHEMAS", hash_),
            ("LLMKERN_MODULE", f"_cpu_{isa}"),
        ]
        made.append(
            Extension(
                f"llmkern._cpu_{isa}",
                sources=sorted(str(path.relative_to(HERE)) for path in (HERE / "csrc").glob("*.cpp")),
                depends=[*map(str, sorted((HERE / "csrc").glob("*.h"))), *map(str, sorted(HERE.glob("llmkern/ops/**/*.py")))],
                include_dirs=include_paths(),
                library_dirs=library_paths(),
                libraries=["c10", "torch_cpu", "torch", "torch_python"],
                define_macros=macros,
                extra_compile_args=["-std=c++20", "-O3", "-fopenmp", "-Wall", "-Wno-unknown-pragmas", *ISA_FLAGS[isa], *sanitize],
                extra_link_args=[*sanitize, *([] if sanitize else ["-s"])],
                language="c++",
            )
        )
    return made


def command_classes():
    from torch.utils.cpp_extension import BuildExtension

    class BuildPerIsa(BuildExtension):
        """ninja's objects are named after the source alone, so each instruction set needs a folder of its own."""

        def build_extension(self, ext):
            shared = self.build_temp
            self.build_temp = str(Path(shared) / ext.name.rpartition(".")[2])
            try:
                super().build_extension(ext)
            finally:
                self.build_temp = shared

    return {"build_ext": BuildPerIsa}


def has_compiler():
    return shutil.which(os.environ.get("CXX", "g++").split()[0]) is not None or shutil.which("c++") is not None


BUILDING = any(command in sys.argv for command in ("build_ext", "bdist_wheel", "editable_wheel", "develop", "install", "build"))
native = {}
if BUILDING and not has_compiler():
    print("llmkern: no C++ compiler found (g++, c++ or $CXX); installing without compiled kernels", file=sys.stderr)
elif BUILDING:
    native = {"ext_modules": extensions(import_torch()), "cmdclass": command_classes()}

HF = ["transformers>=5", "peft>=0.18", "safetensors", "accelerate"]
DEMO = ["rich", "matplotlib", "scikit-learn"]

setup(
    name="llmkern",
    version="0.1.0",
    description="C++ and Triton kernels for language and vision-language models, as differentiable torch ops",
    long_description=(HERE / "README.md").read_text() if (HERE / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=[
        "llmkern",
        "llmkern.ops",
        "llmkern.ops.mix_logits",
        "llmkern.kernels",
    ],
    package_dir={"llmkern.kernels": "kernels"},
    install_requires=["torch>=2.11,<2.14", "numpy"],
    extras_require={
        "hf": HF,
        "demo": [*HF, *DEMO],
        "test": ["pytest", "pytest-benchmark", "hypothesis", "scipy"],
    },
    entry_points={"console_scripts": ["llmkern=llmkern.__main__:main"]},
    **native,
)
