"""Plans: JSON both ways, and every kind of nonsense refused by name."""

import dataclasses
import json
import math

import pytest

from lamp_compile.control_plan import ControlPlan
from lamp_compile.errors import OptionError, PlanError
from lamp_compile.plan import GuardPlan, Plan, SitePlan, fingerprint, template

ROW = SitePlan(
    name="layers.0",
    tau=(0.01, 0.02),
    floor=(0, 1),
    balance=((1.0, 2.5), (0.5, 1.0)),
    guard=GuardPlan(budget=math.inf, window=8),
)


def plan(*rows: SitePlan, **fields: object) -> Plan:
    return Plan(sites=rows or (ROW, dataclasses.replace(template("conservative"), name="layers.1")), **fields)  # type: ignore[arg-type]


def edited(**changes: object) -> str:
    """A plan's JSON with fields of its first row changed."""
    data = json.loads(plan().to_json())
    data["sites"][0].update(changes)
    return json.dumps(data)


def test_json_both_ways(tmp_path) -> None:
    made = plan(model="Llama", fingerprint="abc", provenance={"calibration": "probe", "lamp_compile": "0.1.0"})
    made.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == made
    assert Plan.from_json(made.to_json()).to_json() == made.to_json()


def test_fields_left_out_take_their_defaults() -> None:
    read = Plan.from_json('{"version": 1, "sites": [{"name": "a", "tau": 0.5}]}')
    assert read.sites[0] == SitePlan(name="a", tau=0.5)
    assert read.provenance["calibration"] == "uncalibrated"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"tau": -1}, "tau is -1"),
        ({"tau": "small"}, "tau is 'small'"),
        ({"tau": [0.1, None]}, "tau is None"),
        ({"tau": True}, "tau is True"),
        ({"floor": 3}, "floor is 3"),
        ({"floor": True}, "floor is True"),
        ({"rule": "entropy"}, "'entropy'"),
        ({"rule": "random_tiles"}, "'random_tiles'"),
        ({"k_format": "int3"}, "'int3'"),
        ({"v_format": None}, "None"),
        ({"rotation": "givens"}, "'givens'"),
        ({"query_bits": 4}, "query_bits is 4"),
        ({"tile": 100}, "tile is 100"),
        ({"subtile": 128, "tile": 64}, "subtile 128 does not divide tile 64"),
        ({"balance": [[1.0, 0.0]]}, "balance is 0.0"),
        ({"balance": [[1.0], [1.0, 2.0]]}, "one list of numbers per kv head"),
        ({"balance": []}, "one list of numbers per kv head"),
        ({"tile": 128.0}, "tile is 128.0"),
        ({"subtile": 32.0}, "subtile is 32.0"),
        ({"query_bits": 8.0}, "query_bits is 8.0"),
        ({"tau": 10**400}, "tau is 1000"),
        ({"guard": {"window": 10**30}}, "guard.window"),
        ({"balance": 2.0}, "one list of numbers per kv head"),
        ({"guard": {"budget": 0}}, "guard.budget is 0"),
        ({"guard": {"window": 0}}, "guard.window"),
        ({"guard": {"hold": 1.5}}, "guard.hold"),
        ({"guard": {"hysteresis": 2}}, "guard.hysteresis is 2"),
        ({"guard": {"hysteresis": 0}}, "guard.hysteresis is 0"),
        ({"guard": {"patience": 2}}, "'patience'"),
        ({"guard": {"retry": 1}}, "guard.retry is 1"),
        ({"exact_tier": "disk"}, "exact_tier is 'disk'"),
        ({"guard": 3}, "expected an object"),
        ({"apply": "yes"}, "apply must be bool"),
        ({"name": 7}, "needs a name"),
        ({"taus": 0.1}, "unknown field 'taus'"),
        ({"name": "layers.1"}, "occurs twice"),
    ],
)
def test_nonsense_is_refused_by_name(changes: dict[str, object], says: str) -> None:
    with pytest.raises(PlanError) as caught:
        Plan.from_json(edited(**changes), where="plan.json")
    assert says in str(caught.value)
    assert caught.value.where
    assert caught.value.fix


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "not JSON"),
        ("{", "not JSON"),
        ('{"version": 1, "sites": [{"name": "a", "tau": 0.5, "tau": 0.9}]}', "'tau' stands twice"),
        ("[" * 100_000, "not JSON"),
        ("[]", "a plan is a JSON object, this is a list"),
        ('{"version": 2, "sites": []}', "plan version 2"),
        ('{"version": 1, "sites": {}}', "`sites` must be a list"),
        ('{"version": 1, "sites": [3]}', "expected an object"),
        ('{"version": 1, "sites": [], "provenance": 3}', "`provenance`"),
        ('{"version": 1, "sites": [{"name": "a", "tau": NaN}]}', "tau is nan"),
        ('{"version": 1, "sites": [{"name": "a", "tau": Infinity}]}', "tau is inf"),
    ],
)
def test_files_that_are_no_plan(text: str, says: str) -> None:
    with pytest.raises(PlanError) as caught:
        Plan.from_json(text)
    assert says in str(caught.value)


def test_missing_file_and_other_encodings(tmp_path) -> None:
    with pytest.raises(PlanError, match="cannot read"):
        Plan.load(tmp_path / "none.json")
    (tmp_path / "latin.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PlanError, match="cannot read"):
        Plan.load(tmp_path / "latin.json")


def test_plan_for_another_graph() -> None:
    mine = fingerprint([("a", 4, 2, 64, 64)])
    assert mine != fingerprint([("a", 4, 2, 64, 128)])
    with pytest.raises(PlanError, match=r"made for Llama.*not for Qwen"):
        plan(model="Llama", fingerprint=mine).check("other", "Qwen")
    plan(fingerprint="").check("other", "Qwen")


def test_unknown_site_and_preset_and_option() -> None:
    with pytest.raises(PlanError, match="no site 'x'"):
        plan().site("x")
    with pytest.raises(OptionError, match=r"unknown preset 'fast'"):
        template("fast")
    with pytest.raises(OptionError, match="unknown option 'taus'"):
        template(taus=0.1)
    with pytest.raises(PlanError, match="tau is -2"):
        template(tau=-2)
    assert template(guard_budget=0.5).guard.budget == 0.5
    assert template(tau=[0.1, 0.2], floor=[0, 1]) == template(tau=(0.1, 0.2), floor=(0, 1))


def test_control_and_shadow_both_ways_and_older_plans_without() -> None:
    made = plan(control=ControlPlan(quality=0.98, relation=(0.001, 0.02, 0.5)), shadow=0.01)
    assert Plan.from_json(made.to_json()) == made
    older = {name: value for name, value in json.loads(plan().to_json()).items() if name not in ("control", "shadow")}
    for row in older["sites"]:
        del row["exact_tier"], row["guard"]["retry"]
    assert Plan.from_json(json.dumps(older)) == plan()
    for changes, says in (
        ({"control": {"quality": 2}}, "quality is 2"),
        ({"control": {"qualty": 0.9}}, "unknown field 'qualty'"),
        ({"control": {}}, "nothing to hold"),
        ({"control": {"speed": 3, "refined": 0.1}}, "contradict"),
        ({"control": {"quality": 0.9, "relation": 3}}, "three numbers"),
        ({"control": []}, "expected an object"),
        ({"shadow": "much"}, "shadow is 'much'"),
        ({"shadow": 2}, "shadow is 2"),
    ):
        with pytest.raises(PlanError, match=says):
            Plan.from_json(json.dumps({**json.loads(plan().to_json()), **changes}))
