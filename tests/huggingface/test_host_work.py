"""The host waits for the device nowhere in a prompt. On the meta device nothing can be read, and every copy from the
host, which waits for all that was launched unless its memory is pinned, can be seen."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import lamp_compile
from lamp_compile.frontends.huggingface import compiled
from lamp_compile.frontends.huggingface.many import ManyPrompts
from lamp_compile.runtime import prompt
from lamp_compile.runtime.controls import SiteControls
from lamp_compile.runtime.slot_cache import SlotCache
from tests.huggingface import reference
from tests.huggingface.test_slots import prompts

META = torch.device("meta")


class Crossings(TorchDispatchMode):
    """Notes operators with tensors of two devices."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor)]
        if len({x.device for x in tensors}) > 1:
            self.found.append(str(func))
        return out


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A compiled model without numbers, whose prompts go the way of a GPU."""
    made = lamp_compile.compile(reference.build("Llama", "sdpa").to(torch.bfloat16), mode="eager")
    layers = []
    for layer in made.lamp.spec.layers:
        hot = (getattr(layer.controls, name).to(META) for name in ("tau", "floor", "budget"))
        layers.append(replace(layer, controls=SiteControls(*hot), shape=replace(layer.shape, device=META)))
    made.lamp.spec = replace(made.lamp.spec, layers=tuple(layers))
    monkeypatch.setitem(prompt.LEAST_ROWS, "meta", 16)
    return made.to(META)


def read(fast: Any, cache: Any) -> None:
    ids = torch.zeros(1, 40, dtype=torch.int64, device=META)
    with torch.no_grad():
        assert fast(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits.device == META


def test_a_prompt_into_a_new_cache(fast: Any) -> None:
    cache = fast.lamp.cache(64)
    cache.unpadded = True
    with Crossings() as seen:
        read(fast, cache)
    assert seen.found == []


def test_a_prompt_into_a_slot(fast: Any) -> None:
    shapes = [replace(site.shape, device=META) for site in fast.lamp.sites]
    cache = SlotCache(fast.lamp.spec, shapes, streams=2, tokens=256, max_length=128)
    for _ in range(3):
        with Crossings() as seen:
            slot = cache.admit(64)
            view = cache.view(slot, upto=40)
        assert seen.found == ["aten._to_copy.default"], "the pages, from pinned memory"
        with Crossings() as seen:
            read(fast, view)
            cache.free(slot)
        assert seen.found == []


@pytest.mark.parametrize("behind", [0, 1, 2, 5])
def test_how_far_the_host_runs_ahead_changes_no_token(behind: int, monkeypatch: pytest.MonkeyPatch) -> None:
    fast = lamp_compile.compile(reference.build("Llama"), mode="eager")
    asked = prompts((5, 40, 17, 9, 30))
    endless = dict(fast.lamp.generate_many(asked, max_new_tokens=12, streams=2))
    eos = int(endless[1][40 + 3])

    def loop(*args: Any) -> ManyPrompts:
        made = ManyPrompts(*args)
        made.behind = behind
        return made

    monkeypatch.setattr(compiled, "ManyPrompts", loop)
    cache = fast.lamp.slots(streams=2, tokens=512, max_length=256)
    found = dict(fast.lamp.generate_many(asked, max_new_tokens=12, cache=cache, eos_token_id=eos))
    assert len(found) == 5
    for index, tokens in found.items():
        new = endless[index][len(asked[index]) :].tolist()
        assert tokens.tolist() == asked[index] + new[: new.index(eos) + 1 if eos in new else 12]
    assert cache.taken() == []
    assert cache.free_tokens == cache.capacity
