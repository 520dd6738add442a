"""A model with fragile keys: large key biases and outlier channels planted in some layers, with its function kept.

Two things are planted in the slowest-turning RoPE pairs of every kv head of a layer:

- keys times S and queries times 1/S in these pairs, as ``outlier_twin`` does: *exact* in real numbers;
- then a constant is added to the keys before RoPE, as the bias of Qwen2's ``k_proj`` does. Key j adds
  (q_i / S) . R(i - j) bias to score (i, j), with R the turn of the pair. Without a turn that would be the same for all
  keys of a row, which a softmax does not see; so this is *approximate*, by what the slow pair turns over the distance
  between query and key. Measure it against the model before anything is concluded (``benchmarks/fragile_keys.py``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lamp_compile.errors import OptionError
from lamp_compile.quality import twin as twins

PROBE_TOKENS = 128


@dataclass(frozen=True)
class Planted:
    """What was planted where.

    Attributes:
        model: The twin; it shares all weights but those of the changed projections.
        sites: Attention modules that were changed.
        channels: Of each, the channels of each kv head ``[G, 2 * count]`` that were.
        bias: Size of the bias of each kv head, in units of the head's median channel rms.
    """

    model: nn.Module
    sites: tuple[str, ...]
    channels: dict[str, list[list[int]]]
    bias: float


def fragile_twin(
    model: nn.Module, layers: Sequence[int], *, bias: float = 60.0, scale: float = 10.0, count: int = 1
) -> Planted:
    """Plant key biases and outlier channels in some layers of a Llama-like model.

    Args:
        model: As for ``outlier_twin``, with ``q_proj`` and ``k_proj`` and no norm behind them. It stays as it is.
        layers: Which attentions, counted from 0.
        bias: Size of the planted bias, in units of the median rms of the kv head's channels.
        scale: S.
        count: Pairs per kv head, the slowest-turning ones.

    Raises:
        OptionError: A layer that is not there, or sizes that make no sense.
        ModelError: The model has no such projections.
    """
    found = list(twins._attentions(model))
    if not layers or not all(0 <= layer < len(found) for layer in layers):
        raise OptionError(f"layers {list(layers)}", where="fragile_twin", fix=f"some of 0 to {len(found) - 1}")
    if not (scale > 0 and bias >= 0 and count >= 1):
        raise OptionError(
            f"bias {bias!r}, scale {scale!r}, count {count!r}", where="fragile_twin", fix="numbers above 0"
        )
    chosen = [found[layer] for layer in layers]
    rms = _channel_rms(model, chosen)
    twin = twins._structural_copy(model, [attention.module for attention in chosen])
    channels: dict[str, list[list[int]]] = {}
    for attention in twins._attentions(twin):
        if attention.name in rms:
            channels[attention.name] = _plant(attention, rms[attention.name], bias, scale, count)
    return Planted(twin, tuple(channels), channels, bias)


def _plant(attention: Any, rms: Tensor, bias: float, scale: float, count: int) -> list[list[int]]:
    """Scale and bias the slowest pairs; gives the channels of each kv head."""
    half = attention.rotary_dim // 2
    slow = torch.arange(half - count, half)
    channels = torch.cat([slow, slow + half])
    factor = torch.ones(attention.head_dim)
    factor[channels] = scale
    heads = attention.kv_heads
    key, query = (twins._projection(attention.module, name) for name in ("k_proj", "q_proj"))
    groups = query.out_features // attention.head_dim // heads
    twins._scale_rows(key, factor.repeat(heads, 1))
    twins._scale_rows(query, 1 / factor.repeat(heads * groups, 1))
    added = torch.zeros(heads, attention.head_dim)
    added[:, channels] = bias * rms.median(-1, keepdim=True).values
    biased = nn.Linear(key.in_features, key.out_features, bias=True, device=key.weight.device, dtype=key.weight.dtype)
    with torch.no_grad():
        biased.weight.copy_(key.weight)
        biased.bias.copy_(added.flatten() + (0 if key.bias is None else key.bias.cpu()))
    attention.module.k_proj = biased.eval().requires_grad_(key.weight.requires_grad)
    return [channels.tolist()] * heads


@torch.no_grad()
def _channel_rms(model: nn.Module, attentions: Sequence[Any]) -> dict[str, Tensor]:
    """rms of every key channel before RoPE ``[G, D]``, over random tokens."""
    found: dict[str, Tensor] = {}

    def note(name: str, head_dim: int) -> Any:
        def hook(module: nn.Module, args: Any, out: Tensor) -> None:
            found[name] = out.float().square().mean((0, 1)).sqrt().reshape(-1, head_dim).cpu()

        return hook

    hooks = [
        twins._projection(attention.module, "k_proj").register_forward_hook(note(attention.name, attention.head_dim))
        for attention in attentions
    ]
    config: Any = model.config
    ids = torch.randint(int(config.vocab_size), (1, PROBE_TOKENS), generator=torch.Generator().manual_seed(0))
    try:
        model(input_ids=ids.to(next(model.parameters()).device), use_cache=False)
    finally:
        for handle in hooks:
            handle.remove()
    return found
