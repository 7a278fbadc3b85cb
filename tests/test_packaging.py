"""Packaging: sdist, wheel, editable install and checkout, without network; a stand-in for csrc/ compiles at once."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from email import message_from_string
from email.message import Message
from pathlib import Path

import pytest
import torch

import llmkern
from llmkern import _library

ROOT = Path(__file__).resolve().parent.parent
# Where torch lies; interpreters started here get nothing else of this environment, not even its .pth files.
LIBRARIES = str(Path(torch.__file__).parent.parent)
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input"]
OFFLINE = ["--no-build-isolation", "--no-deps", "--no-index"]


def run(command: list[str], folder: Path, *, fails: bool = False, **variables: str) -> subprocess.CompletedProcess[str]:
    defaults = {"LLMKERN_CPU": "", "LLMKERN_BUILD_ISA": "all", "PYTHONPATH": ""}
    environment = {**os.environ, **defaults, **variables}
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert (result.returncode != 0) == fails, result.stdout + result.stderr
    return result


def python(code: str, folder: Path, first: Path) -> str:
    """What a bare interpreter prints that finds ``first`` and then torch."""
    start = f"import site, sys; sys.path[:0] = [{str(first)!r}, {LIBRARIES!r}]; site.addsitedir({str(first)!r})\n"
    return run([sys.executable, "-S", "-c", start + code], folder).stdout.strip()


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources with the stand-in for csrc/."""
    folder = tmp_path_factory.mktemp("packaging") / "checkout"
    folder.mkdir()
    for name in ("llmkern", "kernels", "tests", "bench"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.so", "__pycache__", "out"))
    for path in ROOT.iterdir():
        if path.is_file() and not path.name.startswith("."):
            shutil.copy(path, folder)
    (folder / "csrc").mkdir()
    shutil.copy(ROOT / "tests" / "stub_module.cpp", folder / "csrc" / "module.cpp")
    shutil.copy(ROOT / "csrc" / "common.h", folder / "csrc")
    return folder


@pytest.fixture(scope="module")
def unpacked_sdist(checkout: Path) -> Path:
    run([sys.executable, "setup.py", "--quiet", "sdist", "--dist-dir", "../dist"], checkout)
    shutil.unpack_archive(next((checkout.parent / "dist").glob("llmkern-*.tar.gz")), checkout.parent / "sdist")
    return next((checkout.parent / "sdist").iterdir())


@pytest.fixture(scope="module")
def wheel(unpacked_sdist: Path) -> Path:
    """Built from the sdist, so that the sdist is known to be whole."""
    target = unpacked_sdist.parent.parent / "wheel"
    run([*PIP, "wheel", *OFFLINE, "-w", str(target), "."], unpacked_sdist)
    return next(target.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path) -> Path:
    target = wheel.parent.parent / "installed"
    run([*PIP, "install", "--quiet", "--no-deps", "--no-index", "--target", str(target), str(wheel)], wheel.parent)
    return target


def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return message_from_string(archive.read(name).decode())


def modules_in(folder: str) -> set[str]:
    return {str(path.relative_to(ROOT / folder)) for path in (ROOT / folder).rglob("*.py")}


def test_sdist_holds_what_building_and_testing_need(unpacked_sdist: Path) -> None:
    for name in ("LICENSE", "CHANGELOG.md", "Makefile", "constraints.txt", "csrc/common.h", "csrc/module.cpp"):
        assert (unpacked_sdist / name).is_file(), name
    for folder in ("llmkern", "kernels", "tests", "bench"):
        for name in modules_in(folder):
            assert (unpacked_sdist / folder / name).is_file(), f"{folder}/{name}"
    assert (unpacked_sdist / "tests" / "stub_module.cpp").is_file()


def test_wheel_holds_every_module_and_nothing_beside_the_package(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert {f"llmkern/{name}" for name in modules_in("llmkern")} <= names
    assert {f"llmkern/kernels/{name}" for name in modules_in("kernels")} <= names
    assert {f"llmkern/{_library._module_path(isa).name}" for isa in _library.ISAS} <= names
    assert {name.partition("/")[0].rpartition(".")[2] for name in names} == {"llmkern", "dist-info"}
    assert any(name.endswith("/LICENSE") for name in names)


def test_version_stands_in_one_place(wheel: Path) -> None:
    assert metadata(wheel)["Version"] == llmkern.__version__
    assert llmkern.__version__ not in (ROOT / "setup.py").read_text()


def test_everything_that_the_makefile_installs_is_pinned(wheel: Path) -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pins = [re.fullmatch(r'([a-z0-9-]+)==[^;= ]+(; python_version (?:<|>=) "3\.11")?', line) for line in lines]
    assert all(pins), [line for line, pin in zip(lines, pins) if not pin]
    assert len({pin.groups() for pin in pins}) == len(lines)
    assert {"torch==2.13.0", "triton==3.7.1"} <= set(lines)
    required = metadata(wheel).get_all("Requires-Dist")
    direct = {re.match(r"[A-Za-z0-9_-]+", line)[0] for line in required if "extra" not in line or '"dev"' in line}
    assert {"torch", "transformers", "pytest", "ruff"} <= direct
    assert direct <= {pin[1] for pin in pins}


def test_installed_wheel_finds_its_kernels(installed: Path, tmp_path: Path) -> None:
    names = sorted(path.stem for path in (ROOT / "kernels").glob("*.py"))
    code = f"""
import importlib.util, llmkern
print(llmkern.__file__, llmkern._library.cpu_build.isa, sep="\\n")
print(*[importlib.util.find_spec("llmkern.kernels." + name).origin for name in {names}], sep="\\n")
"""
    file, isa, *kernels = python(code, tmp_path, installed).splitlines()
    assert file == str(installed / "llmkern" / "__init__.py")
    assert isa == _library.supported_isas()[0]
    assert kernels == [str(installed / "llmkern" / "kernels" / f"{name}.py") for name in names]


@pytest.mark.parametrize("way", ["checkout", "editable"])
def test_sources_find_their_kernels(checkout: Path, tmp_path: Path, way: str) -> None:
    first = checkout
    if way == "editable":
        prefix = tmp_path / "prefix"
        command = [*PIP, "install", "--quiet", *OFFLINE, "--ignore-installed", "--prefix", str(prefix), "-e", "."]
        run(command, checkout, LLMKERN_BUILD_ISA="none")
        first = next(prefix.glob("l*/python*/*-packages"))
    code = "import llmkern.kernels._tiles as tiles; print(tiles.__file__)"
    assert python(code, tmp_path, first) == str(checkout / "kernels" / "_tiles.py")


def test_without_a_compiler_it_installs_and_says_so_once(checkout: Path, tmp_path: Path) -> None:
    nowhere = tmp_path / "empty"
    nowhere.mkdir()
    run([*PIP, "wheel", *OFFLINE, "-w", str(tmp_path), "."], checkout, PATH=str(nowhere), CXX="")
    wheel = next(tmp_path.glob("*.whl"))
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert not [name for name in archive.namelist() if name.endswith(".so")]
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--build-lib", str(tmp_path)]
    text = run(command, checkout, PATH=str(nowhere), CXX="").stderr
    assert text.count("no C++ compiler was found") == 1


def test_without_torch_the_build_ends_with_the_line_that_helps(checkout: Path, tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError(\"No module named 'torch'\")")
    sentence = (
        "llmkern: torch cannot be imported in the build environment (No module named 'torch'); "
        "install it first, then run: pip install --no-build-isolation ."
    )
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--build-lib", str(tmp_path)]
    result = run(command, checkout, fails=True, PYTHONPATH=str(tmp_path))
    assert result.stderr.splitlines()[-1] == sentence
    command = [*PIP, "wheel", *OFFLINE, "-w", str(tmp_path), "."]
    result = run(command, checkout, fails=True, PYTHONPATH=str(tmp_path))
    assert sentence in result.stdout + result.stderr
    assert "Traceback" not in result.stdout + result.stderr


@pytest.mark.parametrize(
    ("variables", "sentence"),
    [
        ({"LLMKERN_BUILD_ISA": "sse9"}, "LLMKERN_BUILD_ISA to be all, native, none or some of"),
        ({"LLMKERN_SANITIZE": "dirt"}, "LLMKERN_SANITIZE to be address or thread, got 'dirt'"),
    ],
    ids=str,
)
def test_refuses_unknown_build_options(checkout: Path, variables: dict[str, str], sentence: str) -> None:
    result = run([sys.executable, "setup.py", "--version"], checkout, fails=True, **variables)
    assert result.stderr.startswith("llmkern: expected ")
    assert sentence in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_building_again_compiles_nothing_and_other_schemas_compile_one_file(checkout: Path, tmp_path: Path) -> None:
    (checkout / "csrc" / "other.cpp").write_text("int llmkern_other_file;\n")
    places = ["--build-lib", str(tmp_path / "lib"), "--build-temp", str(tmp_path / "temp")]
    command = [sys.executable, "setup.py", "build_ext", *places]
    schemas = checkout / "llmkern" / "ops" / "sample_mixed.py"
    before = schemas.read_text()
    try:
        assert "compile generic/other.o" in run(command, checkout, LLMKERN_BUILD_ISA="generic").stdout
        assert "compile generic" not in run(command, checkout, LLMKERN_BUILD_ISA="generic").stdout
        schemas.write_text(before.replace(" Tensor filters,", " Tensor renamed,"))
        again = run(command, checkout, LLMKERN_BUILD_ISA="generic").stdout
    finally:
        schemas.write_text(before)
        (checkout / "csrc" / "other.cpp").unlink()
    assert "compile generic/module.o" in again
    assert "compile generic/other.o" not in again
