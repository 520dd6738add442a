"""Every way to decode, against the original model over the same dequantised keys and values."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import lamp_compile
from tests.huggingface import reference
from tests.huggingface.reference import EXACT
from tests.tolerances import ARITHMETIC, MODEL, MOVED, TIPPED, Tolerance

DECODERS = [
    "Llama",
    "Mistral",
    "Qwen2",
    "Qwen3",
    "Gemma 2",
    "Gemma 3",
    "Phi-3",
    "GPT-2",
    "GPT-NeoX",
    "OLMo-2",
    "Mixtral",
]
DECODERS += ["gpt-oss"]


@pytest.mark.parametrize("name", DECODERS)
def test_greedy_equals_dequantised_reference(name: str, ids: Tensor, greedy: dict[str, Any]) -> None:
    model = reference.build(name)
    fast = lamp_compile.compile(model, mode="eager", **EXACT)
    assert len(fast.lamp.report().rewritten) == 2
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    wanted = model.generate(
        ids,
        attention_mask=mask,
        past_key_values=reference.dequantised_cache(fast.lamp.spec),
        disable_compile=True,
        **greedy,
    )
    cache = fast.lamp.cache()
    assert torch.equal(fast.generate(ids, attention_mask=mask, past_key_values=cache, **greedy), wanted)
    assert all(site["steps"] == 12 and site["refined_share"] == 1.0 for site in cache.guard_report())
    got = reference.logits(fast, ids, attention_mask=mask)
    over_planes = reference.logits(
        model, ids, attention_mask=mask, past_key_values=reference.dequantised_cache(fast.lamp.spec)
    )
    seen = mask.bool()
    assert reference.relative(got[seen], over_planes[seen]) < TIPPED[torch.float32].relative
    assert reference.relative(got[seen], reference.logits(model, ids, attention_mask=mask)[seen]) < MODEL.relative


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype: torch.dtype, model: Any, ids: Tensor, greedy: dict[str, Any]) -> None:
    model = model.to(dtype)
    fast = lamp_compile.compile(model, mode="eager", **EXACT)
    cache = reference.dequantised_cache(fast.lamp.spec)
    got, wanted = reference.logits(fast, ids), reference.logits(model, ids, past_key_values=cache)
    assert got.dtype == dtype
    assert reference.relative(got, wanted) < TIPPED[dtype].relative
    assert fast.generate(ids, **greedy).shape == (2, 52)


@pytest.mark.parametrize(
    "how",
    [
        {"num_beams": 3},
        {"do_sample": True, "num_return_sequences": 2},
        {"do_sample": True, "num_beams": 2},
        {"prompt_lookup_num_tokens": 3},
    ],
    ids=["beams", "sampling", "beam sampling", "prompt lookup"],
)
def test_ways_to_decode(how: dict[str, Any], model: Any, ids: Tensor, greedy: dict[str, Any]) -> None:
    fast = lamp_compile.compile(model, mode="eager", **EXACT)
    ids = torch.cat((ids[:1, :20], ids[:1, :20]), dim=1) if "prompt_lookup_num_tokens" in how else ids
    results = []
    for which, cache in ((model, reference.dequantised_cache(fast.lamp.spec)), (fast, fast.lamp.cache())):
        torch.manual_seed(5)
        results.append(which.generate(ids, past_key_values=cache, disable_compile=True, **{**greedy, **how}))
    assert torch.equal(*results)


def test_assisted(model: Any, ids: Tensor, greedy: dict[str, Any]) -> None:
    fast = lamp_compile.compile(model, mode="eager", **EXACT)
    assistant = reference.build("Llama")
    with torch.no_grad():
        assistant.lm_head.weight.add_(0.05 * torch.randn_like(assistant.lm_head.weight))
    wanted = fast.generate(ids[:1], **greedy)
    assert torch.equal(fast.generate(ids[:1], assistant_model=assistant, **greedy), wanted)
    helped_by_lamp = lamp_compile.compile(assistant, mode="eager")
    assert torch.equal(fast.generate(ids[:1], assistant_model=helped_by_lamp, **greedy), wanted)


@pytest.mark.parametrize(
    ("where", "bound"),
    [("cpu_kernels", MOVED), ("reference_only", TIPPED[torch.float32])],
    ids=["kernels", "reference"],
)
def test_left_padding_changes_no_row(
    where: str, bound: Tolerance, fast: Any, ids: Tensor, request: pytest.FixtureRequest
) -> None:
    request.getfixturevalue(where)
    alone = reference.logits(fast, ids[:1, 5:])
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    position_ids = (mask.cumsum(1) - 1).clamp(min=0)
    padded = reference.logits(fast, ids, attention_mask=mask, position_ids=position_ids)
    assert reference.relative(padded[:1, 5:], alone) < bound.relative
    assert padded.isfinite().all(), "a query that sees nothing must give zeros"


def test_turns_reuse_and_crop_a_cache(fast: Any, ids: Tensor, greedy: dict[str, Any]) -> None:
    cache = fast.lamp.cache()
    first = fast.generate(ids[:1], past_key_values=cache, **greedy)
    assert int(cache.get_seq_length()) == first.shape[1] - 1
    turn = torch.cat((first, ids[1:, :7]), dim=1)
    second = fast.generate(turn, past_key_values=cache, **greedy)
    assert torch.equal(second, fast.generate(turn, **greedy)), "the kept planes must serve as well as new ones"
    cache.crop(turn.shape[1] - int(cache.get_seq_length()) - 1)
    assert int(cache.get_seq_length()) == turn.shape[1] - 1
    assert torch.equal(fast.generate(turn, past_key_values=cache, **greedy), second)


def test_manual_loop(fast: Any, ids: Tensor, greedy: dict[str, Any]) -> None:
    with torch.no_grad():
        out = fast(ids)
        tokens, cache = [out.logits[:, -1].argmax(-1)], out.past_key_values
        assert isinstance(cache, lamp_compile.NestedCache)
        for _ in range(11):
            out = fast(tokens[-1][:, None], past_key_values=cache)
            assert out.past_key_values is cache
            tokens.append(out.logits[:, -1].argmax(-1))
    assert torch.equal(torch.stack(tokens, 1), fast.generate(ids, **greedy)[:, 40:])


def test_growth_in_the_middle(fast: Any, ids: Tensor) -> None:
    """A cache that must grow while decoding gives what one of the right size gives."""
    prompt, steps = torch.cat((ids, ids, ids), dim=1), torch.cat((ids[:, :4], ids[:, :8]), dim=1)
    logits = []
    for cache in (fast.lamp.cache(1), fast.lamp.cache(256)):
        reference.logits(fast, prompt, past_key_values=cache)
        each = [reference.logits(fast, steps[:, i : i + 1], past_key_values=cache) for i in range(12)]
        logits.append(torch.cat(each, dim=1))
        assert cache.capacity == 256
    assert reference.relative(*logits) < ARITHMETIC[torch.float32].relative


def test_scaling_is_the_models(model: Any, ids: Tensor) -> None:
    for layer in model.model.layers:
        layer.self_attn.scaling *= 2.5
    fast = lamp_compile.compile(model, mode="eager", **EXACT)
    wanted = reference.logits(model, ids, past_key_values=reference.dequantised_cache(fast.lamp.spec))
    assert reference.relative(reference.logits(fast, ids), wanted) < TIPPED[torch.float32].relative


def test_foreign_cache_switches_off_and_says_so_once(model: Any, fast: Any, ids: Tensor) -> None:
    with pytest.warns(UserWarning, match="DynamicCache: LAMP is off"):
        off = reference.logits(fast, ids, past_key_values=DynamicCache())
    assert reference.relative(off, reference.logits(model, ids)) < ARITHMETIC[torch.float32].relative
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reference.logits(fast, ids, past_key_values=DynamicCache())


def test_without_cache_is_the_original(model: Any, fast: Any, ids: Tensor) -> None:
    with pytest.warns(UserWarning, match="use_cache is False: LAMP is off"):
        got = reference.logits(fast, ids, use_cache=False)
    wanted = reference.logits(model, ids, use_cache=False)
    with pytest.warns(UserWarning, match="DynamicCache: LAMP is off"):  # another reason is said too
        reference.logits(fast, ids, past_key_values=DynamicCache())
    assert reference.relative(got, wanted) < ARITHMETIC[torch.float32].relative


@pytest.mark.parametrize("name", ["Gemma 2", "gpt-oss"])
def test_soft_cap_and_sinks_without_cache(name: str, ids: Tensor) -> None:
    model = reference.build(name)
    fast = lamp_compile.compile(model, mode="eager")
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    got = reference.logits(fast, ids, attention_mask=mask, use_cache=False)
    wanted = reference.logits(model, ids, attention_mask=mask, use_cache=False)
    assert reference.relative(got[mask.bool()], wanted[mask.bool()]) < ARITHMETIC[torch.float32].relative


def test_refused_layers_keep_floats_in_the_same_cache(model: Any, ids: Tensor, greedy: dict[str, Any]) -> None:
    fast = lamp_compile.compile(model, mode="eager", fuel=1, **EXACT)
    report = fast.lamp.report()
    assert (len(report.sites), report.rewritten) == (2, ("model.layers.0.self_attn",))
    cache = fast.lamp.cache()
    fast.generate(ids, past_key_values=cache, num_beams=2, **greedy)
    assert [type(layer).__name__ for layer in cache.layers] == ["NestedLayer", "FloatLayer"]
    none = lamp_compile.compile(model, mode="eager", fuel=0)
    assert torch.equal(none.generate(ids, **greedy), model.generate(ids, **greedy))
