"""The documentation says what the code does: blocks run, tables equal the code, links lead somewhere."""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from dataclasses import MISSING, fields
from pathlib import Path

import pytest

from lamp_compile import cli, plan
from lamp_compile.control_plan import ControlPlan
from lamp_compile.linear_plan import LinearPlan
from lamp_compile.plan import GuardPlan, Plan, SitePlan
from tests.project import operator_page

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
RECIPES = ROOT / "docs" / "extending.md"


def blocks(page: Path, language: str) -> list[str]:
    """Fenced blocks of a language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("page", [p for p in PAGES if p != RECIPES and blocks(p, "python")], ids=lambda p: p.name)
def test_python_blocks_run(page: Path) -> None:
    """All blocks of a page, one after the other in one interpreter, at the root of the repository."""
    source = "\n".join(blocks(page, "python"))
    command = [sys.executable, "-W", "error::SyntaxWarning", "-c", source]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def test_shell_blocks_name_targets_that_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    lines = [line for block in blocks(ROOT / "README.md", "sh") for line in block.splitlines()]
    assert lines[:2] == ["make demo", "make test"]
    for line in lines:
        target = re.match(r"make (\w+)", line)
        assert target, line
        assert f"\n{target[1]}: " in makefile


def test_ci_runs_the_readmes_commands() -> None:
    script = (ROOT / ".ci" / "run").read_text()
    for block in blocks(ROOT / "README.md", "sh"):
        for line in block.splitlines():
            assert f"\n{line} " in script or f" {line} " in script, line


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path) if path else page
        assert file.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
            assert anchor in slugs, target


def rows(page: Path, title: str) -> list[list[str]]:
    """Cells of the first table below a title."""
    text = page.read_text(encoding="utf-8").split(f"\n## {title}\n", 1)[1].split("\n## ", 1)[0]
    table = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table[2:]]


@pytest.mark.parametrize(
    ("title", "kind"),
    [
        ("Plan", Plan),
        ("SitePlan, one row", SitePlan),
        ("LinearPlan, one linear layer", LinearPlan),
        ("GuardPlan", GuardPlan),
        ("ControlPlan", ControlPlan),
    ],
    ids=str,
)
def test_every_plan_field_is_documented(title: str, kind: type) -> None:
    table = {row[0].strip("`"): row[1] for row in rows(ROOT / "docs" / "plan.md", title)}
    assert list(table) == [field.name for field in fields(kind)]
    for field in fields(kind):
        default = field.default_factory() if field.default_factory is not MISSING else field.default
        if default is MISSING:
            assert table[field.name] == "required"
        elif isinstance(default, GuardPlan):
            assert table[field.name] == "see below"
        else:
            written = json.loads(table[field.name].strip("`"))
            assert (tuple(written) if isinstance(default, tuple) else written) == default


def test_hot_fields_are_marked() -> None:
    table = rows(ROOT / "docs" / "plan.md", "SitePlan, one row")
    assert tuple(row[0].strip("`") for row in table if row[2] == "yes") == plan.HOT


def test_formats_and_rules_are_documented() -> None:
    text = (ROOT / "docs" / "plan.md").read_text()
    concepts = (ROOT / "docs" / "concepts.md").read_text()
    assert all(f"`{name}`" in text for name in (*plan.FORMATS, *plan.RULES, *plan.ROTATIONS))
    assert all(f"| `{name}`" in concepts for name in plan.RULES)


def test_presets_are_documented() -> None:
    table = {row[0].strip("`"): row[1] for row in rows(ROOT / "docs" / "plan.md", "Presets")}
    assert table == {name: f"`tau` {preset['tau']}" for name, preset in plan.PRESETS.items()}


def options(parser: argparse.ArgumentParser) -> dict[str, set[str]]:
    """Long options of each subcommand."""
    (choices,) = (a.choices for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    return {
        name: {o for action in command._actions for o in action.option_strings if o.startswith("--")}
        for name, command in choices.items()
    }


def test_every_command_and_option_is_documented() -> None:
    page = ROOT / "docs" / "cli.md"
    known = {name: found - {"--help"} for name, found in options(cli.parser()).items()}
    table = {re.findall(r"--[\w-]+", row[0])[0]: row[1] for row in rows(page, "Options")}
    for name, found in known.items():
        assert f"| `lamp-compile {name}" in page.read_text(encoding="utf-8")
        for option, where in table.items():
            everywhere = where == "all" or (where == "all but `doctor`" and name != "doctor")
            named = f"`{name}`" in where and not where.startswith("all")
            documented = everywhere or named
            assert documented == (option in found), (name, option)
    assert set(table) == set().union(*known.values())


def test_operator_page_is_current() -> None:
    assert operator_page.PAGE.read_text(encoding="utf-8") == operator_page.page(), "run `make golden`"
