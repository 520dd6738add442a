"""Rows of a plan for linear layers: JSON both ways, older plans, and every kind of nonsense refused by name."""

import json

import pytest

from lamp_compile import linear_plan
from lamp_compile.errors import OptionError, PlanError
from lamp_compile.linear_plan import LinearPlan
from lamp_compile.options import Options
from lamp_compile.plan import Plan, SitePlan

ROWS = (
    LinearPlan("layers.0.up", reason="3.9x as fast at one row", speedup=3.9, error=0.004, kl=1e-6),
    LinearPlan("layers.0.down", apply=False, reason="int8 is 0.9x as fast at one row", group=0),
    LinearPlan("layers.1.up", format="int8_dynamic", group=0),
)
PLAN = Plan(sites=(SitePlan("layers.0"),), linears=ROWS)


def edited(**changes: object) -> str:
    data = json.loads(PLAN.to_json())
    data["linears"][0].update(changes)
    return json.dumps(data)


def test_json_both_ways(tmp_path) -> None:
    PLAN.validate().save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == PLAN


def test_plans_without_linears_load() -> None:
    data = json.loads(PLAN.to_json())
    del data["linears"]
    assert Plan.from_json(json.dumps(data)).linears == ()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"format": "int4"}, "format is 'int4'"),
        ({"format": None}, "format is None"),
        ({"group": -1}, "group is -1"),
        ({"group": True}, "group is True"),
        ({"group": 32.0}, "group is 32.0"),
        ({"format": "int8_dynamic"}, "group is 32 with int8_dynamic"),
        ({"apply": "yes"}, "apply is 'yes'"),
        ({"reason": 3}, "reason is 3"),
        ({"name": ""}, "needs a name"),
        ({"name": 3}, "needs a name"),
        ({"speedup": "fast"}, "speedup is 'fast'"),
        ({"kl": float("nan")}, "kl is nan"),
        ({"error": True}, "error is True"),
        ({"bits": 8}, "unknown field 'bits'"),
        ({"name": "layers.0.down"}, "occurs twice"),
    ],
)
def test_nonsense_is_named(changes: dict[str, object], says: str) -> None:
    with pytest.raises(PlanError, match=says) as caught:
        Plan.from_json(edited(**changes))
    assert caught.value.where
    assert caught.value.fix


@pytest.mark.parametrize("rows", [{}, "all", [3], [{"apply": True}]])
def test_rows_must_be_a_list_of_named_objects(rows: object) -> None:
    data = json.loads(PLAN.to_json())
    data["linears"] = rows
    with pytest.raises(PlanError):
        Plan.from_json(json.dumps(data))


def test_summary_counts_and_says_why() -> None:
    assert linear_plan.summary(ROWS) == [
        "2 of 3 linear layers in INT8",
        "  layers.0.up  int8, groups of 32; 3.9x as fast at one row",
        "  layers.0.down  kept: int8 is 0.9x as fast at one row",
        "  layers.1.up  int8_dynamic, one scale a channel",
    ]
    assert linear_plan.summary(()) == []


def test_a_graph_backend_refuses_what_it_does_not_do() -> None:
    with pytest.raises(OptionError, match="linear layers"):
        Options.parse({"plan": PLAN})
