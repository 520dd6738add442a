"""The recipes of docs/extending.md work as printed: one file each, in a copy of the package, nothing else touched."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import lamp_compile
from tests.project.test_docs import RECIPES, blocks

PATH = re.compile(r"# (\S+\.py)\n")


def test_recipes(tmp_path: Path) -> None:
    package = Path(lamp_compile.__file__).parent
    shutil.copytree(package, tmp_path / "lamp_compile", ignore=shutil.ignore_patterns("__pycache__"))
    added, run = [], []
    for block in blocks(RECIPES, "python"):
        if path := PATH.match(block):
            target = tmp_path / path[1]
            assert not target.exists(), "a recipe adds a file, it changes none"
            assert target.parent.is_dir()
            target.write_text(block)
            added.append(path[1])
        else:
            run.append(block)
    folders = {str(Path(name).parent) for name in added}
    assert folders >= {
        f"lamp_compile/{name}" for name in ("runtime/formats", "runtime/lookahead", "passes/patterns", "backends")
    }
    assert len(run) == 4
    check = f"import lamp_compile\nassert lamp_compile.__file__.startswith({str(tmp_path)!r})\n"
    command = [sys.executable, "-c", check + "\n".join(run)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
