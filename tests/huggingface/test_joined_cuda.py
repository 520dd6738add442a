"""On a CUDA device: joined products inside a captured graph. Skipped elsewhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

import lamp_compile
from lamp_compile.runtime.joined_weights import bring_together, look_at
from tests.huggingface import reference
from tests.huggingface.test_joined import NOTE, in_one_place

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.usefixtures("fresh_graphs"),
]


def agreement(fast: Any, wanted: Any, ids: Tensor, greedy: dict[str, Any]) -> float:
    return float((fast.generate(ids, **greedy) == wanted.generate(ids, **greedy)).float().mean())


def test_auto_joins_and_the_step_is_captured(ids: Tensor, greedy: dict[str, Any]) -> None:
    model, prompt = reference.build("Llama", "sdpa").cuda(), ids.cuda()
    fast, eager = lamp_compile.compile(model), lamp_compile.compile(model, mode="eager")
    for _ in range(3):
        assert agreement(fast, eager, prompt, greedy) > 0.95
    assert NOTE in fast.lamp.report().text()
    assert in_one_place(model)
    for layer in model.model.layers:
        layer.self_attn.v_proj.weight.data = torch.randn_like(layer.self_attn.v_proj.weight)
        layer.mlp.up_proj.weight = nn.Parameter(-layer.mlp.up_proj.weight.detach())
        fast.get_submodule("model").layers[layer.self_attn.layer_idx].mlp.up_proj.weight = layer.mlp.up_proj.weight
        eager.get_submodule("model").layers[layer.self_attn.layer_idx].mlp.up_proj.weight = layer.mlp.up_proj.weight
    for _ in range(3):
        assert agreement(fast, eager, prompt, greedy) > 0.95
    assert in_one_place(model)
    assert counters["stats"]["unique_graphs"] == 1
    assert counters["inductor"]["cudagraph_skips"] == 0


def test_nothing_is_held_twice() -> None:
    parts = [nn.Parameter(torch.randn(n, 1024, device="cuda", dtype=torch.bfloat16)) for n in (1024, 256, 256)]
    wanted, held = torch.cat([part.detach() for part in parts]).cpu(), torch.cuda.memory_allocated()
    bring_together(parts)
    assert torch.cuda.memory_allocated() <= held
    assert torch.equal(look_at(parts).cpu(), wanted)
    del parts
    assert torch.cuda.memory_allocated() < held - wanted.nbytes // 2
