"""``--linears`` on the packaged model: what it prints and writes, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lamp_compile import cli
from lamp_compile.frontends import linears
from lamp_compile.plan import Plan


@pytest.fixture
def everything_gains(monkeypatch: pytest.MonkeyPatch) -> None:
    """The nano model's layers may gain nothing here; these tests are not about this machine."""
    monkeypatch.setattr(linears, "speedup", lambda *shape: 2.0)


def test_explain_lists_linears(nano: Path, everything_gains: None, capsys: Any) -> None:
    assert cli.main(["explain", str(nano), "--linears", "auto"]) == 0
    out = capsys.readouterr().out
    assert "linear layers in INT8" in out
    assert "lm_head  kept: output head" in out
    assert "2.0x as fast at one row" in out


def test_a_text_chooses_and_the_plan_runs(
    nano: Path, root: Path, tmp_path: Path, everything_gains: None, capsys: Any
) -> None:
    text, plan = str(root / "examples/data/walden.txt"), tmp_path / "plan.json"
    arguments = ["compile", str(nano), "--linears-text", text, "--linears-kl", "1e-4", "-o", str(plan)]
    assert cli.main(arguments) == 0
    rows = Plan.load(plan).linears
    assert any(row.apply for row in rows)
    assert sum(row.kl or 0.0 for row in rows if row.apply) <= 1e-4
    capsys.readouterr()
    limits = ["--context", "128", "--max-tokens", "256", "--no-twin", "--max-kl", "2e-2"]
    assert cli.main(["eval", str(nano), "--text", text, "--plan", str(plan), "--json", *limits]) == 0
    assert json.loads(capsys.readouterr().out)["exceeded"] == []


def test_a_text_is_not_beside_a_plan(nano: Path, root: Path, tmp_path: Path, capsys: Any) -> None:
    text, plan = str(root / "examples/data/walden.txt"), str(tmp_path / "plan.json")
    common = ["compile", str(nano), "--linears-text", text, "-o", plan]
    for extra in (["--plan", plan], ["--linears", "int8"]):
        assert cli.main([*common, *extra]) == 1
        assert "--linears-text" in capsys.readouterr().err
    assert cli.main([*common[:2], "--linears-text", str(tmp_path / "none.txt"), "-o", plan]) == 1
    with pytest.raises(SystemExit, match="2"):
        cli.main(["explain", str(nano), "--linears", "int4"])
