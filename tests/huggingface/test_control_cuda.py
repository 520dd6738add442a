"""Control on a CUDA device, where steps are captured graphs and the host runs ahead. Skipped elsewhere."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

import lamp_compile
from lamp_compile.frontends.huggingface.supervise import RETRIED
from lamp_compile.runtime import guard
from tests.huggingface import reference
from tests.huggingface.test_retry import LOOSE, TINY
from tests.tolerances import DEVICES, ZOO

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.usefixtures("fresh_graphs"),
]
LONG = {"max_new_tokens": 40, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
A_SECOND = 2_000_000_000
"""Clock cycles that the device is kept busy: a second or so."""


@pytest.fixture
def model() -> Any:
    """The tiny Llama on the GPU."""
    return reference.build("Llama", "sdpa").cuda()


@pytest.fixture
def ids() -> Tensor:
    """Token ids ``[2, 40]``."""
    return torch.randint(3, 128, (2, 40), generator=torch.Generator().manual_seed(1)).cuda()


def taus(fast: Any) -> list[float]:
    return [value for name in fast.lamp.controls for value in fast.lamp.controls[name].tau.tolist()]


def one_graph() -> bool:
    return counters["stats"]["unique_graphs"] == 1 and counters["inductor"]["cudagraph_skips"] == 0


def test_the_controller_moves_tau_of_a_captured_graph(model: Any, ids: Tensor) -> None:
    fast = lamp_compile.compile(model, guard_window=4, guard_budget=10.0)
    assert fast.lamp.mode == "reduce-overhead"
    fast.lamp.controls.set(tau=0.2)
    with fast.lamp.control(error_budget=0.1, interval=1e6) as control:
        for _ in range(14):
            cache = fast.lamp.cache()
            fast.generate(ids, past_key_values=cache, **LONG)
            assert control.thread.tick()
        assert max(taus(fast)) < 0.2
        assert all(site.error < 0.1 * 1.2 for site in fast.lamp.statistics().sites)
    assert taus(fast) == pytest.approx([0.2] * 4), "the block is over: as before"
    assert one_graph()


def test_readings_and_settings_do_not_wait_for_the_model(model: Any, ids: Tensor) -> None:
    """The model's stream is busy for a second; a whole round of the controller ends before."""
    fast = lamp_compile.compile(model, mode="eager", guard_window=4, guard_budget=10.0)
    fast.lamp.controls.set(tau=0.2)
    with fast.lamp.control(error_budget=1e-3, interval=1e6) as control:
        cache = fast.lamp.cache()
        fast.generate(ids, past_key_values=cache, **LONG)
        assert control.thread.tick(), "the first round makes streams and page-locked memory"
        cache = fast.lamp.cache()
        fast.generate(ids, past_key_values=cache, **LONG)
        torch.cuda.synchronize()
        before, busy = control.thread.state.sites, torch.cuda.Event()
        torch.cuda._sleep(A_SECOND)
        busy.record()
        assert control.thread.tick()
        assert not busy.query(), "the round waited for the model's stream"
        assert control.thread.state.sites != before
        torch.cuda.synchronize()
        del cache


def test_a_retried_step_is_one_at_that_level_from_the_start(model: Any, ids: Tensor) -> None:
    fast = lamp_compile.compile(model, mode="eager", guard_retry=True, **LOOSE)
    cache = fast.lamp.cache()
    reference.logits(fast, ids, past_key_values=cache)
    other = copy.deepcopy(cache)
    for layer in other.layers:
        layer.state[..., guard.FLOOR] = 1.0
    token = ids[:, :1]
    wanted = reference.logits(fast, token, past_key_values=other)
    fast.lamp.controls.set(budget=TINY)
    got = reference.logits(fast, token, past_key_values=cache)
    assert torch.equal(got, wanted)
    assert fast.lamp.statistics().events[RETRIED] == 1
    assert int(cache.get_seq_length()) == 41


def test_retries_over_a_captured_graph(model: Any, ids: Tensor, greedy: dict[str, Any]) -> None:
    """A budget that is always exceeded: every step whose floor rises is one at level 1."""
    wanted = lamp_compile.compile(model, mode="eager", **{**LOOSE, "floor": 1}).generate(ids, **greedy)
    fast = lamp_compile.compile(model, guard_retry=True, **{**LOOSE, "guard_budget": TINY, "guard_hold": 1000})
    for _ in range(3):
        got = fast.generate(ids, **greedy)
        assert float((got == wanted).float().mean()) > 0.95
    assert fast.lamp.statistics().events[RETRIED] == 3, "once a generation: a floor that is held asks for no retry"
    assert counters["inductor"]["cudagraph_skips"] == 0


def test_the_exact_tier_lies_in_page_locked_memory(model: Any, ids: Tensor, greedy: dict[str, Any]) -> None:
    fast = lamp_compile.compile(model, exact_tier="host")
    fast.generate(ids, **greedy)
    assert not fast.lamp.statistics().events, "nothing is fetched that nobody asks for"
    fast.lamp.controls.set(floor=2)
    cache = fast.lamp.cache()
    got = reference.logits(fast, ids, past_key_values=cache)
    assert reference.relative(got, reference.logits(model, ids)) < ZOO["exact"].relative
    assert all(layer.copy.k.is_pinned() and layer.copy.k.device.type == "cpu" for layer in cache.layers)
    cache.reorder_cache(torch.tensor([1, 0], device="cuda"))
    cache.ensure_capacity(1000)
    assert all(layer.copy.k.is_pinned() for layer in cache.layers)


def test_a_nan_is_healed_from_the_host(model: Any, ids: Tensor) -> None:
    fast = lamp_compile.compile(model, exact_tier="host", guard_retry=True)
    cache = fast.lamp.cache()
    reference.logits(fast, ids, past_key_values=cache)
    cache.layers[1].v_scale[:, :, 3] = torch.nan
    got = reference.logits(fast, ids[:, :1], past_key_values=cache)
    assert got.isfinite().all()
    wanted = reference.logits(model, torch.cat((ids, ids[:, :1]), dim=1))[:, -1:]
    assert reference.relative(got, wanted) < 10 * DEVICES.relative


def test_shadow_steps_beside_a_captured_graph(model: Any, ids: Tensor, greedy: dict[str, Any]) -> None:
    plain, fast = lamp_compile.compile(model), lamp_compile.compile(model, shadow=0.5)
    tokens = [one.generate(ids, **greedy) for one in (plain, fast) for _ in range(2)]
    assert all(torch.equal(tokens[0], one) for one in tokens[1:])
    shadow = fast.lamp.statistics().shadow
    assert shadow["steps"] == 12
    assert all(0 < site["error"] < 0.5 for site in shadow["sites"].values())
    assert counters["inductor"]["cudagraph_skips"] == 0
