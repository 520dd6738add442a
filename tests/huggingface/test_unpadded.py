"""Without padding ``generate`` makes no masks: length, causality and window say it all, and say the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

import lamp_compile
from lamp_compile.frontends.huggingface.attention import observing
from lamp_compile.frontends.huggingface.compiled import Lamp
from tests.huggingface import reference
from tests.huggingface.reference import EXACT

MASKLESS = ["Llama", "Mistral", "Qwen3", "Gemma 2", "Gemma 3", "gpt-oss", "GPT-2", "Phi-3", "Mixtral"]


def generated(fast: Any, ids: Tensor, **kwargs: Any) -> tuple[Tensor, set[bool]]:
    """Tokens, and whether attention was given masks."""
    masked: set[bool] = set()
    with observing(lambda module, q, k, v, arguments: masked.add(arguments["mask"] is not None)):
        tokens: Tensor = fast.generate(ids, **kwargs)
    return tokens, masked


@pytest.mark.parametrize("name", MASKLESS)
def test_no_mask_and_the_same_tokens(
    name: str, ids: Tensor, greedy: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    fast = lamp_compile.compile(reference.build(name), mode="eager", **EXACT)
    got, masked = generated(fast, ids, **greedy)
    assert masked == {False}
    assert torch.equal(generated(fast, ids, attention_mask=torch.ones_like(ids), **greedy)[0], got)
    monkeypatch.setattr(Lamp, "maskless", lambda self, config: False)
    wanted, masked = generated(fast, ids, **greedy)
    assert masked == {True}
    assert torch.equal(got, wanted)


def test_padding_brings_the_masks_back(fast: Any, ids: Tensor, greedy: dict[str, Any]) -> None:
    padding = torch.ones_like(ids)
    padding[1, :5] = 0
    assert generated(fast, ids, attention_mask=padding, **greedy)[1] == {True}


def test_it_ends_with_generate(fast: Any, ids: Tensor, greedy: dict[str, Any]) -> None:
    """Whoever goes on with the cache may pad; an error on the way changes nothing of that."""
    cache = fast.lamp.cache()
    fast.generate(ids, past_key_values=cache, **greedy)
    assert not cache.unpadded
    masked: set[bool] = set()
    with observing(lambda module, q, k, v, arguments: masked.add(arguments["mask"] is not None)), torch.no_grad():
        fast(ids[:, :1], past_key_values=cache)
    assert masked == {True}

    def fail(*args: Any, **kwargs: Any) -> Any:
        assert cache.unpadded
        raise KeyboardInterrupt

    cache.reset()
    with pytest.raises(KeyboardInterrupt):
        fast.generate(ids, past_key_values=cache, logits_processor=[fail], **greedy)
    assert not cache.unpadded


def test_a_layer_of_floats_keeps_the_masks(ids: Tensor, greedy: dict[str, Any]) -> None:
    """Its keys go on behind the newest one."""
    fast = lamp_compile.compile(reference.build("Llama"), mode="eager", fuel=1)
    assert generated(fast, ids, **greedy)[1] == {True}


def test_the_compiled_step_takes_no_mask(model: Any, ids: Tensor, greedy: dict[str, Any]) -> None:
    torch._dynamo.reset()
    counters.clear()
    wanted = lamp_compile.compile(model, mode="eager").generate(ids, **greedy)
    fast = lamp_compile.compile(model, mode="default")
    for _ in range(2):
        assert torch.equal(fast.generate(ids, **greedy), wanted)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    assert "mask=" not in fast.lamp.backend.reports[0].after
