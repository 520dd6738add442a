"""Calibration on the packaged model: what it finds, what it writes, when it prefers one tau for all."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

import lamp_compile
from lamp_compile import cli
from lamp_compile.commands import calibrate as command
from lamp_compile.errors import InputError, OptionError, PlanError
from lamp_compile.plan import Plan, SitePlan
from lamp_compile.quality import calibrate, load, sensitivity
from lamp_compile.quality.engine import CompiledEngine
from lamp_compile.quality.fragile_twin import fragile_twin
from lamp_compile.quality.sensitivity import Bench, Outcome
from lamp_compile.report import described

PLANTED = 1
TAUS = (0.0, 0.03, 0.3)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model(nano):
    return load.load_model(nano)


@pytest.fixture(scope="module")
def windows(model, nano, root):
    return load.load_windows(model, nano, root / "examples/data/walden.txt", 192, 4)


def _task(model, windows, preset="aggressive", **options):
    first, rest = calibrate.window_halves(windows)
    engine = CompiledEngine(lamp_compile.compile(model, mode="eager", balance="never"))
    fast = lamp_compile.compile(model, mode="eager", preset=preset, balance="never")
    benches = (Bench(model, engine, windows) for windows in (first, rest))
    return calibrate.Task(*benches, fast.lamp.plan, {site.name: site for site in fast.lamp.sites}, **options)


@pytest.fixture(scope="module")
def twin(model):
    return fragile_twin(model, [PLANTED], bias=200.0, scale=10.0)


def test_one_site_alone_runs_and_nothing_else(model, windows):
    task = _task(model, windows)
    plan = task.bench.engine.plan
    name = plan.sites[2].name
    outcome = task.bench.measure(sensitivity.alone(plan, name, tau=0.0, floor=1))
    assert list(outcome.share) == [name]
    assert outcome.share[name] == 1.0
    assert outcome.bits == pytest.approx(0.75 * 16 + 0.25 * 8.25)
    nothing = task.bench.measure(replace(plan, sites=tuple(replace(r, apply=False) for r in plan.sites)))
    assert nothing.share == {}
    assert nothing.mean < 1e-9 < outcome.mean
    everything = task.bench.measure(plan)
    assert everything.mean > outcome.mean
    assert everything.kl.numel() == 2, "192 positions are one block a window"


def test_planted_keys_are_the_same_function(model, twin, windows):
    with torch.no_grad():
        base = model(input_ids=windows[:1], use_cache=False).logits
        other = twin.model(input_ids=windows[:1], use_cache=False).logits
    assert (base.argmax(-1) == other.argmax(-1)).float().mean() > 0.99
    assert torch.equal(
        model.model.layers[0].self_attn.k_proj.weight, twin.model.model.layers[0].self_attn.k_proj.weight
    )
    assert model.model.layers[PLANTED].self_attn.k_proj.bias is None, "the argument stays as it is"
    with pytest.raises(OptionError, match="layers"):
        fragile_twin(model, [9])


def test_fragile_keys_are_found_and_handled(model, twin, windows, monkeypatch):
    """Named by site, head and channel; balanced by measurement; and then as good as the model without them."""
    monkeypatch.setattr(calibrate, "TAUS", TAUS)
    task = _task(twin.model, windows)
    done = calibrate.calibrate(task)
    found = {(key["head"], key["channel"]) for key in done.report["fragile"] if key["site"] == twin.sites[0]}
    planted = twin.channels[twin.sites[0]]
    assert found >= {(head, channel) for head, channels in enumerate(planted) for channel in channels}
    largest = done.report["fragile"][0]
    assert largest["constant"] > 0.9, "a bias is the same for all keys"
    assert largest["times"] > 50
    assert done.plan.site(twin.sites[0]).balance is not None
    plain = _task(model, windows)
    before = plain.held_out.measure(plain.preset).mean
    spoilt = task.held_out.measure(task.preset).mean
    assert spoilt > 2 * before
    assert task.held_out.measure(done.plan).mean < 1.3 * before
    assert Plan.from_json(done.plan.to_json()).sites == done.plan.sites
    assert described(done.plan).startswith("measured")
    assert "tokens of text" in described(done.plan)


def test_the_parts_add_up_and_bits_stay_within_the_preset(model, windows, monkeypatch):
    monkeypatch.setattr(calibrate, "TAUS", TAUS)
    task = _task(model, windows)
    done = calibrate.calibrate(task)
    assert done.report["predicted_kl"] == pytest.approx(done.report["measured_kl"], rel=0.35)
    budget = task.bench.measure(task.preset).bits
    candidate = done.report["held_out"]["calibrated"]
    assert candidate["bits_per_value"] <= 1.03 * task.held_out.measure(task.preset).bits
    assert task.bench.measure(done.plan).bits <= 1.002 * budget
    heads = calibrate.calibrate(_task(model, windows, heads=True))
    assert len(heads.report["sensitivity"]) == 8, "every kv head is a unit of its own"
    with pytest.raises(InputError, match="out of reach"):
        calibrate.calibrate(_task(model, windows, max_kl=1e-9))


def test_a_difference_inside_its_interval_is_no_result(model, windows):
    """The verdict, on outcomes made up: 8 blocks each."""
    noise = torch.tensor([1.0, -1.0] * 4)
    plans = {name: Plan((SitePlan("s"),), model=name) for name in ("preset", "uniform", "candidate")}

    class Fake:
        def __init__(self, **kl):
            self.kl = kl

        def measure(self, plan):
            return Outcome(self.kl[plan.model], 9, 10, 4.5, {})

    def verdict(preset, uniform, candidate):
        task = replace(_task(model, windows), preset=plans["preset"],
                       held_out=Fake(preset=preset, uniform=uniform, candidate=candidate))  # fmt: skip
        plan, word, _ = calibrate._verified(task, plans["uniform"], plans["candidate"])
        return plan.model, word

    level = torch.full((8,), 10.0)
    assert verdict(level, level, level - 1) == ("candidate", "measured")
    assert verdict(level, level, level - 0.1 + noise)[0] == "uniform"
    assert verdict(level, level, level + 1)[0] == "uniform"
    assert verdict(level, level + 1, level + 1)[0] == "preset", "worse than without a text"


def test_the_command_writes_a_plan_and_goes_on_where_it_was(nano, root, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(calibrate, "TAUS", TAUS)
    out = tmp_path / "plan.json"
    arguments = ["calibrate", str(nano), "--text", str(root / "examples/data/walden.txt"), "--context", "128"]
    arguments += ["--max-tokens", "256", "--preset", "aggressive", "-o", str(out)]
    real, calls = Bench.measure, []

    def counted(bench, plan):
        calls.append(plan)
        if len(calls) == 7 and not out.exists():
            raise KeyboardInterrupt
        return real(bench, plan)

    monkeypatch.setattr(Bench, "measure", counted)
    assert cli.main(arguments) == 130
    partial = json.loads((tmp_path / "plan.json.partial").read_text())
    assert len(partial["values"]) == 6
    kept = tmp_path / "kept.json"
    kept.write_text(json.dumps(partial))
    calls.clear()
    calls.extend([None] * 7)
    assert cli.main([*arguments, "--json"]) == 0
    assert not (tmp_path / "plan.json.partial").exists()
    second = len(calls) - 7
    data = json.loads(capsys.readouterr().out)
    plan = Plan.load(out)
    assert plan.provenance["calibration"].startswith("measured")
    assert len(plan.provenance["text_sha256"]) == 64
    assert plan.provenance["tokens"] == 256
    assert {row["tau"] for row in data["sensitivity"][plan.sites[0].name]} == set(TAUS)
    calls.clear()
    (tmp_path / "plan.json.partial").write_text(json.dumps({**partial, "identity": "another model"}))
    assert cli.main(arguments) == 0
    assert len(calls) == second + 6, "measurements of another model, text or setting are not used"
    assert "held out" in capsys.readouterr().out
    assert cli.main([*arguments[:-1], str(tmp_path / "no" / "folder.json")]) == 1
    assert command.Memory(kept, partial["identity"])
    assert not command.Memory(kept, "another")
    before = out.read_text()
    with pytest.raises(InputError, match="no measurements"):
        command.Memory(out, "a plan given for measurements by mistake")
    assert out.read_text() == before


def test_a_plan_can_hold_an_agreement_by_its_own_relation(model, windows, nano, root, tmp_path, capsys):
    plan = lamp_compile.compile(model, mode="eager", guard_budget=1.0).lamp.plan
    holding = command._holding(model, plan, windows, 0.9)
    assert holding.control is not None
    assert holding.control.quality == 0.9
    base, start, slope = holding.control.relation
    assert 0 < base < 0.1  # what both planes everywhere may cost, by the interval of so little text
    assert holding.control.error_limit == pytest.approx(start + (0.1 - base) / slope)
    assert [row.guard for row in holding.sites] == [row.guard for row in plan.sites]
    assert Plan.from_json(holding.to_json()) == holding
    fast = lamp_compile.compile(model, mode="eager", plan=holding)
    assert fast.lamp.controller.status()["calibrated"] is True
    fast.lamp.controller.stop()
    with pytest.raises(PlanError, match="both planes everywhere"):
        command._holding(model, plan, windows, 0.9999)
    tight = replace(plan, sites=tuple(replace(s, guard=replace(s.guard, budget=start / 2)) for s in plan.sites))
    with pytest.raises(InputError, match="the guard acts"):
        command._holding(model, tight, windows, 0.9)
    arguments = ["calibrate", str(nano), "--text", str(root / "examples/data/walden.txt"), "-o", str(tmp_path / "p")]
    assert cli.main([*arguments, "--quality", "1"]) == 1
    assert "quality" in capsys.readouterr().err


def test_reports_say_what_a_plan_rests_on(model):
    fast = lamp_compile.compile(model, mode="eager")
    assert "plan: uncalibrated (preset balanced)" in fast.lamp.report().text()
