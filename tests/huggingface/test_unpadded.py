"""Without padding ``generate`` makes no masks: length, causality and window say it all, and say the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import Gemma3Config, Gemma3ForConditionalGeneration
from transformers.masking_utils import (
    and_masks,
    causal_mask_function,
    or_masks,
    sliding_window_causal_mask_function,
    sliding_window_overlay,
)

import lamp_compile
from lamp_compile.errors import CacheError, InputError
from lamp_compile.frontends.huggingface.attention import lamp_mask, observing
from lamp_compile.frontends.huggingface.compiled import Lamp
from lamp_compile.runtime.kv_cache import Unmasked
from tests.huggingface import reference
from tests.huggingface.reference import EXACT

TINY_TEXT = {
    "vocab_size": 128, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention"],
}  # fmt: skip
TINY_VISION = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16,
    "patch_size": 4,
}  # fmt: skip
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


def test_a_models_own_pattern_keeps_its_masks(ids: Tensor) -> None:
    """Gemma 3 lets image tokens see each other: token types make masks, and generate as it did."""
    config = Gemma3Config(
        text_config=TINY_TEXT, vision_config=TINY_VISION, mm_tokens_per_image=4,
        image_token_index=127, boi_token_index=125, eoi_token_index=126,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Gemma3ForConditionalGeneration(config).eval()
    model.generation_config.eos_token_id = None
    fast = lamp_compile.compile(model, mode="eager", **EXACT)
    types = torch.zeros_like(ids)
    types[:, 3:7] = 1
    given = {"token_type_ids": types, "attention_mask": torch.ones_like(ids), **reference.GREEDY}
    tokens, masked = generated(fast, ids, **given)
    assert masked == {True}
    assert tokens.shape[1] == ids.shape[1] + reference.GREEDY["max_new_tokens"]


@pytest.mark.parametrize(
    ("asked", "plain"),
    [
        (causal_mask_function, True),
        (sliding_window_causal_mask_function(5), True),
        (and_masks(causal_mask_function, lambda b, h, q, k: k > 2), False),
        (and_masks(sliding_window_causal_mask_function(5), lambda b, h, q, k: k > 2), False),
        (or_masks(causal_mask_function, sliding_window_overlay(3)), False),
        (lambda b, h, q, k: q >= k, False),
    ],
)
def test_only_causality_and_a_window_need_no_mask(asked: Any, plain: bool) -> None:
    """Whatever else is laid over a window, ``local_size`` says nothing of it."""
    sizes = {"batch_size": 1, "q_length": 3, "q_offset": 0, "kv_offset": 0, "local_size": 5, "device": "cpu"}
    mask = lamp_mask(kv_length=Unmasked(8), mask_function=asked, attention_mask=None, **sizes)
    assert (mask is None) == plain
    if not plain:
        assert mask is not None
        assert mask.shape[-1] == 8
        with pytest.raises(InputError, match="a pattern of its own"):
            lamp_mask(kv_length=0, mask_function=asked, attention_mask=None, **sizes)


def test_a_compiled_loop_past_the_end_is_told(fast: Any, ids: Tensor) -> None:
    """A captured step cannot grow its cache; the next eager call says that rows were lost."""
    cache = fast.lamp.cache(128)
    with torch.no_grad():
        fast(ids, past_key_values=cache)
    for layer in cache.layers:
        layer.cumulative_length.fill_(130)
        layer._longest = layer.max_cache_len
    with pytest.raises(CacheError, match="130 tokens went into a cache of 128"), torch.no_grad():
        fast(ids[:, :1], past_key_values=cache)
