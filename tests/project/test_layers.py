"""Who may import whom. The contracts are in pyproject.toml; import-linter reads the sources, functions included."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import lamp_compile

PACKAGE = Path(lamp_compile.__file__).parent
PLUGINS = ("runtime/formats", "runtime/lookahead", "passes/patterns", "backends")


def test_contracts(root: Path) -> None:
    pytest.importorskip("importlinter", reason="the contracts are read by import-linter (extra: dev)")
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as c; c()", "--no-cache"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert ", 0 broken" in done.stdout


def imports(source: str, package: str) -> set[str]:
    """Absolute names of all modules a source text imports, wherever in the text."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, *([base] if base else [])])
            found |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
    return found


@pytest.mark.parametrize("folder", PLUGINS)
def test_plugins_stand_alone(folder: str) -> None:
    """A plug-in file imports its `_base` (and other underscored files) and never another plug-in."""
    package = "lamp_compile." + folder.replace("/", ".")
    files = [path for path in sorted((PACKAGE / folder).glob("*.py")) if not path.name.startswith("_")]
    assert files, f"no plug-in in {folder}"
    names = {f"{package}.{path.stem}" for path in files}
    for path in files:
        others = imports(path.read_text(), package) & (names - {f"{package}.{path.stem}"})
        assert not others, f"{path.name} imports {others}"


@pytest.mark.parametrize(
    ("folder", "above", "allowed"),
    [
        ("runtime/formats", "runtime", set()),
        ("runtime/kernels", "runtime", {"lamp_compile.runtime.rotation", "lamp_compile.runtime.layout"}),
        ("passes/patterns", "passes", set()),
    ],
)
def test_inner_folders_know_nothing_of_their_users(folder: str, above: str, allowed: set[str]) -> None:
    """Formats import no other part of the runtime, kernels only the rotation's matrix and how planes lie, patterns none
    of the passes."""
    package = "lamp_compile." + folder.replace("/", ".")
    for path in sorted((PACKAGE / folder).glob("*.py")):
        outside = {
            name
            for name in imports(path.read_text(), package) - allowed
            if name.startswith(f"lamp_compile.{above}.") and not f"{name}.".startswith(f"{package}.")
        }
        assert not outside, f"{path.name} imports {outside}"


def test_runtime_never_imports_passes() -> None:
    """A compiled model runs without the compiler: in a fresh interpreter the operators load no pass."""
    code = (
        "import sys, lamp_compile.runtime.ops as _\nassert not [m for m in sys.modules if 'lamp_compile.passes' in m]"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


def test_all_but_the_kernels_works_without_triton() -> None:
    code = (
        "import sys\nsys.modules['triton'] = None\n"
        "import torch, lamp_compile.runtime.fused_ops as _\nfrom lamp_compile.runtime import kernels\n"
        "assert kernels.why_not_device('cuda') == 'triton is not installed'\n"
        "assert 'CUDA' in kernels.why_not_device('meta')\n"
        "assert kernels.why_not_device('cpu') == kernels.cpu.why_not()\n"
        "assert torch.ops.lamp.fused_attention and torch.ops.lamp.append\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


def test_the_reader_of_imports_reads() -> None:
    text = "def f():\n    from . import fp8\n    import a.b\nfrom .._x import y"
    assert imports(text, "p.q.r") == {"p.q.r", "p.q.r.fp8", "a.b", "p.q._x", "p.q._x.y"}
