"""Tuning: the search on made-up times, the bench on the reference, the command into a plan, a plan to the operator."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import lamp_compile
from lamp_compile.cli import main
from lamp_compile.errors import InputError, PlanError
from lamp_compile.launch_plan import LaunchPlan
from lamp_compile.plan import Plan, SitePlan
from lamp_compile.quality import tune
from lamp_compile.runtime import guard, kernels
from tests.huggingface import reference

SHAPE = tune.Shape(batch=2, length=640, heads=4, kv_heads=2, head_dim=16, value_dim=16)
CPU = torch.device("cpu")


def made_up(launch: LaunchPlan) -> float:
    """Fastest at 4 stages, 12 programs and chunks of 64; everything else costs nothing."""
    return 10.0 + abs(launch.stages - 4) + abs(launch.programs - 12) / 4 + (launch.merge_chunk != 16)


@pytest.fixture
def everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if kernels ran here, in made-up times."""
    monkeypatch.setattr(kernels, "why_not_device", lambda kind: None)
    monkeypatch.setattr(kernels, "why_not_attend", lambda *args: None)
    monkeypatch.setattr(kernels, "target_name", lambda device: "sm_00")
    monkeypatch.setattr(kernels, "why_not_store", lambda *args: "stood in")
    monkeypatch.setattr(tune.Bench, "milliseconds", lambda self, launch: made_up(launch))
    monkeypatch.setattr(tune.Bench, "bf16_milliseconds", lambda self: 40.0 if self.shape.length > 1000 else 8.0)


def test_the_search_takes_what_is_faster_and_nothing_else(everywhere: None) -> None:
    tried: list[str] = []
    found = tune.tune(tune.Bench(SHAPE, SitePlan("site"), CPU), tried.append)
    assert found.launch == LaunchPlan(stages=4, programs=12, merge_chunk=16)
    assert (found.default_ms, found.best_ms, found.bf16_ms) == (13.0, 10.0, 8.0)
    assert found.ratio == 0.8
    assert len(tried) == len(set(tried)) >= sum(len(values) - 1 for values in tune.CHOICES.values())


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5])
def test_the_bench_refines_the_share_it_was_asked_for(share: float) -> None:
    bench = tune.Bench(tune.Shape(1, 1280, 4, 2, 16, 16), SitePlan("site"), CPU, share, repeats=1)
    assert bench.milliseconds(LaunchPlan()) > 0
    assert bench.bf16_milliseconds() > 0
    live, refined = (int(bench.hot[4][..., field].sum()) for field in (guard.LIVE, guard.REFINED))
    assert refined / live == pytest.approx(share, abs=0.03)


@pytest.mark.parametrize("where", ["cpu_kernels", "reference_only"])
def test_without_a_gpu_there_is_nothing_to_tune(
    where: str, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    request.getfixturevalue(where)
    with pytest.raises(InputError, match="nothing to tune: "):
        tune.tune(tune.Bench(SHAPE, SitePlan("site"), CPU))
    with pytest.raises(InputError, match="a length of 100"):
        tune.check_length(100)
    assert main(["tune", "examples/models/nano", "--device", "cpu"]) == 1
    assert "nothing to tune" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["tune", "examples/models/nano", "--case", "0x32"])
    assert "0x32 is no case" in capsys.readouterr().err


@pytest.mark.parametrize(("case", "kept"), [("1x1280", False), ("1x640", True)])
def test_the_command_writes_a_plan_that_says_where_bf16_is_faster(
    case: str, kept: bool, everywhere: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "plan.json"
    assert main(["tune", "examples/models/nano", "--device", "cpu", "--case", case, "-o", str(path)]) == 0
    said = capsys.readouterr().out
    plan = Plan.load(path)
    assert plan.launch == {"sm_00": LaunchPlan(stages=4, programs=12, merge_chunk=16)}
    assert f"{case} on sm_00: 10.0000 ms (defaults 13.0000)" in said
    assert all(row.apply is not kept for row in plan.sites)
    reason = "measured slower than bf16 SDPA at 1x640 on sm_00: 0.80 times as fast" if kept else ""
    assert {row.reason for row in plan.sites} == {reason}
    assert ("keeps the original attention" in said) == kept


def test_a_plans_launch_reaches_the_operator(everywhere: None, monkeypatch: pytest.MonkeyPatch) -> None:
    model = reference.build("Llama")
    plan = lamp_compile.compile(model, mode="eager").lamp.plan
    fields: dict[str, Any] = {name: getattr(plan, name) for name in plan.__dataclass_fields__}
    fast = lamp_compile.compile(model, mode="eager", plan=Plan(**{**fields, "launch": {"sm_00": LaunchPlan(stages=4)}}))
    assert {layer.launch for layer in fast.lamp.spec.layers} == {'{"stages": 4}'}
    given: list[str] = []
    monkeypatch.setattr(kernels, "why_not_attend", lambda q, planes, state, options: given.append(options["launch"]))
    monkeypatch.setattr(kernels, "attend", lambda q, *args: q)
    with torch.no_grad():
        fast(torch.ones(1, 3, dtype=torch.long))
    assert set(given) == {'{"stages": 4}'}


def test_launch_plans_are_checked_and_survive_json() -> None:
    plan = Plan(sites=(SitePlan("a"),), launch={"sm_90": LaunchPlan(stages=4, dependent=0)})
    assert Plan.from_json(plan.to_json()) == plan
    assert LaunchPlan.parse(LaunchPlan(stages=4).text()) == LaunchPlan(stages=4)
    assert LaunchPlan().text() == ""
    for wrong, what in (
        ({"stages": 0}, "stages is 0"), ({"warps": 3}, "warps is 3"), ({"programs": 2.5}, "programs is 2.5"),
        ({"dependent": True}, "dependent is True"), ({"most_splits": 10**6}, "most_splits is 1000000"),
    ):  # fmt: skip
        with pytest.raises(PlanError, match=what):
            Plan(sites=(), launch={"sm_90": LaunchPlan(**wrong)}).validate()
    text = plan.to_json()
    with pytest.raises(PlanError, match="unknown field 'stagez'"):
        Plan.from_json(text.replace('"stages"', '"stagez"'))
    with pytest.raises(PlanError, match="`launch` must be an object"):
        Plan.from_json(Plan(sites=()).to_json().replace('"launch": {}', '"launch": []'))
