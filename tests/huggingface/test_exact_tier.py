"""Level 2: exact copies in the host's memory, layers that store 16 bits, layers that keep their attention."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import lamp_compile
from lamp_compile.errors import CacheError, ModelError, OptionError, PlanError
from lamp_compile.plan import Plan
from lamp_compile.runtime import guard
from lamp_compile.runtime.insured_layer import InsuredLayer
from tests.huggingface import reference
from tests.tolerances import ARITHMETIC, ZOO

pytestmark = pytest.mark.usefixtures("fresh_graphs", "one_thread")
FETCHED = "exact copies fetched"
BITS = {"k_format": "bf16", "v_format": "bf16", "rotation": "none", "query_bits": 0}


@pytest.fixture
def insured(model: Any) -> Any:
    return lamp_compile.compile(model, exact_tier="host")


def close(got: Tensor, wanted: Tensor) -> bool:
    return reference.relative(got, wanted) < ZOO["exact"].relative


def test_floor_2_is_the_original_model(insured: Any, model: Any, ids: Tensor, greedy: dict[str, Any]) -> None:
    insured.lamp.controls.set(floor=2)
    cache = insured.lamp.cache()
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    got = reference.logits(insured, ids, attention_mask=mask, past_key_values=cache)
    assert close(got[mask.bool()], reference.logits(model, ids, attention_mask=mask)[mask.bool()])
    assert torch.equal(insured.generate(ids, **greedy), model.generate(ids, **greedy))
    report = cache.guard_report()[0]
    assert report["flags"] == []
    assert insured.lamp.statistics().sites[0].exact_share == 1.0


def test_fetched_on_demand_only(insured: Any, ids: Tensor, greedy: dict[str, Any]) -> None:
    insured.generate(ids, **greedy)
    assert not insured.lamp.statistics().events
    insured.lamp.controls.set(floor=[0, 2], sites="model.layers.1.self_attn")
    insured.generate(ids, **greedy)
    assert insured.lamp.statistics().events == {FETCHED: 12}
    assert [site.exact_share > 0 for site in insured.lamp.statistics().sites] == [False, True]


def test_one_head_at_level_2(insured: Any, model: Any, ids: Tensor) -> None:
    """The other heads go on as the rule says: half of the error goes, not all of it."""
    wanted = reference.logits(model, ids)
    errors = []
    for floor in ([0, 0], [0, 2], [2, 2]):
        insured.lamp.controls.set(floor=floor)
        errors.append(reference.relative(reference.logits(insured, ids), wanted))
    assert errors[2] < ZOO["exact"].relative < errors[1] < errors[0]


def test_the_guard_reaches_it_and_comes_back(insured: Any, model: Any, ids: Tensor) -> None:
    """A NaN among the planes: level 2 at once, whose copies know nothing of it, and nothing is said to be missing."""
    cache = insured.lamp.cache()
    reference.logits(insured, ids, past_key_values=cache)
    cache.layers[1].v_scale[:, :, 3] = torch.nan
    spoilt = reference.logits(insured, ids[:, :1], past_key_values=cache)
    assert not spoilt.isfinite().all()
    assert bool((cache.layers[1].state[..., guard.FLOOR] == 2).all())
    healed = reference.logits(insured, ids[:, 1:2], past_key_values=cache)
    assert healed.isfinite().all()
    assert cache.guard_report()[1]["flags"] == [guard.flag_names(guard.NONFINITE)[0]]


def test_retry_heals_the_same_step(model: Any, ids: Tensor) -> None:
    fast = lamp_compile.compile(model, exact_tier="host", guard_retry=True)
    cache = fast.lamp.cache()
    reference.logits(fast, ids, past_key_values=cache)
    other = copy.deepcopy(cache)
    cache.layers[1].v_scale[:, :, 3] = torch.nan
    got = reference.logits(fast, ids[:, :1], past_key_values=cache)
    assert got.isfinite().all()
    other.layers[1].state[..., guard.FLOOR] = 2.0
    assert torch.equal(got, reference.logits(fast, ids[:, :1], past_key_values=other))
    assert fast.lamp.statistics().sites[1].nonfinite > 0


def test_copies_follow_every_operation(insured: Any, ids: Tensor) -> None:
    cache = insured.lamp.cache()
    reference.logits(insured, ids, past_key_values=cache)
    layer = cache.layers[0]
    k, v = (x.clone() for x in layer.copy.fetch(40))
    assert torch.equal(k, layer.exact_rows()[0])
    cache.reorder_cache(torch.tensor([1, 0]))
    assert torch.equal(layer.exact_rows()[0], k.flip(0))
    cache.batch_repeat_interleave(2)
    assert torch.equal(layer.exact_rows()[1], v.flip(0).repeat_interleave(2, 0))
    cache.batch_select_indices(torch.tensor([0, 3]))
    assert torch.equal(layer.exact_rows()[1], v.flip(0))
    cache.crop(-3)
    assert layer.exact_rows()[0].shape[2] == 37
    cache.ensure_capacity(1000)
    assert layer.copy.k.shape[0] >= 1000
    assert torch.equal(layer.exact_rows()[0], k.flip(0)[:, :, :37])
    assert cache.memory()["host_copy"] == sum(each.copy.nbytes for each in cache.layers)
    cache.reset()
    assert layer.exact_rows()[0].shape[2] == 0


@pytest.mark.parametrize("how", [{"num_beams": 3}, {"prompt_lookup_num_tokens": 3}], ids=["beams", "prompt lookup"])
def test_ways_to_decode(how: dict[str, Any], insured: Any, model: Any, ids: Tensor, greedy: dict[str, Any]) -> None:
    """Cropping and reordering, at level 2: the original's tokens."""
    insured.lamp.controls.set(floor=2)
    ids = torch.cat((ids[:1, :20], ids[:1, :20]), dim=1)
    both = [one.generate(ids, **{**greedy, **how}) for one in (insured, model)]
    assert torch.equal(*both)


