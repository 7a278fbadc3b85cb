"""The house: every stem has its files, imports stay lean, the right CPU module loads, and refusals help."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import llmkern
from llmkern import __main__ as command_line
from llmkern import _library

ROOT = Path(__file__).resolve().parent.parent
STEMS = sorted({op.stem for op in _library.OPS.values()})

# (stem, file): the measured reason why the file is not there.
ABSENT: dict[tuple[str, str], str] = {}


def files_of(stem: str) -> dict[str, bool]:
    ops = ROOT / "llmkern" / "ops"
    found = {path: (ROOT / path).is_file() for path in (f"csrc/{stem}.cpp", f"kernels/{stem}.py", f"bench/{stem}.py")}
    found[f"tests/test_{stem}.py"] = (ROOT / "tests" / f"test_{stem}.py").is_file()
    found[f"llmkern/ops/{stem}"] = (ops / f"{stem}.py").is_file() or (ops / stem / "__init__.py").is_file()
    return found


@pytest.mark.parametrize("stem", STEMS)
def test_every_stem_has_its_files_or_a_reason(stem: str) -> None:
    for path, exists in files_of(stem).items():
        assert exists != ((stem, path) in ABSENT), f"{path}: exists is {exists}, reason: {ABSENT.get((stem, path))}"


@pytest.mark.parametrize("folder", [".", "bench", "kernels", "tests"])
def test_no_module_hides_the_standard_library(folder: str) -> None:
    names = {path.stem for path in (ROOT / folder).iterdir() if path.suffix == ".py" or path.is_dir()}
    assert not names & sys.stdlib_module_names


# Imports --------------------------------------------------------------------------------------------------------------


def python(code: str, *, path: Path = ROOT, **variables: str) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter that finds llmkern in ``path`` alone."""
    environment = {**os.environ, "PYTHONPATH": str(path), **variables}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=path, capture_output=True, text=True, timeout=120
    )


USE_THE_OPS = """
logits = [torch.tensor([[0.0, 1.0, 2.0]]), torch.tensor([[2.0, 0.0, 1.0]])]
mixed = llmkern.mix_logits(logits, [0.5, 0.5])
assert abs(mixed.exp().sum() - 1) < 1e-6
assert llmkern.sample_mixed(logits, [0.5, 0.5], temperature=0.0, seed=0)[0].tolist() == [2]
"""


def test_import_brings_neither_triton_nor_transformers() -> None:
    result = python("""
import sys, torch
before = set(sys.modules)
import llmkern, llmkern.papers.sharp
assert "convert" in dir(llmkern.papers.sharp)
print(sorted({name.partition(".")[0] for name in set(sys.modules) - before} & {"triton", "transformers", "peft"}))
""")
    assert (result.returncode, result.stdout.strip()) == (0, "[]"), result.stderr


@pytest.mark.parametrize("absent", ["triton", "transformers"])
def test_ops_and_doctor_work_without(absent: str) -> None:
    result = python(f"""
import sys
sys.modules[{absent!r}] = None
import torch, llmkern
from llmkern.__main__ import main
{USE_THE_OPS}
sys.exit(main(["doctor"]))
""")
    assert result.returncode == 0, result.stderr
    assert "sample_mixed" in result.stdout


