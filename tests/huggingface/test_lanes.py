"""Planes by lanes in models: which layers keep them so, and what moves between machines that differ in it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import lamp_compile
from lamp_compile.runtime import layout
from tests.runtime.test_lanes_in_caches import lying


def decoder(head_dim: int = 64, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128, hidden_size=4 * head_dim, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=head_dim, max_position_embeddings=512, attn_implementation="eager",
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype).eval()


def filled(fast: Any, ids: Tensor) -> Any:
    cache = fast.lamp.cache(128)
    fast(ids, past_key_values=cache)
    return cache


@pytest.mark.parametrize(
    ("head_dim", "changes", "dtype", "lanes"),
    [
        (64, {}, torch.float32, True),
        (32, {}, torch.bfloat16, True),
        (256, {}, torch.float32, True),
        (80, {}, torch.float32, False),
        (64, {"tile": 64}, torch.float32, False),
        (64, {"rule": "lamp_strict"}, torch.float32, True),
    ],
    ids=str,
)
def test_which_layers_keep_them(head_dim: int, changes: dict[str, Any], dtype: torch.dtype, lanes: bool) -> None:
    """Those whose kernels read them."""
    model = decoder(head_dim, dtype)
    plan = lamp_compile.compile(model, mode="eager").lamp.plan
    plan = replace(plan, sites=tuple(replace(row, **changes) for row in plan.sites))
    fast = lamp_compile.compile(model, mode="eager", plan=plan)
    with lying(True):
        cache = filled(fast, torch.arange(3, 43).reshape(1, -1))
    assert {layout.by_lanes(plane) for layer in cache.layers for plane in (layer.k_high, layer.v_high)} == {lanes}


@pytest.mark.parametrize("lanes", [False, True], ids=["rows", "lanes"])
def test_a_cache_that_grows_stays_as_it_is(lanes: bool) -> None:
    fast, ids = lamp_compile.compile(decoder(), mode="eager"), torch.arange(3, 103).reshape(1, -1)
    with lying(lanes):
        cache = filled(fast, ids)
    held = [layout.key_rows(layer.k_high).clone() for layer in cache.layers]
    with lying(not lanes):
        fast(ids, past_key_values=cache)
    for layer, before in zip(cache.layers, held, strict=True):
        assert layout.by_lanes(layer.k_high) == lanes
        assert layer.max_cache_len > 128
        assert torch.equal(layout.key_rows(layer.k_high)[:, :, :100], before[:, :, :100])


@pytest.mark.parametrize("lanes", [False, True], ids=["to lanes", "to rows"])
def test_a_decode_step_takes_what_the_other_order_saved(lanes: bool) -> None:
    """Planes of a program that another machine saved in the middle of a text."""
    fast, ids = lamp_compile.compile(decoder(), mode="eager"), torch.arange(3, 23).reshape(1, -1)
    with lying(not lanes):
        saved = lamp_compile.DecodeStep(fast)
    with lying(lanes):
        step = lamp_compile.DecodeStep(fast)
    saved(ids)
    state = {name: tensor.clone() for name, tensor in saved.state_dict().items()}
    assert state["layer1_k_high"].shape != step.layer1_k_high.shape
    step.load_state_dict(state)
    assert step.layer0_v_residual.any()
    got, wanted = step(ids[:, :1]), saved(ids[:, :1])
    assert (got - wanted).norm() <= 1e-5 * wanted.norm()
    state["layer1_k_high"] = state["layer1_k_high"][:, :1]
    with pytest.raises(RuntimeError, match="size mismatch for layer1_k_high"):
        step.load_state_dict(state)
