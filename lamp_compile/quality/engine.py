"""The compiled model as quality measurement sees it: one forward per window over a fresh cache, under any plan.

One forward over a window has the semantics of decoding it token by token: every query row decides for itself from the
keys before it. That is the reference's; kernels let the rows of one forward share decisions.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from lamp_compile.plan import Plan, SitePlan
from lamp_compile.runtime import cache_argument, guard
from lamp_compile.runtime.cache_layers import LayerSpec, NestedLayer
from lamp_compile.runtime.controls import SiteControls
from lamp_compile.runtime.kv_cache import CacheSpec, NestedCache


@dataclass(frozen=True)
class SiteTiles:
    """What one site read in one run.

    Attributes:
        counts: Live and refined sub-tiles, int64 ``[2]``, on the device.
        key_dim: D.
        value_dim: Dv.
        kv_heads: G; G x (D + Dv) values are stored per token.
        groups: Query heads per kv head.
    """

    counts: Tensor
    key_dim: int
    value_dim: int
    kv_heads: int
    groups: int


@dataclass(frozen=True)
class Run:
    """One forward over a batch of windows.

    Attributes:
        logits: ``[B, S, V]``.
        tiles: What each site read.
        kv_bytes: Bytes of the KV cache as allocated.
        float_values: Values per token that layers without LAMP keep as they come.
    """

    logits: Tensor
    tiles: dict[str, SiteTiles]
    kv_bytes: int
    float_values: int = 0


class Engine(Protocol):
    """A model on the real runtime whose plan can be replaced from run to run."""

    @property
    def plan(self) -> Plan:
        """The plan it was compiled with."""

    def run(self, ids: Tensor, plan: Plan) -> Run:
        """One forward over ``ids`` ``[B, S]`` from an empty cache under ``plan``, whose rules may be controls."""


class CompiledEngine:
    """The engine of ``lamp_compile.compile(model, mode="eager")``.

    Args:
        fast: The compiled model.
    """

    def __init__(self, fast: Any) -> None:
        self._fast = fast
        self._spec: CacheSpec = fast.lamp.spec
        self._heads = int(fast.config.get_text_config(decoder=True).num_attention_heads)

    @property
    def plan(self) -> Plan:
        """The plan it was compiled with."""
        plan: Plan = self._fast.lamp.plan
        return plan

    def run(self, ids: Tensor, plan: Plan) -> Run:
        """One forward over ``ids`` ``[B, S]`` from an empty cache under ``plan``, whose rules may be controls; sites
        that it does not apply run as the model has them."""
        rows = [None if layer is None else plan.site(layer.plan.name) for layer in self._spec.layers]
        layers = tuple(
            _layer(layer, row) if layer is not None and row is not None and row.apply else None
            for layer, row in zip(self._spec.layers, rows, strict=True)
        )
        cache = NestedCache(replace(self._spec, layers=layers), capacity=ids.shape[1])
        for layer in cache.layers:
            layer.reference_only = True
        with torch.no_grad():
            logits = self._fast(input_ids=ids, **cache_argument.given(self._fast, cache), use_cache=True).logits
        tiles = {layer.name: self._tiles(layer) for layer in cache.layers if isinstance(layer, NestedLayer)}
        kept = [layer for layer in cache.layers if not isinstance(layer, NestedLayer) and layer.is_initialized]
        values = sum(layer.num_heads * (layer.k_head_dim + layer.v_head_dim) for layer in kept)
        return Run(logits, tiles, cache.nbytes, values)

    def _tiles(self, layer: NestedLayer) -> SiteTiles:
        counts = layer.stats.sum((0, 1))[[guard.LIVE, guard.REFINED]]
        return SiteTiles(
            counts, layer.k_head_dim, layer.v_head_dim, layer.num_heads, max(1, self._heads // layer.num_heads)
        )


def _layer(made: LayerSpec, site: SitePlan) -> LayerSpec:
    """The same layer under another plan, with hot tensors of its own."""
    if site == made.plan:
        return replace(made, controls=_controls(made, site))
    device = made.controls.tau.device
    balance = None if site.balance is None else torch.tensor(site.balance, dtype=torch.float32, device=device)
    network = replace(made.network, skip=site.skip) if site.lookahead == "network" else None
    return LayerSpec(site, _controls(made, site), balance, network=network)


def _controls(made: LayerSpec, site: SitePlan) -> SiteControls:
    return SiteControls.of(site, made.controls.tau.shape[0], made.controls.tau.device)
