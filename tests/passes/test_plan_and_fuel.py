"""Plans are obeyed row by row, refused for other graphs, and fuel stops after the first sites."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.fx import Graph

from lamp_compile.diff.readers.fx import _scope
from lamp_compile.driver import rewrite
from lamp_compile.errors import OptionError, PlanError
from lamp_compile.passes.find_sites import site_name
from lamp_compile.plan import Plan
from tests.backends.modules import stack, tokens
from tests.passes.captured import lamp_counts

X = tokens(40)


@pytest.fixture(scope="module")
def program():
    return torch.export.export(stack(layers=3), (X,), strict=True)


def report(made):
    return made.graph_module.meta["lamp_report"]


@pytest.mark.parametrize("fuel", [0, 1, 2, 3, 7])
def test_fuel(program, fuel):
    made = rewrite(program, fuel=fuel)
    assert report(made).rewritten == ("layers.0", "layers.1", "layers.2")[:fuel]
    assert lamp_counts(made.graph).get("guard", 0) == min(fuel, 3)
    assert str(made.graph).count("scaled_dot_product_attention.default") == 3 - min(fuel, 3)


def test_a_plan_goes_round_through_json_and_is_obeyed(program, tmp_path):
    plan = report(rewrite(program)).plan
    rows = (
        replace(plan.sites[0], k_format="int8", tau=0.5),
        replace(plan.sites[1], apply=False, reason="as a test"),
        plan.sites[2],
    )
    replace(plan, sites=rows).save(tmp_path / "plan.json")
    made = rewrite(program, plan=str(tmp_path / "plan.json"))
    assert report(made).rewritten == ("layers.0", "layers.2")
    assert "kept: as a test" in report(made).text()
    assert str(made.graph).count("k_format: int8") == 3
    silent = replace(plan, sites=(replace(plan.sites[0], apply=False), *plan.sites[1:]))
    assert "kept: the plan says apply: false" in report(rewrite(program, plan=silent)).text()
    assert made.state_dict["lamp_layers_0_tau"].tolist() == [0.5] * 4


def test_a_plan_for_another_graph_is_refused(program):
    plan = report(rewrite(program)).plan
    other = torch.export.export(stack(layers=3, kv_heads=2), (X,), strict=True)
    with pytest.raises(PlanError, match="was made for"):
        rewrite(other, plan=plan)
    deeper = torch.export.export(stack(layers=4), (X,), strict=True)
    with pytest.raises(PlanError, match=r"layers\.3"):
        rewrite(deeper, plan=replace(plan, fingerprint=""))


def test_rows_that_do_not_fit_are_refused(program):
    plan = report(rewrite(program)).plan
    for change, words in (
        ({"tau": (0.1, 0.2)}, "4 kv heads"),
        ({"balance": ((1.0,) * 3,) * 4}, "16 numbers"),
        ({"rule": "luck"}, "luck"),
    ):
        rows = (replace(plan.sites[0], **change), *plan.sites[1:])
        with pytest.raises(PlanError, match=words):
            rewrite(program, plan=replace(plan, sites=rows))


def test_balance_enters_the_graph(program):
    plan = report(rewrite(program, floor=1)).plan
    balance = tuple(tuple(0.5 + 0.25 * i for i in range(16)) for _ in range(4))
    rows = (replace(plan.sites[0], balance=balance), *plan.sites[1:])
    made = rewrite(program, plan=replace(plan, sites=rows))
    assert made.state_dict["lamp_layers_0_balance"].tolist() == [list(row) for row in balance]
    assert "lamp_layers_1_balance" not in made.state_dict
    with torch.no_grad():
        wanted, out = program.module()(X), made.module()(X)
    assert not torch.equal(out, rewrite(program, floor=1).module()(X))
    assert (out - wanted).norm() < 0.02 * wanted.norm()


@pytest.mark.parametrize(
    ("options", "words"),
    [({"tua": 1}, "tua"), ({"preset": "wild"}, "wild"), ({"lower": "tpu"}, "tpu"), ({"tau": -1.0}, "tau"),
     ({"fuel": -1}, "fuel"), ({"plan": 3}, "plan is a int")],
)  # fmt: skip
def test_bad_options(program, options, words):
    with pytest.raises((OptionError, PlanError), match=words):
        rewrite(program, **options)


def test_an_option_beside_a_plan_is_refused(program):
    with pytest.raises(OptionError, match="beside a plan"):
        rewrite(program, plan=Plan(()), tau=0.1)


@pytest.mark.parametrize(
    ("stack", "named"),
    [
        ("L['self'].model.layers.0.self_attn", "model.layers.0.self_attn"),
        ("L['args'][0].model.layers.0.self_attn", "model.layers.0.self_attn"),
        ('L["args"][0].model.layers[3].self_attn', "model.layers.3.self_attn"),
        ("L['args'][1].attention", "1.attention"),
        ("layers.0.attn", "layers.0.attn"),
    ],
)
def test_a_site_is_named_by_its_module_however_its_forward_is_wrapped(stack: str, named: str) -> None:
    """A wrapped forward has the model as the first of its ``args``."""
    node = Graph().placeholder("x")
    node.meta["nn_module_stack"] = {"1": ("L['self']", torch.nn.Module), "2": (stack, torch.nn.Module)}
    assert site_name(node) == named
    if "['args'][1]" not in stack and '"' not in stack:
        assert _scope(node) == named
