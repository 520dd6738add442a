from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from lamp_compile.errors import InputError, ModelError
from lamp_compile.quality.continuation import compare, kv_bytes, write
from lamp_compile.quality.load import checked_device, load_model, load_tokenizer


def test_a_folder_gives_a_model_for_inference(nano):
    model = load_model(nano)
    assert model.dtype == torch.float32
    assert not model.training
    assert load_model(nano, dtype="auto").dtype == torch.bfloat16
    assert load_tokenizer(nano)("a real text")["input_ids"]


def test_a_broken_folder_is_refused(nano, tmp_path):
    (tmp_path / "config.json").write_text((nano / "config.json").read_text())
    with pytest.raises(InputError, match="no safetensors"):
        load_model(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not a tensor file")
    with pytest.raises(ModelError, match="cannot load"):
        load_model(tmp_path)
    save_file({"model.norm.weight": torch.ones(128)}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match="weights are not in the folder"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "no such model"}')
    with pytest.raises(ModelError, match="cannot load"):
        load_model(tmp_path)
    with pytest.raises(InputError, match="tokenizer"):
        load_tokenizer(tmp_path)


def test_devices_are_checked():
    assert checked_device("cpu").type == "cpu"
    with pytest.raises(InputError, match="unknown device"):
        checked_device("toaster")
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="no CUDA"):
            checked_device("cuda")


def test_a_continuation_has_exactly_the_tokens_asked_for(nano):
    model = load_model(nano)
    prompt = torch.arange(100, 120)[None]
    written = write(model, prompt, 7)
    expected = model.generate(prompt, max_new_tokens=7, min_new_tokens=7, do_sample=False)[0, 20:].tolist()
    assert written.ids == expected
    assert (
        written.kv_bytes == 26 * 4 * 2 * 2 * 64 * 4
    )  # the last token is never stored; layers, heads, K and V, D, float32
    assert compare(written, written) is None
    with pytest.raises(InputError):
        write(model, prompt[:, :0], 7)
    with pytest.raises(InputError):
        write(model, prompt, 0)


def test_bytes_of_an_empty_cache_are_none():
    from transformers import DynamicCache

    assert kv_bytes(DynamicCache()) == 0