def test_graphs_are_refused_and_auto_takes_eager(insured: Any, model: Any, ids: Tensor) -> None:
    assert insured.lamp.mode == "eager"
    assert any("exact_tier 'host': steps run in eager mode" in note for note in insured.lamp.report().notes)
    for mode in ("default", "reduce-overhead"):
        with pytest.raises(OptionError, match="cannot fetch from the host"):
            lamp_compile.compile(model, exact_tier="host", mode=mode)
        with pytest.raises(OptionError, match="cannot fetch from the host"):
            lamp_compile.compile(model, plan=insured.lamp.plan, mode=mode)
    with pytest.raises(CacheError, match="not of pages"):
        insured.lamp.slots(2, 256)
    with pytest.raises(ModelError, match="exact tier"):
        lamp_compile.DecodeStep(insured)
    with pytest.raises(OptionError, match="exact_tier 'host', which a graph cannot do"):
        lamp_compile.backend(exact_tier="host")
    with pytest.raises(PlanError, match="exact_tier is 'disk'"):
        lamp_compile.compile(model, exact_tier="disk")
    step: Any = torch.compile(insured.forward, backend="eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="needs eager steps"):
        step(ids[:, :1], past_key_values=insured.lamp.cache(), use_cache=True)
    assert lamp_compile.explain(model, exact_tier="host").rewritten


def test_chosen_layers_in_16_bits(model: Any, ids: Tensor, greedy: dict[str, Any]) -> None:
    """One layer keeps its own attention, one stores bf16: nothing is missing at floor 2, and reports say what runs."""
    made = lamp_compile.compile(model, mode="eager").lamp.plan
    first, second = made.sites
    plan = Plan.from_json(replace(made, sites=(replace(first, **BITS), replace(second, apply=False))).to_json())
    fast = lamp_compile.compile(model, mode="eager", plan=plan)
    fast.lamp.controls.set(floor=2)
    cache = fast.lamp.cache()
    got = reference.logits(fast, ids, past_key_values=cache)
    wanted = reference.logits(model, ids)
    assert reference.relative(got, wanted) < ARITHMETIC[torch.bfloat16].relative * 2
    (report,) = cache.guard_report()
    assert report["flags"] == []
    assert any("kernels store nested8, this is bf16" in note for note in fast.lamp.report().notes)
    assert fast.generate(ids, **greedy).shape == (2, 52)
    eight = lamp_compile.compile(model, mode="eager")
    eight.lamp.controls.set(floor=2)
    cache = eight.lamp.cache()
    reference.logits(eight, ids, past_key_values=cache)
    assert cache.guard_report()[0]["flags"] == [guard.flag_names(guard.EXACT_MISSING)[0]]


def test_a_16_bit_model_stores_its_own_numbers(model: Any, ids: Tensor) -> None:
    """In bf16 without rotation the planes are the model's keys and values, bit for bit."""
    model = model.to(torch.bfloat16)
    fast = lamp_compile.compile(model, mode="eager", **BITS)
    insured = lamp_compile.compile(model, exact_tier="host")
    caches = []
    for one in (fast, insured):
        one.lamp.controls.set(floor=2)
        caches.append(one.lamp.cache())
        reference.logits(one, ids, past_key_values=caches[-1])
    layer = caches[1].layers[0]
    assert isinstance(layer, InsuredLayer)
    stored = caches[0].layers[0].k_high.flatten(2, 3)[:, :, :40]
    assert torch.equal(stored, layer.exact_rows()[0])


def test_compiled_graphs_know_that_16_bits_are_there(model: Any, ids: Tensor, greedy: dict[str, Any]) -> None:
    from tests.huggingface.test_compiled import lowered_to_eager

    fast = lowered_to_eager(model, **BITS)
    fast.lamp.controls.set(floor=2)
    cache = fast.lamp.cache()
    fast.generate(ids, past_key_values=cache, **greedy)
    assert all(site["flags"] == [] for site in cache.guard_report())