@pytest.fixture
def bare_package(tmp_path: Path) -> Path:
    """The package without compiled modules, in a folder of its own."""
    shutil.copytree(ROOT / "llmkern", tmp_path / "llmkern", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return tmp_path


def test_without_modules_one_warning_and_all_works(bare_package: Path) -> None:
    result = python(
        f"""
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import torch, llmkern
    {USE_THE_OPS.replace(chr(10), chr(10) + "    ")}
texts = [str(one.message) for one in caught if "llmkern" in str(one.message)]
assert len(texts) == 1 and "reference" in texts[0] and "pip install" in texts[0], texts
assert llmkern.__file__.startswith({str(bare_package)!r})
""",
        path=bare_package,
        LLMKERN_CPU="",
    )
    assert result.returncode == 0, result.stderr


def test_a_stale_module_is_an_import_error_and_no_abort(bare_package: Path, stub: Stub) -> None:
    for isa in _library.supported_isas():
        shutil.copy(stub(isa, torch="1.0.0"), bare_package / "llmkern")
    result = python("import llmkern", path=bare_package, LLMKERN_CPU="")
    best = _library.supported_isas()[0]
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith(f"ImportError: llmkern: _cpu_{best}")
    assert "built for torch 1.0.0" in result.stderr


# Choice of the CPU module ---------------------------------------------------------------------------------------------


TORCH = torch.__version__.split("+")[0]


class Stub:
    """Compiles tests/stub_module.cpp with a stamp; what is not given is what the loader expects."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, module: str, **stamp: str) -> Path:
        fitting = {"torch": TORCH, "isa": module, "schemas": _library.schema_hash(), "entry": f"_cpu_{module}"}
        values = {**fitting, **stamp}
        target = self.folder / "-".join(values.values()) / _library._module_path(module).name
        if not target.exists():
            target.parent.mkdir()
            macros = [f"-DLLMKERN_{name.upper()}={value}" for name, value in values.items()]
            flags = ["-shared", "-fPIC", f"-I{sysconfig.get_path('include')}", *macros, "-o", str(target)]
            source = str(ROOT / "tests" / "stub_module.cpp")
            subprocess.run([os.environ.get("CXX", "c++"), *flags, source], check=True)
        return target


@pytest.fixture(scope="session")
def stub(tmp_path_factory: pytest.TempPathFactory) -> Stub:
    return Stub(tmp_path_factory.mktemp("stubs"))


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder in which the loader looks for modules, with the loader's state put back afterwards."""
    names = [f"llmkern._cpu_{isa}" for isa in _library.ISAS]
    kept = {name: sys.modules.pop(name) for name in names if name in sys.modules}
    monkeypatch.setattr(_library, "__file__", str(tmp_path / "_library.py"))
    monkeypatch.setattr(_library, "cpu_build", _library.CpuBuild(None, "not loaded yet", {}))
    monkeypatch.setattr(llmkern, "__path__", [str(tmp_path)])
    monkeypatch.delenv("LLMKERN_CPU", raising=False)
    yield tmp_path
    for name in names:
        sys.modules.pop(name, None)
    sys.modules.update(kept)


def test_the_best_module_of_this_host_is_taken(modules: Path, stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    runnable = _library.supported_isas()
    for isa in reversed(runnable):
        shutil.copy(stub(isa), modules)
        _library.load_cpu_module()
        assert _library.cpu_build.isa == isa == _library.cpu_build.info["isa"]
    assert ", ".join(runnable) in _library.cpu_build.reason


@pytest.mark.parametrize("wish", _library.supported_isas())
def test_llmkern_cpu_names_the_module(modules: Path, stub: Stub, monkeypatch: pytest.MonkeyPatch, wish: str) -> None:
    for isa in _library.supported_isas():
        shutil.copy(stub(isa), modules)
    monkeypatch.setenv("LLMKERN_CPU", wish.upper())
    _library.load_cpu_module()
    assert (_library.cpu_build.isa, _library.cpu_build.reason) == (wish, "LLMKERN_CPU")


def test_llmkern_cpu_off_loads_nothing(modules: Path, stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copy(stub("generic"), modules)
    monkeypatch.setenv("LLMKERN_CPU", "off")
    _library.load_cpu_module()
    assert (_library.cpu_build.isa, _library.cpu_build.reason) == (None, "LLMKERN_CPU=off")


def refusal() -> str:
    with pytest.raises(ImportError) as caught:
        _library.load_cpu_module()
    text = str(caught.value)
    assert text.startswith("llmkern: ")
    assert "\n" not in text
    assert _library.cpu_build.isa is None
    return text


def test_refuses_an_unknown_name(modules: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMKERN_CPU", "sse9")
    assert "expected LLMKERN_CPU to be one of avx512, avx2, generic or off, got 'sse9'" in refusal()


def test_refuses_what_the_host_cannot_run(modules: Path, stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copy(stub("avx512"), modules)
    monkeypatch.setattr(_library, "supported_isas", lambda: ("avx2", "generic"))
    monkeypatch.setenv("LLMKERN_CPU", "avx512")
    assert "LLMKERN_CPU=avx512, but this host runs only avx2, generic" in refusal()


def test_refuses_a_named_module_that_is_not_built(modules: Path, stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    other = shutil.copy(stub("avx2"), modules)
    monkeypatch.setenv("LLMKERN_CPU", "generic")
    text = refusal()
    assert "expected the CPU module _cpu_generic." in text
    assert f"found only {Path(other).name}" in text
    assert _library.rebuild_command() in text


def test_refuses_modules_of_another_python_only(modules: Path) -> None:
    (modules / "_cpu_generic.cpython-39-x86_64-linux-gnu.so").touch()
    text = refusal()
    assert "found only _cpu_generic.cpython-39-x86_64-linux-gnu.so" in text
    assert _library._module_path(_library.supported_isas()[0]).name in text
    assert _library.rebuild_command() in text


@pytest.mark.parametrize("stamp", [{"torch": "1.13.1"}, {"schemas": "0123456789abcdef"}, {"isa": "avx2"}], ids=str)
def test_refuses_a_stale_module(modules: Path, stub: Stub, stamp: dict[str, str]) -> None:
    shutil.copy(stub("generic", **stamp), modules)
    built = {"torch": TORCH, "isa": "generic", "schemas": _library.schema_hash(), **stamp}
    wanted = {"torch": _library._release(TORCH), "isa": "generic", "schemas": _library.schema_hash()}
    text = refusal()
    for said, info in (("was built for", built), ("needed is one for", wanted)):
        assert f"{said} torch {info['torch']}, {info['isa']}, schemas {info['schemas']}" in text
    assert text.endswith(_library.rebuild_command())


def test_refuses_a_module_that_does_not_load_but_reads_its_stamp(modules: Path, stub: Stub) -> None:
    shutil.copy(stub("generic", entry="_another_name", torch="9.9.9"), modules)
    text = refusal()
    assert "was built for torch 9.9.9, generic" in text
    assert "PyInit__cpu_generic" in text


def test_refuses_a_file_that_is_no_library(modules: Path) -> None:
    _library._module_path("generic").write_text("not a library")
    text = refusal()
    assert "no build stamp" in text
    assert "does not load" in text
    assert text.endswith(_library.rebuild_command())


def test_a_module_fits_every_patch_release_of_torch(modules: Path, stub: Stub) -> None:
    major, minor, _ = TORCH.split(".")
    shutil.copy(stub("generic", torch=f"{major}.{minor}.99"), modules)
    _library.load_cpu_module()
    assert _library.cpu_build.isa == "generic"


# The command line -----------------------------------------------------------------------------------------------------


def test_refusals_end_a_command_with_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(arguments: object) -> int:
        raise _library.bad_value("doctor", "a patient", "nobody", "send one")

    monkeypatch.setattr("llmkern.doctor.run", refuse)
    assert command_line.main(["doctor"]) == 2
    assert capsys.readouterr().err == "doctor: expected a patient, got nobody; send one\n"


def test_faults_of_ours_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(arguments: object) -> int:
        raise ValueError("too many values to unpack")

    monkeypatch.setattr("llmkern.doctor.run", fail)
    with pytest.raises(ValueError, match="unpack"):
        command_line.main(["doctor"])


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.setattr("llmkern.doctor.run", lambda arguments: __import__("transformers"))
    assert command_line.main(["doctor"]) == 2
    error = capsys.readouterr().err
    assert "expected the package transformers, got none" in error
    assert "pip install" in error


@pytest.mark.parametrize("argv", [[], ["nonsense"], ["doctor", "--nonsense"]], ids=str)
def test_bad_command_lines_exit_with_status_2(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        command_line.main(argv)
    assert caught.value.code == 2
    assert "usage: llmkern" in capsys.readouterr().err
