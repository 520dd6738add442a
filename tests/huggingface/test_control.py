"""The precision controller on a model: it moves tau from readings, in a step's shadow, and every fault is said."""

from __future__ import annotations

import copy
import gc
import math
import threading
import time
import warnings
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import lamp_compile
from lamp_compile.errors import OptionError, PlanError
from lamp_compile.frontends.huggingface import route
from lamp_compile.plan import Plan
from lamp_compile.runtime import guard, ledger, readings
from lamp_compile.runtime.controller_thread import StepClock
from lamp_compile.runtime.readings import Reader
from tests.huggingface import reference

pytestmark = pytest.mark.usefixtures("one_thread")
LONG = {"max_new_tokens": 40, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
SLOW = {"interval": 1e6}
"""The thread sleeps: a test takes its turns by hand."""


@pytest.fixture
def fast(model: Any) -> Any:
    """With a short window, so that few tokens are a reading."""
    made = lamp_compile.compile(model, mode="eager", guard_window=4, guard_budget=10.0)
    yield made
    if made.lamp.controller is not None:
        made.lamp.controller.stop()


def taus(fast: Any) -> list[list[float]]:
    return [fast.lamp.controls[name].tau.tolist() for name in fast.lamp.controls]


def turn(fast: Any, ids: Tensor) -> None:
    """Some steps, and one reading by hand."""
    fast.generate(ids, **LONG)
    assert fast.lamp.controller.thread.tick()


def keep(fast: Any, ids: Tensor) -> Any:
    """Some steps over a cache that lives on."""
    cache = fast.lamp.cache()
    fast.generate(ids, past_key_values=cache, **LONG)
    return cache


def test_an_error_budget_is_held(fast: Any, ids: Tensor) -> None:
    """From a tau that is far too large, on the real estimate of a real model, down into the budget; then it rests."""
    fast.lamp.controls.set(tau=0.2)
    kept = []
    with fast.lamp.control(error_budget=0.1, **SLOW) as control:
        for _ in range(14):
            kept[:] = [keep(fast, ids[:1])]
            control.thread.tick()
        path = [taus(fast)]
        assert path[0] != [[pytest.approx(0.2)] * 2] * 2
        errors = [site.error for site in fast.lamp.statistics().sites]
        assert all(error < 0.1 * 1.2 for error in errors)
        status = control.status()
        assert status["readings"] == 14
        assert all(site["verdict"] in ("settled", "moving", "out of reach") for site in status["sites"].values())
        assert any("controller: running, 14 readings" in note for note in fast.lamp.report().notes)
    assert taus(fast) == [pytest.approx([0.2, 0.2])] * 2, "the block is over: as before"
    assert all(site.by_controller > 0 for site in fast.lamp.statistics().sites)


def test_the_thread_does_it_by_itself(fast: Any, ids: Tensor) -> None:
    fast.lamp.controls.set(tau=0.2)
    cache = keep(fast, ids)
    control = fast.lamp.control(error_budget=0.02, interval=0.005)
    end = time.monotonic() + 20
    while control.status()["readings"] < 2 and time.monotonic() < end:
        fast.generate(ids[:, :1], past_key_values=None, **LONG)
        cache = keep(fast, ids[:1])
    assert control.status()["readings"] >= 2
    assert max(max(row) for row in taus(fast)) < 0.2
    control.stop()
    assert max(max(row) for row in taus(fast)) < 0.2, "stop() leaves what was found"
    control.stop(restore=True)
    assert taus(fast) == [pytest.approx([0.2, 0.2])] * 2
    del cache


def test_heads_keep_what_they_differ_in(fast: Any, ids: Tensor) -> None:
    fast.lamp.controls.set(tau=[0.01, 0.04])
    with fast.lamp.control(error_budget=1e-3, **SLOW) as control:
        cache = keep(fast, ids)
        control.thread.tick()
        low, high = taus(fast)[0]
        assert low < 0.01
        assert high / low == pytest.approx(4.0, rel=1e-4)
    del cache


def test_who_holds_tau(fast: Any) -> None:
    control = fast.lamp.control(error_budget=0.1, **SLOW)
    with pytest.raises(OptionError, match="a controller holds tau"):
        fast.lamp.controls.set(tau=0.5)
    fast.lamp.controls.set(floor=1)
    with pytest.raises(OptionError, match="a controller is at work"):
        fast.lamp.control(quality=0.99)
    control.stop()
    fast.lamp.controls.set(tau=0.05)
    assert [site.by_user for site in fast.lamp.statistics().sites] == [2, 2]
    with fast.lamp.control(quality=0.99, **SLOW):
        pass


def test_death_is_survived_and_said(fast: Any, ids: Tensor) -> None:
    control = fast.lamp.control(error_budget=0.1, interval=0.002)

    def read() -> None:
        raise RuntimeError("no more readings")

    control.thread._read = read
    end = time.monotonic() + 10
    while control.thread.status != "died" and time.monotonic() < end:
        time.sleep(0.005)
    with pytest.warns(UserWarning, match=r"controller died \(RuntimeError: no more readings\)"):
        tokens = fast.generate(ids, **LONG)
    assert tokens.shape == (2, 80)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        fast.generate(ids, **LONG)
    assert any("died 1 times" in note for note in fast.lamp.report().notes)
    fast.lamp.controls.set(tau=0.02)  # nobody holds it
    control.thread._read = lambda: None
    control.start()
    assert control.running
    control.stop()


def test_a_model_that_is_gone_takes_its_thread_along(model: Any) -> None:
    fast = lamp_compile.compile(model, mode="eager", control={"quality": 0.99, "interval": 0.01})
    assert fast.lamp.controller.running
    gone, thread = weakref.ref(fast.lamp), fast.lamp.controller.thread._thread
    del fast
    gc.collect()
    assert gone() is None
    thread.join(5)
    assert not thread.is_alive()
    assert not any(t.name == "lamp-controller" for t in threading.enumerate())


def test_a_nonfinite_step_backs_off_and_is_counted(fast: Any, ids: Tensor) -> None:
    with fast.lamp.control(error_budget=0.1, **SLOW) as control:
        cache = keep(fast, ids)
        control.thread.tick()
        before = taus(fast)
        cache.layers[0].v_scale[:, :, 3] = torch.nan
        fast.generate(torch.cat((ids, ids), 1), past_key_values=cache, **LONG)
        control.thread.tick()
        assert all(new < old for old, new in zip(before[0], taus(fast)[0], strict=True))
        assert control.status()["backed_off"] >= 1
    assert fast.lamp.statistics().sites[0].nonfinite > 0


def test_sudden_shifts_of_the_text(nano: Path, root: Path) -> None:
    """Prose, code, one token over and over, prose again, in one cache: bounded, counted, nothing silent."""
    tokenizer = AutoTokenizer.from_pretrained(nano)
    model = AutoModelForCausalLM.from_pretrained(nano, dtype=torch.float32).eval()
    prose, code = (
        tokenizer((root / file).read_text()[3000:6000], return_tensors="pt").input_ids[:, :128]
        for file in ("examples/data/walden.txt", "lamp_compile/plan.py")
    )
    fast = lamp_compile.compile(model, mode="eager", guard_window=4, guard_budget=0.11, guard_hold=8, tau=0.25)
    cache, errors = fast.lamp.cache(), []
    with fast.lamp.control(error_budget=0.06, **SLOW) as control:
        for kind in (prose, code, torch.full_like(prose, int(prose[0, 5])), prose):
            for first in range(0, 128, 8):
                reference.logits(fast, kind[:, first : first + 8], past_key_values=cache)
            assert control.thread.tick()
            sites = fast.lamp.statistics().sites
            errors.append([site.error for site in sites])
            assert all(1e-4 <= tau <= 0.25 for site in sites for tau in site.tau)
            assert all(site.error < 0.11 or max(site.floor) > 0 for site in sites), "seen by the guard, or by none"
        verdicts = {site["verdict"] for site in control.status()["sites"].values()}
    assert sum(errors[2]) < 0.7 * sum(errors[1]), "the kinds do differ"
    assert all(tau < 0.25 for name in control.status()["sites"].values() for tau in [name["tau"]])
    assert "waiting" not in verdicts
    raised, lowered = (sum(getattr(site, name) for site in sites) for name in ("over_budget", "lowered"))
    levels = sum(int(layer.state[..., guard.FLOOR].sum()) for layer in cache.layers)
    assert raised > 0, "the guard has acted"
    assert raised - lowered == levels, "each level is accounted for"
    assert any(f"guard: {raised} floors raised" in note for note in fast.lamp.report().notes)


def test_speed_needs_times_and_gets_them(fast: Any, ids: Tensor) -> None:
    with fast.lamp.control(speed=1e9, **SLOW) as control:
        fast.lamp.controls.set(budget=math.inf)
        cache = keep(fast, ids)
        before = taus(fast)
        control.thread.tick()
        assert all(new > old for a, b in zip(before, taus(fast), strict=True) for old, new in zip(a, b, strict=True))
    del cache


def test_readings_undo_wraps_and_notice_resets(fast: Any, ids: Tensor) -> None:
    cache = keep(fast, ids)
    for layer in cache.layers:
        layer.stats[..., guard.LIVE] = 2**63 - 5
    reader = Reader(fast.lamp.spec.ledger, dict.fromkeys(fast.lamp.controls, 4), StepClock())
    assert reader.read() is not None
    for layer in cache.layers:
        layer.stats[..., guard.LIVE] += 20  # over the end
        layer.stats[..., guard.STEPS] += 20
    reading = reader.read()
    assert [site.live for site in reading.sites] == [20 * 4, 20 * 4]
    assert reader.set_back == 0
    cache.reset()
    fast.generate(ids, past_key_values=cache, **LONG)
    reading = reader.read()
    assert [site.steps for site in reading.sites] == [40 * 4, 40 * 4]
    assert reader.set_back > 0
    assert reader.read() is None, "nothing new"
    assert readings.WINDOWS * 4 == 8
    reference.logits(fast, ids[:, :1], past_key_values=cache)
    assert reader.read() is None, "too few steps to judge by"


def test_caches_that_come_and_go_between_two_readings_are_read(
    fast: Any, ids: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    with fast.lamp.control(error_budget=0.1, **SLOW) as control:
        for _ in range(3):
            fast.generate(ids, **LONG)
        gc.collect()
        assert not fast.lamp.spec.ledger.caches()
        kept = keep(fast, ids)
        reading = control._reader.read()
        assert [site.steps for site in reading.sites] == [4 * 40 * 4] * 2
        assert all(site.error > 0 for site in reading.sites)
        reference.logits(fast, ids[:, :1], past_key_values=kept)
        del kept
        gc.collect()
        fast.generate(ids, **LONG)
        gc.collect()
        assert [site.steps for site in control._reader.read().sites] == [41 * 4] * 2, "what was read is not read again"
        monkeypatch.setattr(ledger, "MOST_GONE", len(fast.lamp.spec.ledger.gone))
        fast.generate(ids, **LONG)
        gc.collect()
        assert control.status()["unread"] > 0, "a full queue is counted"
    assert [site.steps for site in fast.lamp.statistics().sites] == [6 * 40 * 4 + 4] * 2, "the ledger has all"


def test_statistics_outlive_caches(fast: Any, ids: Tensor) -> None:
    fast.generate(ids, **LONG)
    cache = keep(fast, ids)
    cache.reset()
    fast.generate(ids, past_key_values=cache, **LONG)
    copied = copy.deepcopy(cache)
    assert [site.steps for site in fast.lamp.statistics().sites] == [3 * 40 * 4] * 2
    slots = fast.lamp.slots(1, 256)
    for _ in range(2):
        slot = slots.admit(60)
        reference.logits(fast, ids[:1], past_key_values=slots.view(slot))
        slots.free(slot)
    assert [site.steps for site in fast.lamp.statistics().sites] == [(3 * 40 * 2 + 2) * 2] * 2
    del copied


def test_memory_becomes_a_capacity(fast: Any) -> None:
    with pytest.raises(OptionError, match="moves no byte"):
        fast.lamp.control(memory=1e9)
    for memory in (200_000, 1_000_000, 12_345_678):
        tokens = fast.lamp.tokens_for(memory, batch=2)
        cache = fast.lamp.cache(tokens)
        reference.logits(fast, torch.zeros(2, 1, dtype=torch.long), past_key_values=cache)
        assert cache.nbytes <= memory
        assert cache.nbytes > 0.7 * memory
    for memory in (10, 0, -1, float("nan"), float("inf")):
        with pytest.raises(OptionError, match="bytes for 1 sequences"):
            fast.lamp.tokens_for(memory)


def test_contradictions_and_bad_options_are_found_at_once(model: Any, fast: Any) -> None:
    for options, error, says in (
        ({"error_budget": 10.0}, OptionError, "contradicts the guard"),
        ({"quality": 0.99, "error_budget": 0.1}, PlanError, "contradict each other"),
        ({"error_budget": 0}, PlanError, "error_budget is 0"),
        ({"qualtiy": 0.99}, OptionError, "unknown option 'qualtiy'"),
        ({}, PlanError, "nothing to hold"),
    ):
        with pytest.raises(error, match=says):
            fast.lamp.control(**options)
        with pytest.raises(error, match=says):
            lamp_compile.compile(model, mode="eager", inplace=True, guard_budget=10.0, control=options)
        assert not hasattr(model, "lamp"), "nothing is half-changed"
    for control in (0.99, "quality"):
        with pytest.raises(OptionError, match="control is a"):
            lamp_compile.compile(model, control=control)
    with pytest.raises(OptionError, match="control is for transformers decoders"):
        lamp_compile.compile(torch.nn.MultiheadAttention(32, 2).eval(), control={"quality": 0.99})
    with pytest.raises(OptionError, match="no site has a residual plane"):
        lamp_compile.compile(model, mode="eager", k_format="int8", v_format="int8", control={"quality": 0.99})
    fast.lamp.controls.set(tau=0.0)
    with pytest.raises(OptionError, match="tau starts at 0"):
        fast.lamp.control(quality=0.99)
    assert not any(t.name == "lamp-controller" for t in threading.enumerate())


def test_plans_carry_it(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fast = lamp_compile.compile(model, mode="eager", control={"quality": 0.99, "relation": [0.001, 0.01, 0.5]})
    fast.lamp.controller.stop()
    again = Plan.from_json(fast.lamp.plan.to_json())
    assert again == fast.lamp.plan
    other = lamp_compile.compile(model, mode="eager", plan=again)
    assert other.lamp.controller.running
    assert other.lamp.controller.status()["calibrated"]
    other.lamp.controller.stop()
    monkeypatch.setattr(route, "trace_decoding", lambda *args: None)
    explained = lamp_compile.explain(model, control={"quality": 0.99})
    assert explained.plan.control.quality == 0.99
    assert not any(t.name == "lamp-controller" for t in threading.enumerate())
    with pytest.raises(PlanError, match="unknown field 'qualty'"):
        Plan.from_json(fast.lamp.plan.to_json().replace('"quality"', '"qualty"'))
    with pytest.raises(OptionError, match="a controller, which a graph cannot do"):
        lamp_compile.backend(plan=again)


def test_what_is_generated_is_the_same_while_tau_rests(model: Any, ids: Tensor) -> None:
    plain = lamp_compile.compile(model, mode="eager")
    fast = lamp_compile.compile(model, mode="eager", control={"quality": 0.99, **SLOW})
    assert torch.equal(fast.generate(ids, **LONG), plain.generate(ids, **LONG))
    assert "uncalibrated" in "\n".join(fast.lamp.report().notes)
    fast.lamp.controller.stop()
