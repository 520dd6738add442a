"""The certificate against the true error: groups, limits, models with windows and soft caps, and a planted fault."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config

import lamp_compile
from lamp_compile import cli
from lamp_compile.quality import certificates
from lamp_compile.quality.certificates import ALL, Meter
from lamp_compile.runtime import certificate

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def arguments(nano, root):
    text = root / "examples/data/walden.txt"
    return ["eval", str(nano), "--text", str(text), "--context", "256", "--max-tokens", "256", "--certificate"]


def test_the_command_compares_by_layer_length_and_twin(arguments, capsys):
    assert cli.main([*arguments, "--min-coverage", "0.999", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["factor"] == certificates.FACTOR
    assert data["exceeded"] == []
    rows = {(r["setting"], r["model"], r["layer"], r["length"]): r for r in data["rows"]}
    assert {key[1] for key in rows} == {"plain", "twin 30 any"}
    assert {key[3] for key in rows} == {ALL, "1-31", "32-127", "128-511"}
    assert len({key[2] for key in rows}) == 1 + 4
    for setting in ("plan", "all_low", "all_high"):
        row = rows[setting, "plain", ALL, ALL]
        assert row["coverage"] >= certificates.COVERAGE
        assert 0.5 < row["median_overestimate"] < 10, "not vacuous"
        parts = [r for key, r in rows.items() if key[:2] == (setting, "plain") and ALL not in key[2:]]
        assert sum(r["rows"] for r in parts) == row["rows"] >= certificates.JUDGED
    assert rows["plan", "plain", ALL, "1-31"]["rows"] == 31 * 4 * 4, "every short row, of every head and layer"


def test_an_estimate_that_is_too_small_is_noticed(arguments, capsys, monkeypatch):
    real = certificate.estimate
    monkeypatch.setattr(certificate, "estimate", lambda out, sums: real(out, sums) / 20)
    assert cli.main([*arguments, "--no-twin", "--min-coverage", "0.999"]) == 3
    out = capsys.readouterr().out
    assert "below the limit: coverage" in out
    assert "layer all, keys all" in out


def test_limits_belong_to_their_table(arguments, capsys):
    for wrong in (["--max-kl", "1"], ["--min-agreement", "0.5"], ["--tasks", "all"]):
        assert cli.main([*arguments, *wrong]) == 1
    assert cli.main([*(a for a in arguments if a != "--certificate"), "--min-coverage", "0.9"]) == 1
    assert "--certificate" in capsys.readouterr().err


def test_windows_soft_caps_and_layers_left_alone():
    config = Gemma2Config(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, sliding_window=16, attn_logit_softcapping=5.0,
        pad_token_id=0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    plan = lamp_compile.compile(model, mode="eager").lamp.plan
    meter = Meter({"plan": {}}, rows_per_length=64)
    windows = torch.randint(64, (1, 96), generator=torch.Generator().manual_seed(0))
    meter.measure(model, plan, windows)
    lengths = {g.layer: {x.length for x in meter.groups() if x.layer == g.layer} - {ALL} for g in meter.groups()}
    first, second = (row.name for row in plan.sites)
    assert lengths[first] == {"1-31"}, "a sliding window of 16"
    assert lengths[second] == {"1-31", "32-127"}
    assert next(g for g in meter.groups() if (g.layer, g.length) == (ALL, ALL)).coverage > 0.99
    kept = replace(plan, sites=(replace(plan.sites[0], apply=False), plan.sites[1]))
    meter = Meter({"plan": {}})
    meter.measure(model, kept, windows)
    assert {g.layer for g in meter.groups()} == {ALL, second}


def test_small_groups_are_not_judged():
    def group(rows, coverage=0.5, **changes):
        made = certificates.Coverage("plan", "plain", ALL, ALL, rows, coverage, 0.4, 2.0, 0.1)
        return replace(made, **changes)

    judged = [group(5000), group(5000, layer="a"), group(5000, length="1-31")]
    spared = [group(10), group(5000, setting="all_low"), group(5000, layer="a", length="1-31"), group(5000, 0.9999)]
    assert len(certificates.below([*judged, *spared], 0.999)) == 3
    assert len(certificates.below([group(5000, float("nan"))], 0.999)) == 1


def test_rows_are_spread_over_each_length():
    picked = certificates._positions(1000, 8).tolist()
    assert len(picked) == len(set(picked)) == 4 * 8
    for first, last in ((1, 31), (32, 127), (128, 511), (512, 1000)):
        assert sum(first <= p + 1 <= last for p in picked) == 8
    assert certificates._positions(20, 100).tolist() == list(range(20))


def test_results_hold_the_claim(root):
    """Whatever was committed last keeps what the documentation says."""
    path = sorted((root / "benchmarks/results").glob("*-certificate-*.json"))[-1]
    data = json.loads(path.read_text())
    assert data["missed"] == []
    assert sum(row["violated"] for row in data["worst_case"]) == 0
    assert "/" not in data["model"]
