"""Slots in other dtypes, under inference mode, and on a CUDA device as one captured graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

import lamp_compile
from tests.huggingface import reference
from tests.huggingface.test_slots import prompts, row, steps_alone
from tests.tolerances import TIPPED

on_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtypes(dtype: torch.dtype) -> None:
    fast = lamp_compile.compile(reference.build("Llama").to(dtype), mode="eager", floor=1)
    asked, fed = prompts((5, 70)), torch.tensor([[9, 8], [7, 6]])
    cache = fast.lamp.slots(streams=2, tokens=512, max_length=256)
    for prompt in asked:
        reference.logits(fast, row(prompt), past_key_values=cache.view(cache.admit(len(prompt))))
    found = torch.cat([reference.logits(fast, tokens[:, None], past_key_values=cache) for tokens in fed], dim=1)
    assert found.dtype == dtype
    for slot, prompt in enumerate(asked):
        wanted = steps_alone(fast, prompt, fed[:, slot])[1:]
        assert reference.relative(found[slot], wanted) < TIPPED[dtype].relative


def test_made_in_inference_mode_used_outside() -> None:
    fast = lamp_compile.compile(reference.build("Llama"), mode="eager")
    with torch.inference_mode():
        cache = fast.lamp.slots(streams=2, tokens=512, max_length=256)
        view = cache.view(cache.admit(20))
        fast(row([4, 5, 6]), past_key_values=view)
    fast(row([7]), past_key_values=view)
    with torch.inference_mode():
        fast(torch.tensor([[8], [0]]), past_key_values=cache)
    reference.logits(fast, torch.tensor([[9], [0]]), past_key_values=cache)
    assert cache.lengths.tolist() == [6, 0]
    cache.free(0)
    with torch.inference_mode():
        inside = dict(fast.lamp.generate_many(prompts((5, 9)), max_new_tokens=3, cache=cache))
    outside = dict(fast.lamp.generate_many(prompts((5, 9)), max_new_tokens=3, cache=cache))
    assert all(torch.equal(inside[index], outside[index]) for index in (0, 1))


@pytest.fixture
def on_device() -> Any:
    """The tiny Llama on the GPU."""
    torch._dynamo.reset()
    counters.clear()
    return reference.build("Llama", "sdpa").cuda()


@on_cuda
def test_slots_are_one_captured_graph(on_device: Any) -> None:
    fast = lamp_compile.compile(on_device)
    eager = lamp_compile.compile(on_device, mode="eager")
    cache = fast.lamp.slots(streams=3, tokens=1024, max_length=256)
    for seed in range(3):
        asked = prompts(seed=seed)
        found = dict(fast.lamp.generate_many(asked, max_new_tokens=8, cache=cache))
        wanted = dict(eager.lamp.generate_many(asked, max_new_tokens=8, streams=3))
        same = torch.cat([found[index] == wanted[index] for index in range(len(asked))])
        assert float(same.float().mean()) > 0.95
    assert counters["stats"]["unique_graphs"] == 1
    assert counters["inductor"]["cudagraph_skips"] == 0


@on_cuda
def test_slots_equal_a_cache_of_their_own(on_device: Any) -> None:
    fast = lamp_compile.compile(on_device, mode="eager", floor=1)
    cache = fast.lamp.slots(streams=2, tokens=1024, max_length=256)
    asked, fed = prompts((5, 130)), torch.tensor([[9], [8]])
    for prompt in asked:
        reference.logits(fast, row(prompt).cuda(), past_key_values=cache.view(cache.admit(len(prompt))))
    found = reference.logits(fast, fed.cuda(), past_key_values=cache)
    for slot, prompt in enumerate(asked):
        alone = fast.lamp.cache()
        reference.logits(fast, row(prompt).cuda(), past_key_values=alone)
        wanted = reference.logits(fast, fed[slot : slot + 1].cuda(), past_key_values=alone)
        assert reference.relative(found[slot : slot + 1], wanted) < 10 * TIPPED[torch.float32].relative


@on_cuda
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_host_waits_for_nothing_but_tokens_of_the_launch_before(on_device: Any, temperature: float) -> None:
    fast = lamp_compile.compile(on_device)
    cache = fast.lamp.slots(streams=3, tokens=1024, max_length=256)
    how: dict[str, Any] = {
        "max_new_tokens": 8,
        "cache": cache,
        "temperature": temperature,
        "eos_token_id": 7,
        "seed": 1,
    }
    wanted = dict(fast.lamp.generate_many(prompts(), **how))
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = dict(fast.lamp.generate_many(prompts(), **how))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert found.keys() == wanted.keys()
