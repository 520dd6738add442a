"""The evaluation on a trained model: every row on the real runtime, against what it must be worse or better than."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

import lamp_compile
from lamp_compile.errors import InputError, OptionError
from lamp_compile.quality import load, rows, windows
from lamp_compile.quality.bisect import bisect
from lamp_compile.quality.engine import CompiledEngine
from lamp_compile.quality.evaluate import Evaluation
from lamp_compile.quality.metrics import Comparison
from lamp_compile.quality.rows import RowSpec
from tests.tolerances import ONE_FORWARD

CONTEXT, COUNT = 256, 2


def _engine(model, balance="auto"):
    return CompiledEngine(lamp_compile.compile(model, mode="eager", balance=balance, tau=0.05))


@pytest.fixture(scope="module")
def model(nano):
    return load.load_model(nano)


@pytest.fixture(scope="module")
def picked(nano, root):
    tokenizer = load.load_tokenizer(nano)
    ids = windows.token_ids(root / "examples/data/walden.txt", lambda text: tokenizer(text)["input_ids"])
    return windows.spread(ids, CONTEXT, COUNT)


@pytest.fixture(scope="module")
def evaluation(model, picked):
    made = Evaluation(model, picked, _engine)
    made.measure_all((*rows.STANDARD, *(spec.on_twin(30.0) for spec in rows.TWIN)))
    return made


@pytest.fixture
def row(evaluation):
    return lambda name, twin=0.0: evaluation.rows[name, twin, "any"]


def test_rows_stand_in_the_order_the_arithmetic_demands(row):
    assert row("bf16").kl < row("all_high").kl < row("lamp").kl < row("all_low").kl
    assert row("bf16").kl < 1e-4
    assert row("all_high").kl < 4e-4
    assert row("all_low").kl > 20 * row("all_high").kl
    assert row("fp8_kv").kl > 5 * row("all_high").kl


def test_looking_ahead_beats_both_controls_at_the_same_share(row):
    lamp, chance, fixed = row("lamp"), row("random_tiles"), row("static_tiles")
    assert 0.1 < lamp.refined_share < 0.9
    for control in (chance, fixed):
        assert lamp.refined_share <= control.refined_share < lamp.refined_share + 0.15, "a control is never handicapped"
    assert chance.kl > 8 * lamp.kl
    assert fixed.kl > lamp.kl


def test_bits_read_follow_from_the_share(row):
    assert row("bf16").bits_per_value == 16
    assert row("fp8_kv").bits_per_value == 8 + 16 / 64
    assert row("all_low").bits_per_value == 4 + 16 / 64
    assert row("all_high").bits_per_value == 8 + 16 / 64
    assert row("lamp").bits_per_value == pytest.approx(4 + 16 / 64 + 4 * row("lamp").refined_share, abs=0.02)
    assert (row("all_low").refined_share, row("all_high").refined_share) == (0.0, 1.0)


def test_cache_bytes_are_those_of_the_planes(row):
    values = 4 * 2 * CONTEXT * 2 * 64  # layers, kv heads, tokens, K and V, D
    assert row("lamp").kv_bytes == values * 8.25 / 8
    assert row("lamp").kv_bytes / row("bf16").kv_bytes < 0.52


def test_the_default_plan_does_not_mind_the_outlier_twin(row, evaluation):
    assert row("all_high", 30.0).kl < 1.5 * row("all_high").kl
    assert row("lamp", 30.0).kl < 1.5 * row("lamp").kl
    left_out = evaluation.measure(RowSpec("unbalanced", {"floor": 1}, twin=30.0, balance="never"))
    assert left_out.kl > 10 * row("all_high", 30.0).kl, "the twin must hurt a plan that does not balance"


@pytest.mark.parametrize("where", ["cpu_kernels", "reference_only"])
def test_one_forward_has_the_semantics_of_decoding(where, model, picked, request):
    """The window at once, by the reference, and token by token: the same logits, the same tiles refined."""
    request.getfixturevalue(where)
    fast = lamp_compile.compile(model, mode="eager", tau=0.05, guard_budget=math.inf)
    engine = CompiledEngine(fast)
    ids = picked[:1, :70]
    at_once = engine.run(ids, engine.plan)
    cache = fast.lamp.cache(70)
    with torch.no_grad():
        steps = [fast(input_ids=ids[:, i : i + 1], past_key_values=cache).logits for i in range(70)]
    # Not bit for bit: sums in another order now and then round a stored value or a query the other way.
    compared = Comparison()
    compared.add(torch.cat(steps, 1), at_once.logits, ids)
    assert compared.result().kl < ONE_FORWARD[where].bound
    share = {site["site"]: site["refined_share"] for site in cache.guard_report()}
    for name, tiles in at_once.tiles.items():
        live, refined = tiles.counts.tolist()
        assert share[name] == pytest.approx(refined / live, abs=0.01)


def test_json_rows_carry_the_agreed_keys(row):
    data = row("lamp").to_dict()
    assert {"name", "kl", "agreement", "perplexity_ratio", "bits_per_value", "refined_share"} <= set(data)
    assert "twin" not in data
    assert row("lamp", 30.0).to_dict()["twin"] == 30.0


def test_bisect_finds_a_planted_fault_on_the_real_model(model, picked):
    whole = lamp_compile.compile(model, mode="eager", tau=0.01)
    names = [site.name for site in whole.lamp.plan.sites]
    hurt = replace(whole.lamp.plan.sites[2], tau=1e6, rotation="none")
    plan = replace(whole.lamp.plan, sites=tuple(hurt if s.name == hurt.name else s for s in whole.lamp.plan.sites))

    def measure(fuel):
        fast = lamp_compile.compile(model, plan=plan, mode="eager", fuel=fuel)
        return Evaluation(model, picked[:1], lambda m, balance: CompiledEngine(fast)).measure(rows.LAMP).kl

    assert bisect(names, measure, limit=2e-3).culprit == names[2]


def test_a_control_needs_the_row_it_is_held_against(model, picked):
    with pytest.raises(OptionError, match="measure that row first"):
        Evaluation(model, picked[:1], _engine).measure(rows.RANDOM)


def test_only_float32_and_real_windows_are_measured(model, picked):
    with pytest.raises(InputError, match="windows"):
        Evaluation(model, picked[0], _engine)
    with pytest.raises(InputError, match="float32"):
        Evaluation(torch.nn.Linear(2, 2).bfloat16(), picked, _engine)
