"""What a user installs: the package and nothing else of the repository, with or without a C++ compiler."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

CORE = "lamp_compile/runtime/kernels/cpu/_core.so"
SOURCES = "lamp_compile/runtime/kernels/cpu/core"
NO_COMPILER = {"CC": "/nonexistent", "CXX": "/nonexistent", "LDSHARED": "/nonexistent"}
COMPILER = shutil.which("c++") is not None or shutil.which("g++") is not None


def tree(folder: Path, root: Path) -> Path:
    """A copy of the tree, so that nothing is left in it; without what was compiled there."""
    pytest.importorskip("setuptools", minversion="77", reason="building needs setuptools 77")
    copy = folder / "tree"
    copy.mkdir()
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(root / name, copy / name)
    for name in ("lamp_compile", "tests", "examples", "benchmarks"):
        shutil.copytree(
            root / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "*.safetensors", "results", "*.so")
        )
    for name in ("passes", "runtime"):
        (copy / name).symlink_to(Path("lamp_compile") / name)
    return copy


def build(what: str, copy: Path, **environment: str) -> Path:
    """A wheel of the tree, or the archive of its sources."""
    folder = copy.parent / what
    code = f"import setuptools.build_meta as b; b.build_{what}({str(folder)!r})"
    folder.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=copy, capture_output=True, text=True, timeout=300, check=False,
        env={**os.environ, **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (built,) = folder.iterdir()
    return built


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory, root: Path) -> Path:
    return build("sdist", tree(tmp_path_factory.mktemp("sdist"), root))


REFUSES = """#!/bin/sh
case " $* " in *openmp*) echo "unsupported option '-fopenmp'" >&2; exit 1;; esac
exec {compiler} "$@"
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory, root: Path) -> Path:
    """Built by a compiler without OpenMP, as Apple's is."""
    folder = tmp_path_factory.mktemp("wheel")
    environment = {}
    for variable, names in (("CC", ("cc", "gcc")), ("CXX", ("c++", "g++"))):
        compiler = next((found for name in names if (found := shutil.which(name))), None)
        if compiler is None:
            continue
        (folder / variable).write_text(REFUSES.format(compiler=compiler), encoding="utf-8")
        (folder / variable).chmod(0o755)
        environment[variable] = str(folder / variable)
    return build("wheel", tree(folder, root), **environment)


@pytest.fixture(scope="module")
def bare_wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the archive where there is no compiler."""
    folder = tmp_path_factory.mktemp("bare")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    (copy,) = folder.iterdir()
    return build("wheel", copy, **NO_COMPILER)


def names_of(wheel: Path) -> set[str]:
    return set(zipfile.ZipFile(wheel).namelist())


def test_contents(wheel: Path, root: Path) -> None:
    names = names_of(wheel)
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"lamp_compile"}
    sources = {
        str(path.relative_to(root)) for path in (root / "lamp_compile").rglob("*.py") if "__pycache__" not in path.parts
    }
    assert sources <= names, sources - names
    cuda = {str(path.relative_to(root)) for path in (root / "lamp_compile/runtime/kernels/cuda").iterdir()}
    assert cuda <= names, cuda - names
    assert {name for name in names if ".dist-info/" not in name} - sources - cuda <= {"lamp_compile/py.typed", CORE}
    assert "lamp_compile/py.typed" in names


def test_any_python_of_this_platform(wheel: Path) -> None:
    _, _, python, abi, platform = wheel.stem.rsplit("-", 4)
    assert (python, abi) == ("py3", "none")
    assert platform != "any"


def ask(wheel: Path, folder: Path, code: str) -> str:
    """What a program says with this wheel in front of everything else."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    environment = {key: value for key, value in os.environ.items() if key != "LAMP_CPU"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=120, check=False,
        env={**environment, "PYTHONPATH": str(folder)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


WHY = "from lamp_compile.runtime import kernels; print(kernels.__file__); print(kernels.why_not_device('cpu'))"


@pytest.mark.skipif(not COMPILER, reason="no C++ compiler")
def test_the_cpu_kernels_come_compiled(wheel: Path, tmp_path: Path) -> None:
    assert CORE in names_of(wheel)
    where, why = ask(wheel, tmp_path, WHY).splitlines()
    assert where.startswith(str(tmp_path))
    assert why == "None"


def test_without_a_compiler_it_installs_and_says_why_it_is_slow(bare_wheel: Path, tmp_path: Path) -> None:
    assert CORE not in names_of(bare_wheel)
    where, why = ask(bare_wheel, tmp_path, WHY).splitlines()
    assert where.startswith(str(tmp_path))
    assert "were not compiled" in why


def test_the_archive_has_the_sources_of_the_cpu_kernels(sdist: Path, root: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    wanted = {str(path.relative_to(root)) for path in (root / SOURCES).iterdir()}
    assert len(wanted) > 10
    assert wanted | {"setup.py", "pyproject.toml"} <= names
    assert CORE not in names


def test_metadata(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (metadata,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    text = archive.read(metadata).decode()
    assert "License-Expression: Apache-2.0" in text
    assert "Requires-Python: <3.14,>=3.11" in text
    for extra in ("hf", "kernels", "onnx-cpu", "onnx-cuda", "dev", "all"):
        assert f"Provides-Extra: {extra}\n" in text
    assert any(name.endswith("licenses/LICENSE") for name in archive.namelist())


def test_entry_points(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (entry,) = (name for name in archive.namelist() if name.endswith("entry_points.txt"))
    text = archive.read(entry).decode()
    assert "lamp-compile = lamp_compile.cli:main" in text
    assert "[torch_dynamo_backends]\nlamp = lamp_compile.torch_backend:lamp" in text
