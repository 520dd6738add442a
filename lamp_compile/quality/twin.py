"""The outlier twin: the same function with S-fold outlier key channels, to see what a quantiser does about them.

In every kv head a few RoPE pairs (channels i and i + R/2) of the keys are multiplied by S and those of the head's
queries by 1/S. A rotation turns both channels of a pair by one angle, so q.k is unchanged: in exact arithmetic the twin
*is* the model. Its keys are another matter.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lamp_compile.errors import InputError, ModelError, OptionError

PAIRS = ("any", "slow")
PROBE_TOKENS = 64
TOLERANCE = 2e-3
"""Largest difference of a logit between model and twin in float32, relative to the largest logit."""


@dataclass(frozen=True)
class _Attention:
    """What the twin needs to know of one attention module."""

    name: str
    module: nn.Module
    head_dim: int
    rotary_dim: int

    @property
    def kv_heads(self) -> int:
        return _projection(self.module, "k_proj").out_features // self.head_dim


def outlier_twin(model: nn.Module, scale: float, *, pairs: str = "any", count: int = 3, seed: int = 7) -> nn.Module:
    """A copy of ``model`` that computes the same function with outlier key channels.

    Args:
        model: A Hugging Face causal language model in float32 with ``q_proj``/``k_proj`` and half-split RoPE. Left as
            it is; all weights but those of the scaled projections and norms are shared with the result.
        scale: S, the factor on the chosen key channels.
        pairs: ``"any"`` draws from all RoPE pairs, ``"slow"`` from the slowest-turning quarter.
        count: Pairs per kv head.
        seed: Of the draw.

    Returns:
        The twin, checked against the model on random tokens.

    Raises:
        OptionError: Unknown ``pairs``, impossible ``scale`` or ``count``.
        ModelError: The model is not float32, or its projections, norms or rotary embedding do not have the shape above.
    """
    if pairs not in PAIRS:
        raise OptionError(f"unknown pairs {pairs!r}", where="pairs", fix=f"one of {', '.join(PAIRS)}")
    if not 0 < scale < 1e6 or count < 1:
        raise OptionError(
            f"scale {scale!r}, count {count!r}", where="outlier_twin", fix="scale above 0, count at least 1"
        )
    found = list(_attentions(model))
    if not found:
        raise ModelError(
            "no attention with separate q_proj and k_proj",
            where=type(model).__name__,
            fix="a Llama-like model; others have no twin",
        )
    if any(p.dtype not in (torch.float32, torch.float64) for p in model.parameters()):
        raise ModelError(
            "the twin needs float32 weights", where=type(model).__name__, fix="model.float() before outlier_twin"
        )
    twin = _structural_copy(model, [attention.module for attention in found])
    generator = torch.Generator().manual_seed(seed)
    for attention in _attentions(twin):
        _scale_attention(attention, scale, pairs, count, generator)
    _check_same(model, twin)
    return twin


def _attentions(model: nn.Module) -> Iterator[_Attention]:
    for name, module in model.named_modules():
        if not (
            isinstance(getattr(module, "q_proj", None), nn.Linear)
            and isinstance(getattr(module, "k_proj", None), nn.Linear)
        ):
            continue
        head_dim = getattr(module, "head_dim", None)
        if not isinstance(head_dim, int):
            raise ModelError(
                "the attention module does not say its head_dim",
                where=name,
                fix="a Llama-like model; others have no twin",
            )
        parameters = getattr(getattr(module, "config", None), "rope_parameters", None) or {}
        partial = parameters.get("partial_rotary_factor", 1.0) if isinstance(parameters, dict) else 1.0
        yield _Attention(name, module, head_dim, int(head_dim * partial))


def _structural_copy(model: nn.Module, attentions: list[nn.Module]) -> nn.Module:
    """A deep copy that shares every parameter and buffer except those about to be scaled."""
    own: set[int] = set()
    for module in attentions:
        for name in ("q_proj", "k_proj", "q_norm", "k_norm"):
            child = getattr(module, name, None)
            own.update(id(p) for p in child.parameters()) if isinstance(child, nn.Module) else None
    shared = [t for t in (*model.parameters(), *model.buffers()) if id(t) not in own]
    return copy.deepcopy(model, {id(t): t for t in shared})


def _scale_attention(attention: _Attention, scale: float, pairs: str, count: int, generator: torch.Generator) -> None:
    half = attention.rotary_dim // 2
    first = 0 if pairs == "any" else half - half // 4
    if half - first < count:
        raise OptionError(f"{count} pairs of {half - first}", where=attention.name, fix="a smaller count")

    def draw() -> Tensor:
        index = first + torch.randperm(half - first, generator=generator)[:count]
        factor = torch.ones(attention.head_dim)
        factor[torch.cat([index, index + half])] = scale
        return factor

    module, kv_heads = attention.module, attention.kv_heads
    groups = _projection(module, "q_proj").out_features // attention.head_dim // kv_heads
    k_norm, q_norm = getattr(module, "k_norm", None), getattr(module, "q_norm", None)
    if k_norm is None and q_norm is None:
        factors = torch.stack([draw() for _ in range(kv_heads)])
        _scale_rows(_projection(module, "k_proj"), factors)
        _scale_rows(_projection(module, "q_proj"), 1 / factors.repeat_interleave(groups, 0))
        return
    # A norm after the projection would undo a scaled projection: scale what it multiplies with.
    factor = draw()
    _scale_norm(k_norm, factor, f"{attention.name}.k_norm")
    _scale_norm(q_norm, 1 / factor, f"{attention.name}.q_norm")


def _projection(module: nn.Module, name: str) -> nn.Linear:
    projection = getattr(module, name)
    assert isinstance(projection, nn.Linear)
    return projection


@torch.no_grad()
def _scale_rows(projection: nn.Linear, factors: Tensor) -> None:
    rows = factors.reshape(-1).to(projection.weight)
    projection.weight.mul_(rows[:, None])
    if projection.bias is not None:
        projection.bias.mul_(rows)


@torch.no_grad()
def _scale_norm(norm: object, factor: Tensor, where: str) -> None:
    """Make a norm's output ``factor`` times as large, channel by channel.

    Raises:
        ModelError: It is no norm with a weight per channel, or does not multiply with its weight (some multiply with
            1 + weight).
    """
    weight = getattr(norm, "weight", None)
    if not isinstance(norm, nn.Module) or not isinstance(weight, nn.Parameter) or weight.numel() % factor.numel():
        raise ModelError(
            f"cannot scale the channels of {type(norm).__name__}",
            where=where,
            fix="a model whose q_norm and k_norm have a weight per channel",
        )
    wide = factor.to(weight).repeat(weight.numel() // factor.numel())
    probe = torch.randn(4, weight.numel(), generator=torch.Generator().manual_seed(0)).to(weight)
    wanted = norm(probe) * wide
    weight.mul_(wide)
    if not torch.allclose(norm(probe), wanted, rtol=1e-4, atol=1e-6):
        raise ModelError(
            f"{type(norm).__name__} does not multiply with its weight",
            where=where,
            fix="models with this norm have no twin yet",
        )


@torch.no_grad()
def _check_same(model: nn.Module, twin: nn.Module) -> None:
    device = next(model.parameters()).device
    vocabulary = getattr(getattr(model, "config", None), "vocab_size", None)
    if not isinstance(vocabulary, int):
        raise InputError(
            "the model does not say its vocabulary", where=type(model).__name__, fix="a causal language model"
        )
    ids = torch.randint(vocabulary, (1, PROBE_TOKENS), generator=torch.Generator().manual_seed(0)).to(device)
    base, other = model(input_ids=ids, use_cache=False).logits, twin(input_ids=ids, use_cache=False).logits
    off = float((base - other).abs().max() / base.abs().max())
    if not off <= TOLERANCE:
        raise ModelError(
            f"the twin differs from the model by {off:.1e} of the largest logit",
            where=type(model).__name__,
            fix="models whose RoPE pairs are not (i, i + R/2) have no twin yet",
        )
