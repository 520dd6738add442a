"""Exported decoders in ``OrtSession``: both ways of computing against the float model, settings, layers in floats."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers

import lamp_compile
from lamp_compile.runtime.ort import _library
from tests.tolerances import ORT_TOY

CONFIG = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "num_key_value_heads": 2, "vocab_size": 64, "max_position_embeddings": 128, "head_dim": 16,
}  # fmt: skip
PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6], [2, 7, 1], list(range(40))]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A Llama of two layers, of which the second keeps floats."""
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**CONFIG)).eval()
    fast = lamp_compile.compile(model, mode="eager", fuel=1)
    path = tmp_path_factory.mktemp("session") / "model.onnx"
    lamp_compile.export_onnx(fast, torch.randint(64, (1, 16)), path)
    return model, path


@pytest.mark.parametrize("native", [True, False])
def test_it_decodes_as_the_float_model_does(exported, native: bool) -> None:
    if native and (reason := _library.why_not()):
        pytest.skip(reason)
    model, path = exported
    session = lamp_compile.OrtSession(path, native=native, threads=1)
    assert [site.tile for site in session.artifact.sites] == [32, 0]
    session.start(3)
    rows = [list(prompt) for prompt in PROMPTS]
    found = session.prefill(rows, rows=16)
    for token in (7, 8):
        for index, row in enumerate(rows):
            with torch.no_grad():
                wanted = model(torch.tensor([row])).logits[0, -1].numpy()
            assert np.linalg.norm(found[index] - wanted) / np.linalg.norm(wanted) < ORT_TOY.relative
            row.append(token)
        found = session.step([[token]] * 3)
    assert session.planes("model.layers.1.self_attn")["k"].shape()[1:] == [2, session.capacity, 16]


def test_settings_and_generation(exported) -> None:
    _, path = exported
    session = lamp_compile.OrtSession(path, native=False, threads=1)
    shares = []
    for tau in (1e9, 0.0):
        session.controls.set(tau=tau)
        made = session.generate(PROMPTS, max_new_tokens=4)
        shares.append(session.statistics()["model.layers.0.self_attn"].refined_share)
    assert shares == [0.0, 1.0]
    assert [len(row) for row in made] == [12, 7, 44]
