"""The fixture in a project of somebody else's: missing, written, the same, different, accepted."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

TEST = """
from lamp_compile import Plan, SitePlan
import pytest

@pytest.mark.parametrize("name", ["first/one", "second"])
def test_plan(lamp_snapshot, name):
    lamp_snapshot(Plan((SitePlan(name, tau=TAU),)))

class TestTwice:
    def test_names(self, lamp_snapshot):
        lamp_snapshot(Plan(()), "a")
        lamp_snapshot(Plan(()), "b")
"""


class Project:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(self, tau: float) -> None:
        (self.folder / "test_it.py").write_text(TEST.replace("TAU", str(tau)))

    def run(self, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "lamp_compile.pytest_plugin",
            "-p",
            "no:cacheprovider",
            *options,
        ]
        import os

        kept = {k: v for k, v in os.environ.items() if k != "LAMP_ACCEPT"}
        return subprocess.run(
            command,
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
            env={**kept, **environment},
        )


@pytest.fixture
def project(tmp_path: Path) -> Project:
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    made = Project(tmp_path)
    made.write(0.01)
    return made


def test_life_of_a_snapshot(project: Project) -> None:
    snapshots = project.folder / "snapshots" / "test_it"
    done = project.run()
    assert done.returncode == 1
    assert "no snapshot" in done.stdout
    assert "--lamp-accept" in done.stdout
    assert not snapshots.exists(), "never written unasked"
    done = project.run("--lamp-accept")
    assert done.returncode == 0
    assert "lamp_compile snapshots written" in done.stdout
    names = ["TestTwice.test_names-a", "TestTwice.test_names-b", "test_plan_first_one", "test_plan_second"]
    assert sorted(path.name for path in snapshots.iterdir()) == [f"{name}.lamp.txt" for name in names]
    assert project.run().returncode == 0
    project.write(0.5)
    done = project.run()
    assert done.returncode == 1
    assert "second: tau 0.01 -> 0.5 (refines less)" in done.stdout
    assert "test_it.py:" not in done.stdout.split("short test summary")[0], "the report, not a traceback"
    before = (snapshots / "TestTwice.test_names-a.lamp.txt").stat().st_mtime_ns
    assert project.run(LAMP_ACCEPT="1").returncode == 0
    assert (snapshots / "TestTwice.test_names-a.lamp.txt").stat().st_mtime_ns == before, (
        "what is the same is left alone"
    )
    assert project.run(LAMP_ACCEPT="0").returncode == 0


def test_starting_pytest_loads_nothing_heavy(project: Project) -> None:
    (project.folder / "test_it.py").write_text(
        "import sys\ndef test_light():\n"
        "    assert 'lamp_compile.pytest_plugin' in sys.modules\n"
        "    assert not {'torch', 'transformers', 'onnx', 'numpy'} & set(sys.modules)\n"
    )
    done = project.run()
    assert done.returncode == 0, done.stdout


def test_the_entry_point_names_the_module(root: Path) -> None:
    """Under another name, `-p` would register it twice, and pytest would stop."""
    import tomllib

    points = tomllib.loads((root / "pyproject.toml").read_text())["project"]["entry-points"]["pytest11"]
    assert points == {"lamp_compile.pytest_plugin": "lamp_compile.pytest_plugin"}
