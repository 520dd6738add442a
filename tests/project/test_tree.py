"""The tree itself: sizes, paths of machines, forbidden constructs."""

from __future__ import annotations

import ast
import re
import subprocess
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MOST_LINES = 400
MACHINE_PATHS = re.compile(r"(?:^|[^A-Za-z0-9_.])/(?:work|farm|root|home|Users|tmp)/[A-Za-z.]")
ONLY_IN_CI = "../shared"
READS_ENVIRONMENT = ("environment.py", "_library.py", "pytest_plugin.py")


@cache
def tracked() -> tuple[Path, ...]:
    """Text files of the repository, links left out; without git (an unpacked archive) every file that is not built."""
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        names = [name for name in done.stdout.split("\0") if name]
    else:
        hidden = (".venv", "build", "dist", "__pycache__")
        names = [
            str(path.relative_to(ROOT)) for path in ROOT.rglob("*") if not any(part in hidden for part in path.parts)
        ]
    paths = [ROOT / name for name in names]
    return tuple(path for path in paths if path.is_file() and not path.is_symlink() and _is_text(path))


def _is_text(path: Path) -> bool:
    return path.suffix not in {".safetensors", ".u16", ".png"} and b"\0" not in path.read_bytes()[:4096]


def sources(folder: str = "") -> list[Path]:
    """Python files, of one folder or all."""
    return [path for path in tracked() if path.suffix == ".py" and path.is_relative_to(ROOT / folder)]


def test_something_is_checked() -> None:
    assert len(sources("lamp_compile")) > 30


def test_file_sizes() -> None:
    long = {str(p.relative_to(ROOT)): n for p in sources() if (n := len(p.read_text().splitlines())) > MOST_LINES}
    assert not long


def test_no_machine_paths() -> None:
    hits = []
    for path in tracked():
        if path == Path(__file__):
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if MACHINE_PATHS.search(line) or (ONLY_IN_CI in line and path != ROOT / ".ci" / "run"):
                hits.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}")
    assert not hits, "\n".join(hits)


def test_files_end_with_a_newline() -> None:
    bad = [str(p.relative_to(ROOT)) for p in tracked() if (t := p.read_bytes()) and not t.endswith(b"\n")]
    assert not [name for name in bad if not name.startswith("examples/models/")]


@pytest.mark.parametrize("name", ["utils.py", "helpers.py", "common.py", "core.py", "manager.py"])
def test_no_drawer(name: str) -> None:
    assert not [str(path) for path in tracked() if path.name == name]


def test_library_reads_no_environment_and_evaluates_nothing() -> None:
    """No environment variable is an interface; nothing from outside is unpickled, evaluated or run.

    ``doctor`` looks at the environment, to say which compiler Inductor would find; the CPU kernels do, so that a
    test can choose an instruction set; the pytest plugin does, for its accept mode.
    """
    forbidden = {"os.environ", "os.getenv", "pickle", "eval", "exec", "torch.load", "trust_remote_code=True"}
    hits = []
    for path in sources("lamp_compile"):
        allowed = {"os.environ"} if path.name in READS_ENVIRONMENT else set()
        for node in ast.walk(ast.parse(path.read_text())):
            text = ast.unparse(node) if isinstance(node, ast.Attribute | ast.keyword) else ""
            name = node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else ""
            if {text, name} & (forbidden - allowed):
                hits.append(f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', '?')}: {text or name}")
    assert not hits, "\n".join(hits)


def test_parameters() -> None:
    """At most 8 parameters. Operator adaptors spell their operator's schema, and a kernel's arguments are its
    interface: both are excepted."""
    adaptors = {"runtime/ops.py", "runtime/fused_ops.py", "runtime/reference.py", "runtime/guard.py"}
    adaptors |= {"runtime/network/ops.py", "runtime/network/predict.py"}
    hits = []
    for path in sources("lamp_compile"):
        if str(path.relative_to(ROOT / "lamp_compile")) in adaptors:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not _is_kernel(node):
                arguments = node.args
                count = len([*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs])
                if count > 8 + (bool(arguments.args) and arguments.args[0].arg in ("self", "cls")):
                    hits.append(f"{path.relative_to(ROOT)}:{node.lineno}: {node.name} takes {count}")
    assert not hits, "\n".join(hits)


def _is_kernel(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    return any(ast.unparse(decorator).startswith("triton.jit") for decorator in node.decorator_list)
