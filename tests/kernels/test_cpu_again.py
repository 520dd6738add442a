"""The short way into the core, for a call that repeats: it must say nothing else, and be taken for nothing else."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lamp_compile.errors import InputError
from lamp_compile.runtime import fused_ops, guard, kernels
from lamp_compile.runtime.kernels import cpu
from lamp_compile.runtime.kernels.cpu import _again
from tests.kernels import calls
from tests.kernels.calls import Call

pytestmark = pytest.mark.skipif(cpu.why_not() is not None, reason="the core does not run here")


def run(call: Call) -> Tensor:
    out: Tensor = torch.ops.lamp.fused_attention(
        call.q, *call.planes, *call.hot, call.balance, *call.seen, **call.options
    )
    return out


def step(**given: Any) -> Call:
    return calls.make(lengths=torch.tensor([150, 97]), causal="bottom_right", **given)


def again(call: Call) -> Tensor | None:
    """By the short way alone."""
    settings = fused_ops.settings(call.options)
    return kernels.attend_again(call.q, (*call.planes, *call.hot, call.balance, *call.seen, *settings))


def fresh(call: Call) -> Call:
    """The same over copies of all tensors, which nothing is known of."""
    hot = tuple(x.clone() for x in call.hot)
    return replace(call, planes=tuple(x.clone() for x in call.planes), hot=hot)


@pytest.mark.parametrize("balanced", [False, True])
def test_a_repeated_call_gives_the_same_bits(balanced):
    balance = torch.rand(2, 64) + 0.5 if balanced else None
    first = step(balance=balance)
    assert again(first) is None
    run(first)
    for seed in (1, 2):
        more = replace(
            first, q=torch.randn_like(first.q), seen=(*first.seen[:4], torch.tensor([140 + seed, 150]), None)
        )
        other = fresh(more)
        out = again(more)
        assert out is not None, "the short way was not taken"
        assert torch.equal(out, run(other))
        for mine, theirs in zip(more.hot[3:], other.hot[3:], strict=True):
            assert torch.equal(mine, theirs), "the guard's state or statistics"


SEEN: dict[str, Callable[[], dict[str, Any]]] = {
    "mask": lambda: {"mask": torch.rand(2, 1, 1, 150) > 0.3},
    "mask of strides": lambda: {"mask": (torch.rand(150, 2) > 0.3).T[:, None, None]},
    "bias": lambda: {"bias": torch.randn(1, 4, 1, 150)},
    "sinks": lambda: {"sinks": torch.randn(4)},
    "start": lambda: {"start": torch.randint(0, 90, (2,))},
    "all": lambda: {"mask": torch.rand(2, 1, 1, 150) > 0.3, "bias": torch.randn(2, 1, 1, 1), "sinks": torch.randn(4)},
}


@pytest.mark.parametrize("name", SEEN)
def test_what_is_seen_may_be_other_tensors_in_every_step(name):
    first = step(**SEEN[name]())
    run(first)
    for seed in range(2):
        torch.manual_seed(seed)
        given = SEEN[name]()
        more = replace(first, seen=tuple(given.get(n, x) for n, x in zip(calls.NAMES, first.seen, strict=True)))
        other = fresh(more)
        out = again(more)
        assert out is not None, "the short way was not taken"
        assert torch.equal(out, run(other))


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("bias", torch.zeros(1, 1, 1, 150, dtype=torch.float64)),
        ("sinks", torch.zeros(1)),
        ("sinks", torch.zeros(4).half()),
    ],
)
def test_what_the_core_reads_a_copy_of_is_not_kept(name, given):
    call = step(**{name: given})
    run(call)
    assert again(call) is None


CHANGES: dict[str, Callable[[Call], Call]] = {
    "another dtype": lambda c: replace(c, q=c.q.bfloat16()),
    "other strides": lambda c: replace(c, q=torch.cat((c.q, c.q), dim=-1)[..., :64]),
    "more tokens": lambda c: replace(c, q=c.q.expand(-1, -1, 2, -1).contiguous()),
    "other planes": lambda c: replace(c, planes=(*c.planes[:5], c.planes[5].clone())),
    "another tau": lambda c: replace(c, hot=(c.hot[0] * 0, *c.hot[1:])),
    "another option": lambda c: replace(c, options={**c.options, "keys": 149}),
    "a mask": lambda c: replace(c, seen=(torch.rand(2, 1, 1, 150) > 0.5, *c.seen[1:])),
    "no lengths": lambda c: replace(c, seen=(None,) * 6),
    "lengths in 32 bits": lambda c: replace(c, seen=(*c.seen[:4], c.seen[4].int(), None)),
    "a balance": lambda c: replace(c, balance=torch.ones(2, 64)),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_call_that_differs_is_checked_anew(name):
    first = step()
    run(first)
    changed = CHANGES[name](first)
    assert again(changed) is None
    assert torch.equal(run(changed), run(fresh(changed)))


@pytest.mark.parametrize("place", range(11))
def test_memory_that_was_put_in_place_of_other_is_noticed(place):
    """A tensor that is still the same object need not lie where it lay."""
    first = step()
    run(first)
    changed = (*first.planes, *first.hot)[place]
    changed.data = changed.data.clone()
    assert again(first) is None
    run(first)
    assert again(first) is not None
    changed.data = changed.data[..., :-1]
    assert again(first) is None


def test_a_tensor_that_was_turned_in_place_is_noticed():
    """It lies where it lay, and is as large."""
    call = step()
    call = replace(call, hot=(torch.tensor([[0.1, 1e9], [0.0, 0.05]]), *call.hot[1:]))
    run(call)
    call.hot[0].t_()
    assert again(call) is None
    assert torch.equal(run(call), run(fresh(call)))


def test_what_does_not_fit_is_refused_as_ever():
    first = step()
    run(first)
    with pytest.raises(InputError):
        run(replace(first, q=first.q[:1]))
    with pytest.raises(InputError):
        run(replace(first, seen=(*first.seen[:4], torch.tensor([1.0, 2.0]), None)))


def test_settings_that_were_converted_are_not_kept():
    """A copy in float32 lives no longer than its call."""
    call = step()
    call = replace(call, hot=(call.hot[0].double(), *call.hot[1:]))
    run(call)
    assert again(call) is None


def test_switched_off_it_is_not_taken(monkeypatch):
    first = step()
    run(first)
    monkeypatch.setattr(kernels, "why_not_device", lambda kind: "off")
    assert again(first) is None


@pytest.mark.parametrize(("tokens", "kept"), [(cpu.MOST_REPEATED, True), (cpu.MOST_REPEATED + 1, False)])
def test_a_prompt_is_not_kept(tokens, kept):
    call = step(tokens=tokens)
    run(call)
    assert (again(call) is not None) == kept


def test_nothing_is_kept_of_planes_that_are_gone():
    gc.collect()  # what other tests left
    before = len(_again._known)
    call = step()
    run(call)
    assert len(_again._known) == before + 1
    del call
    gc.collect()
    assert len(_again._known) == before


def test_planes_that_outlive_many_states_keep_nothing_of_them():
    """Every prompt in a slot has a state of its own over the same pages."""
    call = step()
    run(call)
    known, held = len(_again._known), weakref.getweakrefcount(call.planes[0])
    finalizers = len(weakref.finalize._registry)
    for _ in range(5):
        run(replace(call, hot=(*call.hot[:3], call.hot[3].clone(), call.hot[4])))
    gc.collect()
    assert len(_again._known) == known
    assert weakref.getweakrefcount(call.planes[0]) == held
    assert len(weakref.finalize._registry) == finalizers


def test_two_sites_over_the_same_planes_are_both_kept():
    first, second = step(), step()
    second = replace(second, planes=first.planes)
    run(first)
    run(second)
    assert again(first) is not None
    assert again(second) is not None


def test_it_serves_the_steps_of_a_sequence():
    """State that the guard leaves is read by the next call, whichever way it comes."""
    call = step(budget=1e-6)
    other = fresh(call)
    for _ in range(3):
        run(call)
        _again._known.clear()
        run(other)
    assert torch.equal(call.hot[3], other.hot[3])
    assert int(call.hot[4][..., guard.RAISED].sum()) > 0
