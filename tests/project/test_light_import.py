"""Importing the package loads none of the heavy ones: checked in fresh interpreters where these cannot be imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = ("torch", "transformers", "onnx", "onnxruntime", "triton", "numpy", "safetensors", "tqdm")

BLOCK = f"""
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {HEAVY!r}:
            raise ModuleNotFoundError("blocked: " + name, name=name)

sys.meta_path.insert(0, Block())
"""


def fresh(code: str, *, blocked: bool = True, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run code in a new interpreter."""
    source = (BLOCK if blocked else "") + code
    return subprocess.run(
        [sys.executable, "-c", source], capture_output=True, text=True, timeout=120, check=False, cwd=cwd
    )


@pytest.mark.parametrize(
    "code",
    [
        "import lamp_compile",
        "import lamp_compile; assert lamp_compile.__version__",
        "import lamp_compile; assert lamp_compile.Plan(sites=()).validate()",
        "import lamp_compile; assert lamp_compile.SitePlan and lamp_compile.GuardPlan and lamp_compile.LampError",
        "import lamp_compile; assert set(lamp_compile.__all__) == set(dir(lamp_compile))",
        "import lamp_compile.cli",
        "import lamp_compile.pytest_plugin",
    ],
)
def test_light(code: str) -> None:
    done = fresh(code)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], ["run", "--help"], ["eval", "--help"], ["diff", "--help"]]
)
def test_light_cli(arguments: list[str]) -> None:
    done = fresh(
        f"import sys; sys.argv = ['lamp-compile', *{arguments!r}]\nfrom lamp_compile.cli import main\nsys.exit(main())"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


@pytest.mark.parametrize("arguments", [["doctor"], ["explain", "folder"]])
def test_a_missing_package_is_named(arguments: list[str]) -> None:
    """An interpreter without torch gets an error in words."""
    done = fresh(f"from lamp_compile.cli import main\nsys.exit(main({arguments!r}))")
    assert done.returncode == 1
    assert done.stderr.startswith("error: the package torch is not installed")
    assert "  try:   pip install" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_block_blocks() -> None:
    """Without this, a broken hook would make every test above pass."""
    done = fresh("import lamp_compile; lamp_compile.compile")
    assert done.returncode == 1
    assert "blocked: torch" in done.stderr


def test_unknown_name() -> None:
    done = fresh("import lamp_compile; lamp_compile.nonsense")
    assert "AttributeError: module 'lamp_compile' has no attribute 'nonsense'" in done.stderr


@pytest.mark.parametrize("name", ["passes", "runtime"])
def test_bare_names_are_refused(name: str, root: Path) -> None:
    """The links at the root are for reading: imported under these names they would register the operators twice."""
    done = fresh(f"import {name}", blocked=False, cwd=root)
    assert done.returncode == 1
    assert f"this package is lamp_compile.{name}, imported here as '{name}'" in done.stderr
    assert f"try:   from lamp_compile import {name}" in done.stderr


@pytest.mark.parametrize("name", ["passes", "runtime"])
def test_links(name: str, root: Path) -> None:
    link = root / name
    assert link.is_symlink()
    assert link.resolve() == root / "lamp_compile" / name
