"""The precision plan in sentences that a reviewer understands."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

import lamp_compile
from lamp_compile import ControlPlan, GuardPlan, LinearPlan, Plan, SitePlan
from lamp_compile.diff import sites
from lamp_compile.launch_plan import LaunchPlan
from lamp_compile.runtime import formats, lookahead

NAMES = [f"model.layers.{index}.self_attn" for index in range(4)]
BASE = Plan(tuple(SitePlan(name) for name in NAMES), linears=(LinearPlan("lm_head"),))


def edited(index: int, **fields) -> Plan:
    rows = list(BASE.sites)
    rows[index] = replace(rows[index], **fields)
    return replace(BASE, sites=tuple(rows))


@pytest.mark.parametrize(
    ("before", "after", "sentence"),
    [
        (
            edited(3, floor=1), edited(3, tau=1.0),
            "layer 3 (model.layers.3.self_attn) went from high+low to high only (floor level 1 -> 0, tau 0.01 -> 1.0)",
        ),
        (BASE, edited(2, tau=0.02), "layer 2 (model.layers.2.self_attn): tau 0.01 -> 0.02 (refines less)"),
        (BASE, edited(2, tau=(0.01, 0.003)), "layer 2 (model.layers.2.self_attn): tau 0.01 -> [0.01, 0.003]"),
        (
            BASE, edited(0, apply=False),
            "layer 0 (model.layers.0.self_attn) went from high, and low where the rule asks for it "
            "to original attention",
        ),
        (
            BASE, edited(1, k_format="fp8", v_format="fp8"),
            "layer 1 (model.layers.1.self_attn) went from high, and low where the rule asks for it to fp8 "
            "(key format nested8 -> fp8, value format nested8 -> fp8)",
        ),
        (BASE, edited(1, k_format="fp8"), "layer 1 (model.layers.1.self_attn): key format nested8 -> fp8"),
        (
            BASE, edited(1, guard=GuardPlan(budget=float("inf"))),
            "layer 1 (model.layers.1.self_attn): guard's error budget 0.25 -> Infinity",
        ),
        (
            BASE, edited(1, balance=((1.0, 2.0), (1.0, 1.0))),
            "layer 1 (model.layers.1.self_attn): balance of key channels no -> 2 x 2 factors",
        ),
        (BASE, replace(BASE, sites=BASE.sites[:3]),
         "layer 3 (model.layers.3.self_attn) is gone: high, and low where the rule asks for it"),
        (BASE, replace(BASE, linears=(LinearPlan("lm_head", apply=False),)),
         "lm_head went from int8 weights to original weights"),
    ],
)  # fmt: skip
def test_one_line(before: Plan, after: Plan, sentence: str) -> None:
    found = lamp_compile.compare(before, after)
    assert [change.text for change in found.changes] == [sentence]
    assert {change.tier for change in found.changes} == {"precision"}


def test_reasons_and_provenance_are_no_change() -> None:
    other = replace(
        edited(0, reason="measured"), provenance={"calibration": "elsewhere"}, model="words", fingerprint="f"
    )
    assert lamp_compile.compare(BASE, other).same


def test_every_field_of_a_site_is_compared() -> None:
    """A plan that gains a field gets it here, or says why not."""
    row = sites.from_plan(BASE)[NAMES[0]]
    known = set(row) | {"name", "reason", "guard"} | {"launch", "exact"}
    assert set(SitePlan.__dataclass_fields__) <= known
    assert {f"guard_{f}" if f in ("window", "hold", "retry") else f for f in GuardPlan.__dataclass_fields__} <= known


def test_what_is_said_of_planes_is_so() -> None:
    """The words rest on which formats have a residual plane, and on which rules cannot exceed 1."""
    assert set(sites.TWO_PLANES) == {name for name, f in formats.all_formats().items() if f.residual_bits}
    assert set(sites.BOUNDED) <= set(lookahead.all_rules())


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"tau": 0.0}, "high+low"),
        ({"floor": 2}, "high+low"),
        ({"tau": [1.0, 2.0]}, "high only"),
        ({"tau": 5.0, "rule": "lamp_strict"}, "high, and low where the rule asks for it"),
        ({"floor": [0, 1]}, "high, and low where the rule asks for it"),
        ({"k_format": "bf16", "v_format": "bf16"}, "bf16"),
        ({"k_format": "bf16", "v_format": "fp8"}, "bf16 and fp8"),
    ],
)
def test_planes(row, words) -> None:
    usual = {"apply": True, "rule": "energy", "tau": 0.01, "floor": 0, "k_format": "nested8", "v_format": "nested8"}
    assert sites.planes({**usual, **row}) == words


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("model.layers.11.self_attn", "layer 11 (model.layers.11.self_attn)"),
        ("transformer.h.3.attn", "layer 3 (transformer.h.3.attn)"),
        ("bert.encoder.layer.0.attention.self", "layer 0 (bert.encoder.layer.0.attention.self)"),
        ("attention", "attention"),
    ],
)
def test_layers(name: str, label: str) -> None:
    assert sites.layer(name) == label


def test_launches_of_kernels() -> None:
    other = replace(BASE, launch={"sm_90": LaunchPlan(warps=2)})
    assert [c.text for c in lamp_compile.compare(BASE, other).changes] == ['launch.sm_90 is new: {"warps": 2}']


def test_from_files(tmp_path: Path) -> None:
    a, b = tmp_path / "a.json", tmp_path / "b.json"
    BASE.save(a)
    edited(1, tau=0.5).save(b)
    assert lamp_compile.compare(a, BASE).same
    (change,) = lamp_compile.compare(a, b).changes
    assert (change.where, change.subject, change.before, change.after) == (NAMES[1], "tau", "0.01", "0.5")
    text = lamp_compile.snapshot(a).text()
    assert lamp_compile.snapshot(a) == lamp_compile.diff.snapshot.Snapshot.parse(text)
    assert json.loads(a.read_text())["sites"][0]["name"] in text


def test_what_a_plan_says_of_the_whole_model_is_compared() -> None:
    changed = replace(BASE, shadow=0.01, control=ControlPlan(error_budget=0.1))
    said = str(lamp_compile.compare(BASE, changed).changes)
    assert "shadow" in said
    assert "error_budget" in said
    assert not lamp_compile.compare(changed, changed).changes
