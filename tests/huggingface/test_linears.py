"""Linear layers of a transformers decoder in INT8: chosen, replaced, reported, decoded with, and left alone."""

from __future__ import annotations

import copy
import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

import lamp_compile
from lamp_compile.errors import InputError, OptionError, PlanError
from lamp_compile.frontends import linears
from lamp_compile.linear_plan import LinearPlan
from lamp_compile.plan import Plan
from lamp_compile.quality import linear_speed
from lamp_compile.quality.linears import calibrate
from lamp_compile.runtime.linear import Int8Linear
from tests.huggingface import reference

HEAD = "lm_head"


@pytest.fixture
def fast_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny layers gain nothing; what is chosen when they would."""
    monkeypatch.setattr(linears, "speedup", lambda outputs, inputs, group, dtype, dynamic: 3.0)


def int8_layers(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, Int8Linear)]


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_never_is_the_default(model: Any) -> None:
    fast = lamp_compile.compile(model, mode="eager")
    assert fast.lamp.plan.linears == ()
    assert not int8_layers(fast)
    assert "linear layers" not in fast.lamp.report().text()


@pytest.mark.parametrize("format", ["int8", "int8_dynamic"])
def test_all_layers_and_the_original_as_it_was(model: Any, ids: Tensor, format: str) -> None:
    before, names = reference.logits(model, ids), list(linears.find(model))
    plain = reference.logits(lamp_compile.compile(model, mode="eager"), ids)
    fast = lamp_compile.compile(model, mode="eager", linears=format)
    assert int8_layers(fast) == names
    assert len(names) == 15
    assert not int8_layers(model)
    assert torch.equal(reference.logits(model, ids), before)
    assert all(a is b for a, b in zip(fast.parameters(), model.parameters(), strict=True))
    assert list(fast.state_dict()) == list(model.state_dict())
    change = reference.relative(reference.logits(fast, ids), plain)
    assert 1e-4 < change < 0.1
    with lamp_compile.disable():
        assert torch.equal(reference.logits(fast, ids), before)


def test_auto_keeps_the_head_and_says_why(model: Any, fast_everywhere: None) -> None:
    fast = lamp_compile.compile(model, mode="eager", linears="auto")
    rows = {row.name: row for row in fast.lamp.plan.linears}
    assert not rows[HEAD].apply
    assert "output head" in rows[HEAD].reason
    done = [row for row in rows.values() if row.apply]
    assert [row.name for row in done] == int8_layers(fast) == [name for name in rows if name != HEAD]
    assert all(row.speedup == 3.0 and row.error is not None and 0 < row.error < 0.02 for row in done)
    text = fast.lamp.report().text()
    assert "14 of 15 linear layers in INT8" in text
    assert "model.layers.0.mlp.up_proj  int8, groups of 32; 3.0x as fast at one row, outputs change by 0." in text
    assert "lm_head  kept: output head" in text
    assert "MB beside the original" in text
    assert [row["name"] for row in fast.lamp.report().to_dict()["plan"]["linears"]] == list(rows)


def test_auto_keeps_what_is_slow_or_rough(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linears, "speedup", lambda outputs, inputs, *rest: 0.9 if outputs > inputs else 3.0)
    layer = model.model.layers[0].self_attn.o_proj
    layer.weight.data[:, ::32] *= 1e4  # one input of each group drowns the others' steps
    before = layer.weight.data.clone()
    with torch.no_grad():
        x = torch.randn(8, layer.in_features)
        x[:, ::32] = 0
        scored = linears.output_errors({"it": layer}, lambda: layer(x))
    assert scored["it"] > linears.MOST_ERROR
    assert torch.equal(layer.weight.data, before)
    rows = {row.name: row for row in lamp_compile.compile(model, mode="eager", linears="auto").lamp.plan.linears}
    assert rows["model.layers.0.mlp.up_proj"].reason == "int8 is 0.9x as fast at one row"
    assert rows["model.layers.0.mlp.down_proj"].apply
    monkeypatch.setattr(linears, "MOST_ERROR", 0.0)
    rows = {row.name: row for row in lamp_compile.compile(model, mode="eager", linears="auto").lamp.plan.linears}
    assert "its outputs would change by" in rows["model.layers.0.mlp.down_proj"].reason


def test_speed_is_measured(model: Any) -> None:
    row = linears.speed_row("up", nn.Linear(64, 128))
    assert row.speedup is not None
    assert row.speedup > 0
    assert row.apply == (row.speedup >= linears.LEAST_SPEEDUP)


@pytest.mark.parametrize(("slow", "found", "waits"), [(0, 2.0, [0]), (1, 2.0, [0, 1]), (9, 0.01, [0, 1, 2])])
def test_a_speed_that_no_layer_has_is_measured_again(
    slow: int, found: float, waits: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others on the cores: threads of the INT8 loops wait for each other."""
    waited: list[int] = []
    seconds = itertools.chain([1.0, 100.0] * (slow * linear_speed.ROUNDS), itertools.cycle([1.0, 0.5]))
    monkeypatch.setattr(linear_speed.time, "sleep", waited.append)
    monkeypatch.setattr(linear_speed, "_compiled", lambda *args: print)
    monkeypatch.setattr(linear_speed, "_fastest", lambda calls: next(seconds))
    assert linear_speed.speedup.__wrapped__(8, 32, 32, torch.float32, False) == found
    assert waited == waits


