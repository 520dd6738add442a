"""Shadow steps: they find planted errors, change nothing, cost their share, and say what they compare with."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

import lamp_compile
from lamp_compile.errors import LampError, OptionError, PlanError
from lamp_compile.plan import Plan
from lamp_compile.runtime.shadow import COPIES, PLANES, SIXTEEN, Schedule
from tests.huggingface import reference
from tests.huggingface.test_compiled import lowered_to_eager
from tests.tolerances import ARITHMETIC

pytestmark = pytest.mark.usefixtures("fresh_graphs", "one_thread")


def shadowed(model: Any, ids: Tensor, greedy: dict[str, Any], **options: Any) -> Any:
    fast = lamp_compile.compile(model, mode="eager", **{"shadow": 1.0, **options})
    fast.generate(ids, **greedy)
    return fast


@pytest.mark.parametrize("share", [0.01, 0.07, 0.3, 0.5, 0.9, 1.0])
def test_schedule_has_its_share_in_every_stretch(share: float) -> None:
    schedule = Schedule(share, seed=3)
    due = [schedule.due() for _ in range(1000)]
    assert sum(due) == pytest.approx(1000 * share, abs=1)
    assert due == [again.due() for again in [Schedule(share, seed=3)] for _ in range(1000)]
    for first in range(0, 900, 100):
        assert abs(sum(due[first : first + 100]) - 100 * share) <= 2
    assert not any(Schedule(0.0).due() for _ in range(50))


@pytest.mark.parametrize("make", [None, lowered_to_eager], ids=["eager", "graph"])
def test_what_is_generated_does_not_depend_on_it(make: Any, model: Any, ids: Tensor, greedy: dict[str, Any]) -> None:
    def build(**options: Any) -> Any:
        return make(model, **options) if make else lamp_compile.compile(model, mode="eager", **options)

    plain, fast = build(), build(shadow=0.5)
    caches = [plain.lamp.cache(), fast.lamp.cache()]
    both = [one.generate(ids, past_key_values=c, **greedy) for one, c in zip((plain, fast), caches, strict=True)]
    assert torch.equal(*both)
    assert fast.lamp.statistics().shadow["steps"] == 6
    for one, other in zip(*(cache.layers for cache in caches), strict=True):
        assert torch.equal(one.state, other.state)
        assert torch.equal(one.stats, other.stats)
        assert torch.equal(one.k_scale[:, :, :51], other.k_scale[:, :, :51])


def test_cost_is_the_share_of_forwards(model: Any, ids: Tensor, greedy: dict[str, Any]) -> None:
    forwards = []
    handle = model.get_input_embeddings().register_forward_hook(lambda *args: forwards.append(1))
    try:
        for share in (0.0, 0.25, 1.0):
            forwards.clear()
            shadowed(model, ids, {**greedy, "max_new_tokens": 40}, shadow=share)
            probe = 1
            assert len(forwards) == probe + 40 + round(40 * share)
    finally:
        handle.remove()


def test_a_planted_error_is_found_and_said(model: Any, ids: Tensor, greedy: dict[str, Any]) -> None:
    small = shadowed(model, ids, greedy).lamp.statistics().shadow
    with pytest.warns(UserWarning, match="true error beyond the guard's budget"):
        fast = shadowed(model, ids, greedy, tau=1e6, guard_budget=0.05, guard_window=10**6)
    large = fast.lamp.statistics().shadow
    for name in small["sites"]:
        assert large["sites"][name]["error"] > 5 * small["sites"][name]["error"]
        assert large["sites"][name]["over_budget"] > small["sites"][name]["over_budget"] == 0
    assert large["kl"] > 10 * small["kl"]
    notes = "\n".join(fast.lamp.report().notes)
    assert "shadow: 12 steps, next token agrees in" in notes
    assert f"against {PLANES}" in notes


def test_what_it_compares_with_is_said(model: Any, ids: Tensor, greedy: dict[str, Any]) -> None:
    bits = {"k_format": "bf16", "v_format": "bf16", "rotation": "none", "query_bits": 16}
    for options, basis in (({}, PLANES), ({"exact_tier": "host"}, COPIES), (bits, SIXTEEN)):
        sites = shadowed(model, ids, greedy, **options).lamp.statistics().shadow["sites"]
        assert [site["basis"] for site in sites.values()] == [basis] * 2


def test_exact_copies_make_the_first_step_the_original_models(model: Any, ids: Tensor) -> None:
    """Of the first forward, all of which runs exactly: logits of the model without LAMP."""
    fast = lamp_compile.compile(model, mode="eager", exact_tier="host", shadow=1.0)
    seen = []
    fast.lamp.supervisor._compare = lambda exact, out, cache: seen.append(exact)
    reference.logits(fast, ids)
    wanted = reference.logits(model, ids)[:, -1]
    assert reference.relative(seen[0], wanted) < ARITHMETIC[torch.float32].relative * 10
    assert fast.lamp.statistics().shadow["sites"]["model.layers.0.self_attn"]["error"] > 1e-3, "storage is in it"


def test_slots(model: Any, ids: Tensor) -> None:
    prompts = [ids[0, :20].tolist(), ids[1, :33].tolist(), ids[0, :9].tolist()]
    tokens = []
    for share in (0.0, 1.0):
        fast = lamp_compile.compile(model, mode="eager", shadow=share)
        found = fast.lamp.generate_many(prompts, max_new_tokens=[6, 3, 4], streams=2, eos_token_id=None)
        tokens.append(dict(found))
    assert all(torch.equal(tokens[0][i], tokens[1][i]) for i in range(3))
    shadow = fast.lamp.statistics().shadow
    assert shadow["positions"] == 6 + 3 + 4, "an empty slot has no logits to compare"


def test_a_step_that_fails_half_way_leaves_the_cache_as_it_was(model: Any, ids: Tensor) -> None:
    fast = lamp_compile.compile(model, mode="eager", shadow=1.0)
    cache = fast.lamp.cache()
    reference.logits(fast, ids, past_key_values=cache)
    with pytest.raises(LampError):
        reference.logits(
            fast, ids[:, :1], past_key_values=cache, attention_mask=torch.ones(2, 1, 1, 7, dtype=torch.bool)
        )
    assert int(cache.get_seq_length()) == 40


def test_a_graph_of_ones_own_is_told(model: Any, ids: Tensor) -> None:
    fast = lamp_compile.compile(model, mode="eager", shadow=1.0)
    step: Any = torch.compile(fast.forward, backend="eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="a graph of your own does not do"):
        step(ids[:, :1], past_key_values=fast.lamp.cache(), use_cache=True)


def test_plans_and_options(model: Any) -> None:
    fast = lamp_compile.compile(model, mode="eager", shadow=0.01)
    again = Plan.from_json(fast.lamp.plan.to_json())
    assert again == fast.lamp.plan
    assert lamp_compile.compile(model, mode="eager", plan=again).lamp.supervisor.schedule.share == 0.01
    for share in (-0.1, 1.5, float("nan"), True):
        with pytest.raises(PlanError, match="shadow is"):
            lamp_compile.compile(model, shadow=share)
    with pytest.raises(OptionError, match="'shadow' next to a plan"):
        lamp_compile.compile(model, plan=again, shadow=0.5)
    with pytest.raises(OptionError, match="shadow steps, which a graph cannot do"):
        lamp_compile.backend(plan=again)
    with pytest.raises(OptionError, match="shadow is for transformers decoders"):
        lamp_compile.compile(torch.nn.MultiheadAttention(32, 2).eval(), shadow=0.1)


def test_quiet_where_nothing_is_wrong(model: Any, ids: Tensor, greedy: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        shadowed(model, ids, greedy)
