"""``model.compile(backend="lamp")`` and ``generate`` on a tiny Llama."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.utils import counters

import lamp_compile
from tests.passes.test_patterns import EXACT

transformers = pytest.importorskip("transformers", reason="needs transformers (extra: hf)")
pytestmark = pytest.mark.usefixtures("one_thread")


def llama(spelling: str, layers: int = 2) -> torch.nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation=spelling).eval()


def prompt() -> torch.Tensor:
    return torch.randint(3, 128, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("spelling", ["sdpa", "eager"])
def test_compile_and_generate(spelling):
    torch._dynamo.reset()
    model = llama(spelling)
    wanted = model.generate(prompt(), max_new_tokens=8, do_sample=False)
    backend = lamp_compile.backend(lower="eager", **EXACT)
    model.compile(backend=backend, fullgraph=True)
    assert torch.equal(model.generate(prompt(), max_new_tokens=8, do_sample=False), wanted)
    assert backend.reports
    for report in backend.reports:
        assert report.rewritten == ("model.layers.0.self_attn", "model.layers.1.self_attn")
        assert {site.kv_heads for site in report.sites} == {2}
        assert "decoding gains nothing" in report.text()


def test_named_backend_with_mode():
    torch._dynamo.reset()
    model = llama("sdpa", layers=1)
    wanted = model(prompt(), use_cache=False).logits
    model.compile(backend="lamp", mode="default", fullgraph=True)
    out = model(prompt(), use_cache=False).logits
    assert (out - wanted).norm() < 0.05 * wanted.norm()


@pytest.mark.parametrize("spelling", ["sdpa", "eager"])
def test_dynamic_lengths_add_no_graph_break(spelling):
    torch._dynamo.reset()
    counters.clear()
    model = llama(spelling)
    backend = lamp_compile.backend(lower="eager", **EXACT)
    fast = torch.compile(model, backend=backend, fullgraph=True, dynamic=True)
    for length in (140, 141, 200, 150):
        ids = torch.randint(3, 128, (2, length))
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
        with torch.no_grad():
            out, wanted = fast(**given).logits, model(**given).logits
        assert (out - wanted).norm() < 1e-5 * wanted.norm()
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
