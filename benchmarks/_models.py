"""Models, caches and decode steps for whole-model timing: transformers' ways, a near-roofline, and lamp."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    CompileConfig,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    StaticCache,
)

import lamp_compile
from lamp_compile.quality import load

UNMASKED = "benchmark_unmasked"
SHAPES: dict[str, dict[str, Any]] = {
    "8b": dict(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, max_position_embeddings=131072, rope_theta=500000.0,
    ),
    "1b": dict(
        vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
        num_key_value_heads=8, head_dim=64, max_position_embeddings=131072, rope_theta=500000.0,
        tie_word_embeddings=True,
    ),
    "tiny": dict(
        vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=8192,
    ),
}  # fmt: skip
SCORE_SPREAD = 2.0
"""Standard deviation of random scores: a few keys take most of the weight, and every share of tiles has its tau."""


def unmasked(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float | None = None, **_: Any
) -> tuple[Tensor, None]:
    """Attention over the whole static cache without a mask or repeated heads: as near to the bytes as SDPA gets."""
    out = F.scaled_dot_product_attention(query, key, value, scale=scaling, enable_gqa=True)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(UNMASKED, unmasked)


def build(shape: str | None, folder: str | None, device: torch.device) -> Any:
    """A random model of a shape in bf16, or the model of a folder."""
    if folder is not None:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        return load.load_model(folder, dtype=dtype, device=device)
    assert shape is not None
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            return LlamaForCausalLM(LlamaConfig(**SHAPES[shape])).eval()
    finally:
        torch.set_default_dtype(before)


@dataclass(frozen=True)
class Size:
    """A cache of ``length`` tokens for each of ``batch`` sequences; it holds ``held`` when a window of steps begins."""

    batch: int
    length: int
    held: int

    @property
    def steps(self) -> int:
        """Steps until it is full."""
        return self.length - self.held


@dataclass
class Decoder:
    """One way to decode: the model, what is called for a step, and its cache."""

    model: Any
    forward: Callable[..., Any]
    cache: Any
    size: Size
    masked: bool = True
    """Whether a step gets the two-dimensional mask that ``generate`` hands over."""

    def begin(self) -> None:
        """Go back to where the window of steps begins."""
        size, device = self.size, self.model.device
        for layer in self.cache.layers:
            if isinstance(getattr(layer, "cumulative_length", None), Tensor):
                layer.cumulative_length.fill_(size.held)
            elif layer.keys.dim() == 4 and layer.keys.shape[2] > size.held:
                layer.keys, layer.values = layer.keys[:, :, : size.held], layer.values[:, :, : size.held]
        self.ids = torch.ones(size.batch, size.held + 1, dtype=torch.long, device=device)
        self.kwargs: dict[str, Any] = {
            "past_key_values": self.cache,
            "position_ids": torch.arange(size.held + 1, device=device).expand(size.batch, -1),
            "use_cache": True,
        }
        if self.masked:
            self.kwargs["attention_mask"] = torch.ones_like(self.ids)

    def step(self) -> None:
        """One token for every sequence, as the loop of ``generate`` does it."""
        inputs = self.model.prepare_inputs_for_generation(
            self.ids, next_sequence_length=1, logits_to_keep=1, **self.kwargs
        )
        out = self.forward(**inputs, return_dict=True)
        self.kwargs = self.model._update_model_kwargs_for_generation(out, self.kwargs)
        token = out.logits[:, -1].to(copy=True, dtype=torch.float32).argmax(-1)
        self.ids = torch.cat([self.ids, token[:, None]], dim=-1)


def compiled(model: Any, mode: str, config: Any = None) -> Callable[..., Any]:
    """The forward that ``generate`` would call in this mode."""
    model.__dict__.pop("_compiled_call", None)
    if mode == "eager":
        forward: Callable[..., Any] = model.__call__
        return forward
    if config is None:
        config = CompileConfig(mode=mode)
    return model.get_compiled_call(config)  # type: ignore[no-any-return]


@contextmanager
def attention(model: Any, name: str) -> Iterator[None]:
    """The model with another attention for a while."""
    before = model.config._attn_implementation
    model.config._attn_implementation = name
    try:
        yield
    finally:
        model.config._attn_implementation = before
        model.__dict__.pop("_compiled_call", None)


def eager(model: Any, size: Size, text: Tensor | None) -> Decoder:
    """transformers as it comes: DynamicCache and SDPA."""
    cache = DynamicCache(config=model.config)
    _fill(model, cache, size, text)
    return Decoder(model, model.__call__, cache, size)


def static(model: Any, size: Size, text: Tensor | None, mode: str, masked: bool) -> Decoder:
    """StaticCache and torch.compile; without a mask for the near-roofline."""
    return Decoder(model, compiled(model, mode), _static_cache(model, size, text), size, masked)


def joined(model: Any, size: Size, text: Tensor | None, mode: str) -> Decoder:
    """The near-roofline with one product for the linear layers of each input; the graph is lamp_compile's, with no
    attention rewritten. In mode "eager" it runs node by node."""
    cache = _static_cache(model, size, text)
    lower = "eager" if mode == "eager" else "inductor"
    backend = lamp_compile.backend(fuel=0, join_linears="always", lower=lower)
    config = CompileConfig(backend=backend, mode="default" if mode == "eager" else mode)
    model.__dict__.pop("_compiled_call", None)
    return Decoder(model, model.get_compiled_call(config), cache, size, masked=False)


def _static_cache(model: Any, size: Size, text: Tensor | None) -> StaticCache:
    cache = StaticCache(config=model.config, max_cache_len=size.length)
    _fill(model, cache, size, text)
    return cache


def lamp(model: Any, size: Size, text: Tensor | None, mode: str, join: str = "auto") -> Decoder:
    """``lamp_compile.compile(model)`` and its cache."""
    fast = lamp_compile.compile(model, mode=mode, guard_budget=float("inf"), join_linears=join)
    cache = fast.lamp.cache(size.length)
    if text is not None:
        _read(fast, cache, text[:, : size.held])
    else:
        _fill_planes(fast, cache, size)
    return Decoder(fast, compiled(fast, mode, fast.lamp.compile_config), cache, size)


def _read(model: Any, cache: Any, ids: Tensor) -> None:
    """Prefill, a sequence batch at a time."""
    with torch.no_grad():
        model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)


def _fill(model: Any, cache: Any, size: Size, text: Tensor | None) -> None:
    """Real text, or random keys and values in a cache that a short prompt has laid out."""
    if text is not None:
        _read(model, cache, text[:, : size.held])
        return
    with attention(model, "sdpa"):
        _read(model, cache, torch.ones(size.batch, 2, dtype=torch.long, device=model.device))
    for layer in cache.layers:
        if hasattr(layer, "cumulative_length"):
            layer.keys.normal_()
            layer.values.normal_()
        else:
            like = layer.keys
            layer.keys = torch.randn(*like.shape[:2], size.held, like.shape[3], dtype=like.dtype, device=like.device)
            layer.values = torch.randn_like(layer.keys)


def _fill_planes(fast: Any, cache: Any, size: Size) -> None:
    """Random bytes as planes, with scales that spread the scores of this model's queries as real ones are."""
    rms = {site.name: (float(site.query_rms.square().mean().sqrt()), site) for site in fast.lamp.sites}
    for layer in cache.layers:
        query, site = rms[layer.name]
        empty = dict(dtype=site.dtype, device=site.device)
        layer.lazy_initialization(
            torch.zeros(size.batch, site.kv_heads, 0, site.head_dim, **empty),
            torch.zeros(size.batch, site.kv_heads, 0, site.value_dim, **empty),
        )
        for plane in (layer.k_high, layer.k_residual, layer.v_high, layer.v_residual):
            plane.random_(0, 256)
        # Random bytes are uniform over 256 steps, so their root mean square is 256 / sqrt(12) = 74 steps.
        layer.k_scale.fill_(SCORE_SPREAD / max(query, 1e-3) / 74)
        layer.v_scale.fill_(1.0 / 74)
        layer.cumulative_length.fill_(size.held)
