"""A pytest plugin: the fixture ``lamp_snapshot`` compares a graph with the snapshot committed beside the test.

Loaded by pytest wherever lamp_compile is installed, so it imports nothing heavy until a test uses the fixture.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

ACCEPT = "LAMP_ACCEPT"
FOLDER, SUFFIX = "snapshots", ".lamp.txt"
_WRITTEN = pytest.StashKey[list[str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--lamp-accept``."""
    group = parser.getgroup("lamp_compile", "snapshots of graphs")
    group.addoption("--lamp-accept", action="store_true", help=f"write snapshots that differ (or set {ACCEPT}=1)")


def pytest_configure(config: pytest.Config) -> None:
    """Where the names of written snapshots are kept."""
    config.stash[_WRITTEN] = []


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Say which snapshots were written: they want to be read before they are committed."""
    written = config.stash.get(_WRITTEN, [])
    if written:
        terminalreporter.section("lamp_compile snapshots written")
        for name in written:
            terminalreporter.line(name)


class LampSnapshot:
    """Compares graphs with committed snapshots. What the fixture ``lamp_snapshot`` gives.

    Attributes:
        folder: Where this test module's snapshots lie: ``snapshots/<module>`` beside the module.
        accept: Whether a snapshot that is missing or differs is written.
    """

    def __init__(self, folder: Path, stem: str, accept: bool, written: list[str]) -> None:
        self.folder, self.accept = folder, accept
        self._stem, self._written = stem, written
        self._used: set[str] = set()

    def __call__(self, thing: Any, name: str = "", *, weights: bool = False, allow: Sequence[str] = ()) -> None:
        """Fail the test unless ``thing`` has the committed snapshot.

        Args:
            thing: Anything that ``lamp_compile.snapshot`` takes: a program, graph module, ONNX model, plan, path.
            name: Tells several snapshots of one test apart.
            weights: Compare the values of parameters too.
            allow: Rules for expected changes, as of ``lamp_compile.compare``.
        """
        __tracebackhide__ = True
        from lamp_compile.diff import api, reporters
        from lamp_compile.errors import LampError

        stem = _plain(f"{self._stem}-{name}" if name else self._stem)
        if stem in self._used:
            pytest.fail(f"this test has compared {stem} already; give each call a name", pytrace=False)
        self._used.add(stem)
        path = self.folder / (stem + SUFFIX)
        found = api.snapshot(thing, weights=weights)
        if not path.is_file():
            if not self.accept:
                pytest.fail(
                    f"no snapshot {path}\n  try:   pytest --lamp-accept, then read it and commit it", pytrace=False
                )
            self._write(path, found.text())
            return
        try:
            compared = api.compare(path, found, weights=weights, allow=allow)
            if compared.same:
                return
            text = reporters.render(compared, "text", 20)
        except LampError as error:  # a snapshot of an older format, or a rule that matches nothing
            text = f"{error}\n"
        if self.accept:
            self._write(path, found.text())
            return
        pytest.fail(f"{text}  accept it with pytest --lamp-accept (or {ACCEPT}=1)", pytrace=False)

    def _write(self, path: Path, text: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        self._written.append(str(path))


@pytest.fixture
def lamp_snapshot(request: pytest.FixtureRequest) -> LampSnapshot:
    """Compare graphs with committed snapshots: ``lamp_snapshot(program)``; accept changes with ``--lamp-accept``."""
    config = request.config
    accept = bool(config.getoption("--lamp-accept")) or os.environ.get(ACCEPT, "") not in ("", "0")
    folder = request.path.parent / FOLDER / request.path.stem
    owner = f"{request.cls.__name__}." if request.cls is not None else ""
    return LampSnapshot(folder, owner + request.node.name, accept, config.stash[_WRITTEN])


def _plain(name: str) -> str:
    """A name that every file system takes."""
    return re.sub(r"[^A-Za-z0-9_.+-]+", "_", name)[:120].strip("_")