def test_explain_lists_the_layers(model: Any) -> None:
    report = lamp_compile.explain(model, linears="int8")
    assert "15 of 15 linear layers in INT8" in report.text()
    assert "asked for" in report.text()
    assert not int8_layers(model)


def test_a_plan_is_obeyed(model: Any) -> None:
    made = lamp_compile.compile(model, mode="eager", linears="int8").lamp.plan
    rows = tuple(replace(row, apply="mlp" in row.name) for row in made.linears)
    again = Plan.from_json(replace(made, linears=rows).to_json())
    fast = lamp_compile.compile(model, mode="eager", plan=again)
    assert int8_layers(fast) == [row.name for row in rows if row.apply]
    assert len(int8_layers(fast)) == 6


def test_inplace_changes_the_model_and_keeps_an_original(model: Any, ids: Tensor) -> None:
    before, kept = reference.logits(model, ids), weights_of(model)
    fast = lamp_compile.compile(model, mode="eager", inplace=True, linears="int8")
    assert fast is model
    assert len(int8_layers(model)) == 15
    assert not int8_layers(fast.lamp.original)
    assert torch.equal(reference.logits(fast.lamp.original, ids), before)
    assert all(torch.equal(tensor, kept[name]) for name, tensor in model.state_dict().items())


def test_a_copy_runs_alone(model: Any, ids: Tensor) -> None:
    fast = lamp_compile.compile(model, mode="eager", linears="int8")
    wanted = reference.logits(fast, ids)
    copied = copy.deepcopy(fast)
    for parameter in fast.parameters():
        parameter.data.zero_()
    assert torch.equal(reference.logits(copied, ids), wanted)


@pytest.mark.parametrize("format", ["int8", "int8_dynamic"])
@pytest.mark.parametrize("through", ["compiled", "original", "a new parameter"])
def test_other_weights_are_rounded_anew(model: Any, ids: Tensor, format: str, through: str) -> None:
    fast = lamp_compile.compile(model, mode="eager", linears=format)
    fast(ids)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.5).add_(torch.randn_like(parameter), alpha=0.02)
    addresses = [module.weight_int8.data_ptr() for module in fast.modules() if isinstance(module, Int8Linear)]
    if through == "a new parameter":
        for parameter, given in zip(fast.parameters(), other.parameters(), strict=True):
            parameter.data = given.detach().clone()
    else:
        (fast if through == "compiled" else model).load_state_dict(other.state_dict())
    if through == "compiled":  # at once: a graph of the caller's own would not look
        rounded = [module.weight_scale.clone() for module in fast.modules() if isinstance(module, Int8Linear)]
    wanted = reference.logits(lamp_compile.compile(other, plan=fast.lamp.plan, mode="eager"), ids)
    assert torch.equal(reference.logits(fast, ids), wanted)
    now = [module for module in fast.modules() if isinstance(module, Int8Linear)]
    assert addresses == [module.weight_int8.data_ptr() for module in now], "what graphs read"
    if through == "compiled":
        assert all(torch.equal(module.weight_scale, before) for module, before in zip(now, rounded, strict=True))


def test_saved_weights_are_the_originals(model: Any, ids: Tensor, tmp_path: Any) -> None:
    lamp_compile.compile(model, mode="eager", linears="int8").save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager").eval()
    assert torch.equal(reference.logits(loaded, ids), reference.logits(model, ids))


