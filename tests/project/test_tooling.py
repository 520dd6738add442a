"""The tools look at the code they are meant to look at."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest


def tool(name: str) -> str:
    """A tool of this environment."""
    found = shutil.which(name, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
    if found is None:
        pytest.skip(f"{name} is not installed here (extra: dev)")
    return found


def test_ruff_sees_passes_and_runtime_once(root: Path) -> None:
    done = subprocess.run(
        [tool("ruff"), "check", "--show-files", "."], cwd=root, capture_output=True, text=True, check=True
    )
    seen = {Path(line).relative_to(root).as_posix() for line in done.stdout.splitlines()}
    assert "lamp_compile/runtime/ops.py" in seen
    assert "lamp_compile/passes/__init__.py" in seen
    assert not [name for name in seen if name.split("/")[0] in ("passes", "runtime")]


@pytest.mark.parametrize("target", ["demo", "test", "check", "golden", "bench", "wheel", "clean"])
def test_make_targets(target: str, root: Path) -> None:
    done = subprocess.run(["make", "--dry-run", target], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_make_passes_its_variables_on(root: Path) -> None:
    command = ["make", "--dry-run", "demo", "MODEL=my/model", "TEXT=my.txt", "VENV=elsewhere"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    assert "elsewhere/bin/python examples/demo.py --model my/model --text my.txt" in done.stdout
    assert "python3 -m venv elsewhere" in done.stdout


def test_ci_is_a_bash_script_that_parses(root: Path) -> None:
    script = root / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert "set -euo pipefail" in script.read_text()
    done = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
