"""The frontier table, and what the presets mean."""

from __future__ import annotations

import json

import pytest

import lamp_compile
from lamp_compile import cli
from lamp_compile.plan import KEPT, PRESETS, SitePlan, keep_last
from lamp_compile.quality import frontier, load

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def arguments(nano, root):
    text = root / "examples/data/walden.txt"
    return ["frontier", str(nano), "--text", str(text), "--context", "128", "--max-tokens", "128", "--tau", "0.2"]


def test_bits_kl_and_agreement_of_every_setting(arguments, capsys):
    assert cli.main([*arguments, "--no-speed", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)["rows"]}
    assert list(rows) == [*(f"preset {name}" for name in PRESETS), "tau 0.2", "format bf16", "format fp8"]
    assert rows["format bf16"]["bits"] == 16
    assert rows["format fp8"]["bits"] == 8.25
    assert 4.25 < rows["tau 0.2"]["bits"] < rows["preset balanced"]["bits"] < 8.25
    assert rows["preset conservative"]["bits"] == pytest.approx(16 / 4 + 3 / 4 * 8.25, rel=0.02), "one of 4 is kept"
    assert rows["preset conservative"]["kl"] < rows["preset balanced"]["kl"] < rows["tau 0.2"]["kl"]
    assert all(row["tokens_per_s"] is None and row["positions"] == 128 for row in rows.values())


def test_times_stand_beside_those_of_the_model(arguments, capsys, monkeypatch, cpu_kernels):
    chosen = [s for s in frontier.settings((0.2,)) if s.name in ("tau 0.2", "format fp8")]
    monkeypatch.setattr(frontier, "settings", lambda taus, plan: chosen)
    speed = ["--prompt-tokens", "20", "--max-new-tokens", "4", "--mode", "eager"]
    assert cli.main([*arguments, *speed]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line[:12].strip() for line in lines[2:]] == ["uncompiled", "tau 0.2", "format fp8"]
    assert "no kernel" in lines[4]
    assert "no kernel" not in lines[3]
    assert cli.main([*arguments, "--prompt-tokens", "100000"]) == 1
    assert "--prompt-tokens" in capsys.readouterr().err


def test_a_conservative_plan_keeps_the_last_layers(nano):
    model = load.load_model(nano)
    fast = lamp_compile.compile(model, mode="eager", preset="conservative")
    assert [row.apply for row in fast.lamp.plan.sites] == [True, True, True, False]
    assert "uncalibrated" in fast.lamp.plan.sites[-1].reason
    assert fast.lamp.report().rewritten == tuple(row.name for row in fast.lamp.plan.sites[:-1])
    one_number = lamp_compile.compile(model, mode="eager", preset="conservative", tau=0.5)
    assert {row.tau for row in one_number.lamp.plan.sites} == {0.5}, "one number overrides the preset's"
    assert all(row.apply for row in lamp_compile.compile(model, mode="eager").lamp.plan.sites)


@pytest.mark.parametrize(("layers", "kept"), [(1, 0), (2, 1), (16, 1), (17, 2), (80, 5)])
def test_how_many_layers_are_kept(layers, kept):
    assert KEPT["conservative"] == 1 / 16
    rows = tuple(SitePlan(str(index)) for index in range(layers))
    found = keep_last(rows, "conservative")
    assert [row.apply for row in found] == [True] * (layers - kept) + [False] * kept
    assert keep_last(rows, "balanced") == rows
    refused = (*rows, SitePlan("refused", apply=False, reason="why"))
    assert keep_last(refused, "conservative")[:-1] == found
    assert keep_last(refused, "conservative")[-1].reason == "why"