def test_compiled_decoding_has_the_operator_and_one_graph(
    model: Any, ids: Tensor, greedy: dict[str, Any], fresh_graphs: None, one_thread: None
) -> None:
    eager = lamp_compile.compile(model, mode="eager", linears="int8")
    fast = lamp_compile.compile(model, mode="default", linears="int8")
    seen: list[str] = []
    backend = fast.lamp.compile_config.backend.backend
    inner = type(backend).__call__

    class Looking(type(backend)):  # type: ignore[misc]
        def __call__(self, gm: Any, *args: Any, **kwargs: Any) -> Any:
            seen.extend(str(node.target) for node in gm.graph.nodes)
            return inner(self, gm, *args, **kwargs)

    backend.__class__ = Looking
    got, wanted = fast.generate(ids, **greedy), eager.generate(ids, **greedy)
    assert sum("linear_int8" in target for target in seen) == 15
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    assert (got == wanted).float().mean() > 0.95


def test_calibration_spends_its_budget_on_the_cheapest(model: Any, ids: Tensor, fast_everywhere: None) -> None:
    kept = weights_of(model)
    free = calibrate(model, ids, budget=1e9)
    assert all(row.apply and row.kl is not None and row.kl >= 0 for row in free)
    total = sum(row.kl or 0.0 for row in free)
    some = calibrate(model, ids, budget=total / 3)
    done = [row for row in some if row.apply]
    assert 0 < len(done) < len(some)
    assert sum(row.kl or 0.0 for row in done) <= total / 3
    assert all("budget" in row.reason for row in some if not row.apply)
    assert not any(row.apply for row in calibrate(model, ids, budget=0))
    assert not int8_layers(model)
    assert all(torch.equal(tensor, kept[name]) for name, tensor in model.state_dict().items())
    fast = lamp_compile.compile(model, mode="eager", linears=some)
    assert int8_layers(fast) == [row.name for row in done]


def test_a_broken_layer_is_not_chosen(model: Any, ids: Tensor, fast_everywhere: None) -> None:
    """A layer whose rounded weights are wrong costs too much by itself, and its neighbours stay chosen."""
    made = Int8Linear.__init__

    def wrong(self: Int8Linear, original: nn.Linear, row: LinearPlan) -> None:
        made(self, original, row)
        if row.name == "model.layers.1.mlp.down_proj":
            self.weight_scale *= 1.5

    free = {row.name: row for row in calibrate(model, ids, budget=1e9)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Int8Linear, "__init__", wrong)
        rows = calibrate(model, ids, budget=2 * sum(row.kl or 0.0 for row in free.values()))
    assert [row.name for row in rows if not row.apply] == ["model.layers.1.mlp.down_proj"]


@pytest.mark.parametrize(
    ("asked", "error", "says"),
    [
        ("fast", OptionError, "'fast'"),
        (True, OptionError, "bool"),
        ([3], OptionError, "list"),
        ((LinearPlan("nowhere"),), PlanError, "no linear layer 'nowhere'"),
        ((LinearPlan(HEAD, group=7),), PlanError, "group 7 does not divide"),
        ((LinearPlan(HEAD, format="int3"),), PlanError, "int3"),
        ((LinearPlan(HEAD), LinearPlan(HEAD)), PlanError, "twice"),
    ],
)
def test_bad_input_is_named(model: Any, asked: Any, error: type[Exception], says: str) -> None:
    forward = model.forward
    with pytest.raises(error, match=says):
        lamp_compile.compile(model, mode="eager", inplace=True, linears=asked)
    assert model.forward == forward
    assert not hasattr(model, "lamp")


def test_not_beside_a_plan_and_not_for_a_graph(model: Any) -> None:
    plan = lamp_compile.compile(model, mode="eager").lamp.plan
    with pytest.raises(OptionError, match="'linears' next to a plan"):
        lamp_compile.compile(model, plan=plan, linears="auto")
    encoder = nn.TransformerEncoderLayer(32, 2, batch_first=True).eval()
    with pytest.raises(OptionError, match="transformers decoders"):
        lamp_compile.compile(encoder, linears="int8")


@pytest.mark.parametrize(("windows", "budget"), [(torch.ones(4, dtype=torch.int64), 1.0), (None, -1.0), (None, "low")])
def test_bad_calibration_is_named(model: Any, ids: Tensor, windows: Any, budget: Any) -> None:
    with pytest.raises((InputError, OptionError)):
        calibrate(model, ids if windows is None else windows, budget=budget)


def test_hooked_layers_are_kept(model: Any) -> None:
    model.lm_head.register_forward_hook(lambda *args: None)
    rows = lamp_compile.compile(model, mode="eager", linears="int8").lamp.plan.linears
    assert [row.reason for row in rows if not row.apply] == ["it has hooks of its own"]
