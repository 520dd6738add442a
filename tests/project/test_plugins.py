"""Folder-listing plug-ins: what a plug-in file must declare, and what a plan knows of them without importing any."""

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest

from lamp_compile import _plugins, plan
from lamp_compile.errors import PluginError
from lamp_compile.runtime import formats, lookahead


@dataclass(frozen=True)
class Thing:
    name: str


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty package `plugged`."""
    package = tmp_path / "plugged"
    package.mkdir()
    (package / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in [name for name in sys.modules if name.split(".")[0] == "plugged"]:
        monkeypatch.delitem(sys.modules, name)
    return package


def load(folder: Path) -> dict[str, Thing]:
    importlib.invalidate_caches()
    package: ModuleType = importlib.import_module("plugged")
    return dict(_plugins.load(package, "THING", Thing))


HEADER = f"from {__name__} import Thing\n"


def test_files_are_found_in_order(folder: Path) -> None:
    (folder / "second.py").write_text(HEADER + "THING = Thing('second')\n")
    (folder / "first.py").write_text(HEADER + "THING = Thing('first')\n")
    (folder / "_base.py").write_text("raise RuntimeError('underscored files are no plug-ins')\n")
    assert list(load(folder)) == ["first", "second"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must declare THING of type Thing, got NoneType"),
        ("THING = 3\n", "must declare THING of type Thing, got int"),
        (HEADER + "THING = Thing('other')\n", "plug-in 'other' lives in mine.py"),
    ],
)
def test_what_a_file_must_declare(folder: Path, text: str, message: str) -> None:
    (folder / "mine.py").write_text(text)
    with pytest.raises(PluginError, match=message) as caught:
        load(folder)
    assert "mine.py" in caught.value.where
    assert caught.value.fix


def test_plans_know_every_format_and_rule() -> None:
    """A plan is checked without torch, from the folder's listing: the two must agree."""
    assert tuple(formats.all_formats()) == plan.FORMATS
    rules = lookahead.all_rules()
    assert tuple(name for name, rule in rules.items() if not rule.control) == plan.RULES
    assert tuple(name for name, rule in rules.items() if rule.control) == plan.CONTROLS
