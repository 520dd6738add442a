"""What is public, pinned: a name that comes or goes is a decision, and the changelog has the version."""

from __future__ import annotations

import inspect
import re
import tomllib
from pathlib import Path

import pytest

import lamp_compile

PUBLIC = {
    "ControlPlan",
    "DecodeStep",
    "GuardPlan",
    "LampError",
    "LinearPlan",
    "NestedCache",
    "Plan",
    "SitePlan",
    "__version__",
    "backend",
    "compare",
    "compile",
    "disable",
    "explain",
    "export_onnx",
    "rewrite",
    "rewrite_onnx",
    "snapshot",
}


def test_public_names() -> None:
    assert set(lamp_compile.__all__) == PUBLIC


@pytest.mark.parametrize("name", sorted(PUBLIC - {"__version__"}))
def test_documented_and_closed(name: str) -> None:
    """Every public name has a docstring; every function annotates what it takes and gives."""
    thing = getattr(lamp_compile, name)
    assert inspect.getdoc(thing)
    if inspect.isfunction(thing):
        signature = inspect.signature(thing)
        assert signature.return_annotation is not inspect.Signature.empty
        for parameter in signature.parameters.values():
            assert parameter.annotation is not inspect.Parameter.empty, parameter.name


def test_version_is_said_once(root: Path) -> None:
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    assert project["version"] == lamp_compile.__version__
    assert f"\n## {lamp_compile.__version__}\n" in (root / "CHANGELOG.md").read_text()


def test_operators() -> None:
    """The operators' names are in saved programs: they are public too."""
    from lamp_compile.runtime import ops

    assert list(ops.SCHEMAS) == ["attention", "attention.cached", "quantize", "look_ahead", "select", "attend", "guard"]


def test_constraints_pin_everything(root: Path) -> None:
    """An unpinned name would let a resolver pick another build of torch."""
    lines = [line for line in (root / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]+==[0-9][A-Za-z0-9.]*", line) for line in lines), lines
    pinned = {line.split("==")[0].lower().replace("_", "-") for line in lines}
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["dev"], *extras["hf"], *extras["onnx-cpu"]]
    names = {re.split(r"[<>=\[]", item)[0].lower().replace("_", "-") for item in wanted}
    assert names <= pinned, names - pinned
