"""Tiny random models of the families people run, and what is expected of each on every route.

Weights are drawn wide (``SPREAD``), so that attention is peaked: with the usual 0.02 every softmax is nearly uniform,
and a wrong scale or a lost mask would hardly show.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

TOKENS = 40
BATCH = 2
PADDING = 5
WINDOW = 8
SPREAD = 0.15
SIZES = dict(vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)
DECODER = dict(
    **SIZES, num_key_value_heads=2, max_position_embeddings=256, initializer_range=SPREAD,
    pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
SLIDING = dict(sliding_window=WINDOW, layer_types=["sliding_attention", "full_attention"])


@dataclass(frozen=True)
class Expected:
    """Counts over one captured graph, or over one compiled decoder."""

    rewritten: int
    refused: int = 0
    unclaimed: int = 0
    reason: str = ""
    """Found in every refusal's or unclaimed softmax's reason."""


@dataclass(frozen=True)
class Family:
    """One model family.

    Attributes:
        name: As people say it.
        make: Attention implementation -> model.
        feature: What is special about its attention.
        inputs: What it is called with; None = token ids with left padding.
        graph: Expectation by attention implementation, on the graph route.
        decoder: Expectation on the Hugging Face route; None where ``compile`` takes the graph route.
        refusal: Instead of ``decoder``: what ``compile`` raises ModelError about.
        sdpa: Why the sdpa spelling is not tested.
    """

    name: str
    make: Callable[[str], nn.Module]
    feature: str
    graph: Mapping[str, Expected]
    decoder: Expected | None = None
    inputs: Callable[[], dict[str, Tensor]] | None = None
    refusal: str = ""
    notes: Mapping[str, str] = field(default_factory=dict)


def build(family: Family, implementation: str) -> nn.Module:
    """The model, the same weights each time."""
    torch.manual_seed(0)
    model = family.make(implementation).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "sinks" in name:
                parameter.normal_(std=0.3)
    return model


def inputs(family: Family) -> dict[str, Tensor]:
    """A batch of two; where there are token ids, the second row is padded on the left."""
    if family.inputs is not None:
        return family.inputs()
    ids = _ids(TOKENS)
    mask = torch.ones_like(ids)
    mask[1, :PADDING] = 0
    return {"input_ids": ids, "attention_mask": mask}


def _ids(tokens: int) -> Tensor:
    return torch.randint(3, 128, (BATCH, tokens), generator=torch.Generator().manual_seed(1))


def _causal(kind: type, **changes: Any) -> Callable[[str], nn.Module]:
    def make(implementation: str) -> nn.Module:
        config = kind(**{**DECODER, **changes})
        return hf.AutoModelForCausalLM.from_config(config, attn_implementation=implementation)

    return make


def _gpt2(implementation: str) -> nn.Module:
    config = hf.GPT2Config(
        vocab_size=128, n_embd=64, n_layer=2, n_head=4, n_positions=256, initializer_range=SPREAD,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return hf.AutoModelForCausalLM.from_config(config, attn_implementation=implementation)


def _neox(implementation: str) -> nn.Module:
    config = hf.GPTNeoXConfig(**{key: value for key, value in DECODER.items() if key != "num_key_value_heads"})
    return hf.AutoModelForCausalLM.from_config(config, attn_implementation=implementation)


def _bert(implementation: str) -> nn.Module:
    config = hf.BertConfig(**SIZES, max_position_embeddings=256, initializer_range=SPREAD)
    return hf.AutoModel.from_config(config, attn_implementation=implementation)


def _t5(implementation: str) -> nn.Module:
    config = hf.T5Config(
        vocab_size=128,
        d_model=64,
        d_kv=16,
        d_ff=96,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
        pad_token_id=0,
    )
    return hf.AutoModelForSeq2SeqLM.from_config(config, attn_implementation=implementation)


def _t5_inputs() -> dict[str, Tensor]:
    ids = _ids(TOKENS)
    mask = torch.ones_like(ids)
    mask[1, -PADDING:] = 0
    return {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": _ids(12)}


def _whisper(implementation: str) -> nn.Module:
    config = hf.WhisperConfig(
        vocab_size=128, d_model=64, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=96, decoder_ffn_dim=96, num_mel_bins=8, max_source_positions=40, max_target_positions=64,
        init_std=SPREAD, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
        suppress_tokens=None, begin_suppress_tokens=None,
    )  # fmt: skip
    return hf.WhisperForConditionalGeneration._from_config(config, attn_implementation=implementation)


def _whisper_inputs() -> dict[str, Tensor]:
    sound = torch.randn(BATCH, 8, 80, generator=torch.Generator().manual_seed(2))
    return {"input_features": sound, "decoder_input_ids": _ids(12)}


def _vit(implementation: str) -> nn.Module:
    sizes = {key: value for key, value in SIZES.items() if key != "vocab_size"}
    config = hf.ViTConfig(**sizes, image_size=48, patch_size=8, initializer_range=SPREAD)
    return hf.AutoModel.from_config(config, attn_implementation=implementation)


def _vit_inputs() -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(BATCH, 3, 48, 48, generator=torch.Generator().manual_seed(3))}


BOTH = {"sdpa": Expected(2), "eager": Expected(2)}
SIX = {"sdpa": Expected(6), "eager": Expected(6)}
EAGER = {"eager": Expected(2)}
ROUTED = Expected(2, unclaimed=2, reason="between a product of queries and keys")
DEEPSEEK = dict(
    num_key_value_heads=4, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=16, v_head_dim=16,
    n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1, moe_intermediate_size=32, n_shared_experts=1,
    first_k_dense_replace=1,
)  # fmt: skip

FAMILIES = (
    Family("Llama", _causal(hf.LlamaConfig), "grouped queries", BOTH, Expected(2)),
    Family("Mistral", _causal(hf.MistralConfig, sliding_window=WINDOW), "sliding window", BOTH, Expected(2)),
    Family("Qwen2", _causal(hf.Qwen2Config), "key bias", BOTH, Expected(2)),
    Family("Qwen3", _causal(hf.Qwen3Config, head_dim=16), "norms on q and k", BOTH, Expected(2)),
    Family(
        "Gemma 2",
        _causal(hf.Gemma2Config, head_dim=16, query_pre_attn_scalar=16, **SLIDING),
        "soft-cap, window in every other layer",
        EAGER,
        Expected(2),
        notes={"sdpa": "SDPA has no soft-cap: dropped without a word on transformers 5.17, refused on 5.23"},
    ),
    Family(
        "Gemma 3",
        _causal(hf.Gemma3TextConfig, head_dim=16, query_pre_attn_scalar=16, **SLIDING),
        "norms on q and k, window in some layers",
        BOTH,
        Expected(2),
    ),
    Family(
        "Phi-3", _causal(hf.Phi3Config, partial_rotary_factor=0.5), "partial rotary, one projection", BOTH, Expected(2)
    ),
    Family("GPT-2", _gpt2, "learned positions, no rotary", BOTH, Expected(2)),
    Family("GPT-NeoX", _neox, "partial rotary, no grouping", BOTH, Expected(2)),
    Family("OLMo-2", _causal(hf.Olmo2Config), "one norm over all of q, of k", BOTH, Expected(2)),
    Family(
        "Mixtral",
        _causal(hf.MixtralConfig, num_local_experts=4, num_experts_per_tok=2),
        "mixture of experts: its router has a softmax too",
        {"sdpa": ROUTED, "eager": ROUTED},
        Expected(2),
    ),
    Family(
        "gpt-oss",
        _causal(hf.GptOssConfig, head_dim=16, num_local_experts=4, num_experts_per_tok=2, **SLIDING),
        "sinks, window in every other layer, mixture of experts",
        {"eager": ROUTED},
        Expected(2),
        notes={"sdpa": "SDPA has no sinks: transformers refuses it"},
    ),
    Family(
        "DeepSeek-V3",
        _causal(hf.DeepseekV3Config, **DEEPSEEK),
        "latent attention: D 24 for keys, 16 for values",
        BOTH,
        refusal="latent",
        notes={"decoder": "refused: its cache holds latents, not the keys that attention receives"},
    ),
    Family("BERT", _bert, "bidirectional", BOTH),
    Family("T5", _t5, "position bias, cross attention, no scale", SIX, inputs=_t5_inputs),
    Family("Whisper", _whisper, "encoder and decoder, cross attention", SIX, inputs=_whisper_inputs),
    Family("ViT", _vit, "no mask", BOTH, inputs=_vit_inputs),
)
