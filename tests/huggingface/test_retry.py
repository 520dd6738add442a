"""Steps done again at the raised floor: the result is that of the level from the start, and each row is stored once."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import lamp_compile
from lamp_compile.frontends.huggingface.supervise import RETRIED
from lamp_compile.runtime import guard, layout
from tests.huggingface import reference
from tests.huggingface.test_compiled import lowered_to_eager

pytestmark = pytest.mark.usefixtures("fresh_graphs", "one_thread")
LOOSE = {"tau": 1e6, "guard_budget": 1e9, "guard_window": 1}
"""Nothing is refined, and the guard lets it pass, until a test says otherwise."""
TINY = 1e-6


def build(model: Any, retry: bool = True, make: Any = None, **options: Any) -> Any:
    make = make or (lambda model, **o: lamp_compile.compile(model, mode="eager", **o))
    return make(model, guard_retry=retry, **{**LOOSE, **options})


def floors(cache: Any) -> Tensor:
    return torch.stack([layer.state[..., guard.FLOOR] for layer in cache.layers])


def counts(cache: Any, field: int) -> Tensor:
    return torch.stack([layer.stats[..., field] for layer in cache.layers])


def filled(fast: Any, ids: Tensor) -> Any:
    cache = fast.lamp.cache()
    reference.logits(fast, ids, past_key_values=cache)
    return cache


def planes(cache: Any, tokens: int) -> list[Tensor]:
    """Everything stored of the first tokens."""
    return [layer.k_scale[:, :, :tokens] for layer in cache.layers] + [
        layout.key_rows(layer.k_high)[:, :, :tokens] for layer in cache.layers
    ]


@pytest.mark.parametrize("heads", [(TINY, TINY), (TINY, 1e9)], ids=["all heads", "one head"])
def test_the_retried_step_is_one_at_that_level_from_the_start(
    model: Any, ids: Tensor, heads: tuple[float, ...]
) -> None:
    fast = build(model)
    cache = filled(fast, ids)
    other = copy.deepcopy(cache)
    for layer in other.layers:
        layer.state[:, [budget == TINY for budget in heads], guard.FLOOR] = 1.0
    token = ids[:, :1]
    wanted = reference.logits(fast, token, past_key_values=other)
    loose = reference.logits(fast, token, past_key_values=copy.deepcopy(cache))
    assert not torch.equal(wanted, loose), "the level must matter here"
    fast.lamp.controls.set(budget=heads)
    got = reference.logits(fast, token, past_key_values=cache)
    assert torch.equal(got, wanted)
    assert int(cache.get_seq_length()) == 41
    assert all(map(torch.equal, planes(cache, 41), planes(other, 41)))
    # Retried once: level 2 reads what level 1 reads, so rising there too asks for nothing.
    assert fast.lamp.statistics().events[RETRIED] == 1
    raised = torch.tensor([budget == TINY for budget in heads])
    assert bool((floors(cache)[:, :, raised] >= 1).all())
    assert not floors(cache)[:, :, ~raised].any()
    assert bool((counts(cache, guard.RAISED)[:, :, raised] >= 1).all()), "the rise stays counted"
    assert bool((counts(cache, guard.STEPS) == 2).all()), "a step that was taken back is not counted"


def test_off_by_default(model: Any, ids: Tensor) -> None:
    fast = build(model, retry=False)
    cache = filled(fast, ids)
    fast.lamp.controls.set(budget=TINY)
    reference.logits(fast, ids[:, :1], past_key_values=cache)
    assert bool((floors(cache) == 1).all())
    assert not fast.lamp.supervisor.active
    assert not fast.lamp.statistics().events


def test_a_fresh_cache_and_a_whole_prompt(model: Any, ids: Tensor) -> None:
    fast = build(model, guard_budget=TINY)
    cache = fast.lamp.cache()
    got = reference.logits(fast, ids, past_key_values=cache)
    plain = lamp_compile.compile(model, mode="eager", **{**LOOSE, "floor": 1})
    assert torch.equal(got, reference.logits(plain, ids))
    assert int(cache.get_seq_length()) == 40


def test_generate_in_a_graph_and_without(model: Any, ids: Tensor, greedy: dict[str, Any]) -> None:
    """A budget that is always exceeded: every step whose floor rises is one at level 1."""
    wanted = lamp_compile.compile(model, mode="eager", **{**LOOSE, "floor": 1}).generate(ids, **greedy)
    for make in (None, lowered_to_eager):
        fast = build(model, make=make, guard_budget=TINY, guard_hold=1000)
        cache = fast.lamp.cache()
        assert torch.equal(fast.generate(ids, past_key_values=cache, **greedy), wanted)
        assert int(cache.get_seq_length()) == 51
        assert fast.lamp.statistics().events[RETRIED] == 1, "once up, a floor that is held asks for no retry"


def test_slots(model: Any, ids: Tensor) -> None:
    fast, plain = build(model, guard_budget=TINY, guard_hold=1000), None
    plain = lamp_compile.compile(model, mode="eager", **{**LOOSE, "floor": 1})
    prompts = [ids[0, :20].tolist(), ids[1, :33].tolist()]
    ways = [dict(one.lamp.generate_many(prompts, max_new_tokens=4, eos_token_id=None)) for one in (fast, plain)]
    assert all(torch.equal(ways[0][i], ways[1][i]) for i in range(2))
    assert fast.lamp.statistics().events[RETRIED] >= 2, "each prompt's first step"


def test_a_nonfinite_step_is_retried_a_bounded_number_of_times(model: Any, ids: Tensor) -> None:
    fast = build(model)
    cache = filled(fast, ids)
    cache.layers[0].k_scale[0, 0, 5] = torch.nan
    reference.logits(fast, ids[:, :1], past_key_values=cache)
    assert fast.lamp.statistics().events[RETRIED] <= 2
    assert int(cache.get_seq_length()) == 41
    site = fast.lamp.statistics().sites[0]
    assert site.nonfinite >= 1
