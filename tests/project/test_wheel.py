"""What a user installs: the package and nothing else of the repository."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory, root: Path) -> Path:
    """A wheel built from a copy of the tree, so that nothing is left in it."""
    pytest.importorskip("setuptools", minversion="77", reason="building needs setuptools 77")
    folder = tmp_path_factory.mktemp("wheel")
    copy = folder / "tree"
    copy.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(root / name, copy / name)
    for name in ("lamp_compile", "tests", "examples", "benchmarks"):
        shutil.copytree(
            root / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "*.safetensors", "results")
        )
    for name in ("passes", "runtime"):
        (copy / name).symlink_to(Path("lamp_compile") / name)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(folder),
        ".",
    ]
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    (built,) = folder.glob("*.whl")
    return built


def test_contents(wheel: Path, root: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"lamp_compile"}
    sources = {
        str(path.relative_to(root)) for path in (root / "lamp_compile").rglob("*.py") if "__pycache__" not in path.parts
    }
    assert sources <= set(names), sources - set(names)
    assert "lamp_compile/py.typed" in names


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
