from __future__ import annotations

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    Qwen2Config,
    Qwen3Config,
)

from lamp_compile.errors import ModelError, OptionError
from lamp_compile.quality.twin import outlier_twin

SIZES = dict(
    vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, pad_token_id=0, bos_token_id=0, eos_token_id=0,
)  # fmt: skip


def _model(config):
    return AutoModelForCausalLM.from_config(config).eval()


def _logits(model):
    ids = torch.randint(64, (1, 50), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits.double()


@pytest.mark.parametrize("pairs", ["any", "slow"])
def test_the_twin_is_the_same_function_with_outlier_keys(pairs):
    model = _model(LlamaConfig(**{**SIZES, "head_dim": 32}))
    before = {name: p.clone() for name, p in model.named_parameters()}
    twin = outlier_twin(model, 30.0, pairs=pairs)
    assert (_logits(model) - _logits(twin)).abs().max() < 1e-4
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]), "the argument must stay as it is"
    for layer, other in zip(model.model.layers, twin.model.layers, strict=True):
        factor = (other.self_attn.k_proj.weight / layer.self_attn.k_proj.weight).mean(1).view(2, 32)
        assert ((factor - 30).abs() < 1e-3).sum(1).tolist() == [6, 6]
        assert ((factor - 1).abs() < 1e-3).sum(1).tolist() == [26, 26]
        assert torch.equal(factor[:, :16], factor[:, 16:]), "both channels of a RoPE pair"
        if pairs == "slow":
            assert (factor[:, :12] == 1).all(), "only the slowest quarter"
        assert other.mlp.up_proj.weight.data_ptr() == layer.mlp.up_proj.weight.data_ptr(), "other weights are shared"


def test_key_biases_are_scaled_too():
    model = _model(Qwen2Config(**SIZES))
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.self_attn.k_proj.bias)
        torch.nn.init.normal_(layer.self_attn.q_proj.bias)
    twin = outlier_twin(model, 30.0)
    assert (_logits(model) - _logits(twin)).abs().max() < 1e-4
    assert (
        twin.model.layers[0].self_attn.k_proj.bias.abs().max()
        > 10 * model.model.layers[0].self_attn.k_proj.bias.abs().max()
    )


def test_behind_a_norm_its_weight_is_scaled():
    model = _model(Qwen3Config(**SIZES))
    twin = outlier_twin(model, 30.0)
    assert (_logits(model) - _logits(twin)).abs().max() < 1e-4
    assert twin.model.layers[0].self_attn.k_norm.weight.max() == 30
    assert model.model.layers[0].self_attn.k_norm.weight.max() == 1


def test_models_without_a_twin_are_refused_with_the_reason():
    with pytest.raises(ModelError, match="separate q_proj and k_proj"):
        outlier_twin(
            _model(GPT2Config(vocab_size=64, n_embd=64, n_layer=1, n_head=4, bos_token_id=0, eos_token_id=0)), 30.0
        )
    with pytest.raises(ModelError, match="does not multiply with its weight"):
        outlier_twin(_model(Gemma3TextConfig(**SIZES)), 30.0)
    with pytest.raises(ModelError, match="differs from the model"):  # interleaved pairs
        outlier_twin(_model(CohereConfig(**SIZES)), 30.0)
    with pytest.raises(ModelError, match="float32"):
        outlier_twin(_model(LlamaConfig(**SIZES)).bfloat16(), 30.0)


def test_impossible_options_are_refused():
    model = _model(LlamaConfig(**SIZES))
    for options in ({"pairs": "fast"}, {"count": 0}, {"count": 9}):
        with pytest.raises(OptionError):
            outlier_twin(model, 30.0, **options)
    with pytest.raises(OptionError):
        outlier_twin(model, -1.0)
