"""A transformers cache whose keys and values exist as planes only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from lamp_compile.errors import CacheError
from lamp_compile.runtime import cache_argument, guard, layout
from lamp_compile.runtime.allocation import allocate, together, zero
from lamp_compile.runtime.cache_layers import FloatLayer, LayerShape, LayerSpec, NestedLayer
from lamp_compile.runtime.growable_layer import KEPT_FOR, rounded_capacity
from lamp_compile.runtime.insured_layer import InsuredLayer
from lamp_compile.runtime.ledger import Ledger
from lamp_compile.runtime.network.layer import NetworkLayer

__all__ = ["CacheSpec", "FloatLayer", "LayerSpec", "NestedCache", "NestedLayer", "rounded_capacity"]


class Unmasked(int):
    """How many keys there are, saying that they need no mask: ``lamp_mask`` makes none, unless the model wants a
    pattern of its own."""


@dataclass(frozen=True)
class CacheSpec:
    """All layers of one compiled model; None = this layer keeps float keys and values."""

    layers: tuple[LayerSpec | None, ...]
    fingerprint: str
    model: str
    owner: object = field(default_factory=object)
    """Stands for the one compiled model; a spec derived with ``dataclasses.replace`` keeps it."""
    ledger: Ledger = field(default_factory=Ledger)
    """Counters of all caches of the model; its layers' specs name the same one."""

    def __deepcopy__(self, memo: dict[int, Any]) -> CacheSpec:
        """A copied cache still belongs to its model."""
        return self


class NestedCache(Cache):  # type: ignore[misc]
    """The KV cache of a compiled model; make one with ``fast.lamp.cache()``, or let ``generate`` do it.

    Args:
        spec: What the compiled model's layers need (``fast.lamp.spec``).
        capacity: Keys to allocate at first, rounded up; the cache grows when it must.
        layers: Layers of an earlier cache of the same spec, to use their memory; made anew when left out.
    """

    watched = True
    """Its statistics are its own, and not those of a cache that this one is a view of."""

    def __init__(
        self,
        spec: CacheSpec,
        capacity: int = layout.TILE,
        layers: list[FloatLayer | NestedLayer] | None = None,
    ) -> None:
        super().__init__(layers=_new_layers(spec, rounded_capacity(capacity)) if layers is None else layers)
        self.spec = spec
        self._longest = 0
        if self.watched:
            spec.ledger.watch(self)
        self.unpadded = False
        """Set while a ``generate`` without padding uses this cache: lengths and causality say all, no mask is made."""

    @property
    def capacity(self) -> int:
        """Keys there is room for."""
        return int(self.layers[0].max_cache_len)

    def check(self, spec: CacheSpec, batch: int | None = None) -> None:
        """Raise unless this cache belongs to the model of ``spec`` and holds ``batch`` sequences (or none yet).

        Raises:
            CacheError: It is another model's cache or another batch's.
        """
        if spec.owner is not self.spec.owner:
            raise CacheError(
                f"a cache of another compiled model was given to {spec.model} ({spec.fingerprint}): "
                f"it belongs to {self.spec.model} ({self.spec.fingerprint})",
                where=cache_argument.NAME,
                fix="make it with `fast.lamp.cache()` of the model that uses it",
            )
        held = self.layers[0].batch_size
        if batch is not None and held not in (-1, batch) and int(self.get_seq_length()):
            raise CacheError(
                f"the cache holds {held} sequences and {batch} came",
                where=cache_argument.NAME,
                fix="use one cache per batch, or cache.reset()",
            )

    def ensure_capacity(self, keys: int) -> None:
        """Grow every layer to hold ``keys`` keys; contents are kept. Old and new planes exist side by side while they
        are copied, so that all layers grow or none.

        Raises:
            CacheError: There was not enough memory. The cache is as it was.
        """
        wider = allocate(
            lambda: [layer.widened(keys) for layer in self.layers],
            f"growing from {self.capacity} to {rounded_capacity(keys)} tokens",
            where=f"cache of {self.spec.model}",
            fix="a cache of the final size from the start, fast.lamp.cache(tokens); the cache is as it was",
        )
        for layer, tensors in zip(self.layers, wider, strict=True):
            layer.widen(keys, tensors)

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """Append rows to one layer; gives back what attention reads. All layers grow before the first takes a row that
        does not fit.

        Raises:
            CacheError: There was not enough memory to grow, or the rows do not belong here.
        """
        if not torch.compiler.is_compiling():
            if not self.layers[layer_idx].is_initialized:
                self._lay_out(key_states, value_states)
            self._make_room(layer_idx, int(key_states.shape[-2]))
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def _lay_out(self, k: Tensor, v: Tensor) -> None:
        """Make the tensors of all layers that these first rows ``[B, G, n, D]`` of one fit, with a few launches for all
        of them together; the others make theirs when they are given rows."""
        if k.dim() != 4 or v.dim() != 4:
            return
        shape = LayerShape(k.shape[1], k.shape[3], v.shape[3], k.dtype, k.device)
        with together():
            for layer in self.layers:
                if isinstance(layer, NestedLayer) and layer.spec.shape == shape and not layer.is_initialized:
                    layer.lazy_initialization(k, v)

    def _make_room(self, layer_idx: int, rows: int) -> None:
        layer = self.layers[layer_idx]
        if layer.is_initialized and layer.exceeds(rows):
            self.ensure_capacity(int(layer.cumulative_length) + rows)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Keys and offset of the mask for new queries; no keys where none is needed. Grows first if they need it: the
        mask is as wide as the cache."""
        if torch.compiler.is_compiling():
            self._longest = self.capacity  # the graph does not count: the next eager call reads the length
        elif isinstance(query_length, int):
            self._longest += query_length
            if self._longest > self.capacity:
                self._longest = int(self.get_seq_length()) + query_length
                self.ensure_capacity(self._longest)
        keys, offset = super().get_mask_sizes(query_length, layer_idx)
        if not self.unpadded:
            return keys, offset
        return (0 if torch.compiler.is_compiling() else Unmasked(keys)), offset

    def reset(self) -> None:
        """Forget all sequences; the memory and its addresses stay, and so does what was counted, in the ledger."""
        reset_layers(self.layers, self.spec.ledger)
        self._longest = 0

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values as allocated, scales included."""
        return sum(layer.nbytes for layer in self.layers)

    @property
    def bits_per_value(self) -> float:
        """Allocated bits per stored key or value element over all layers; 0 before the first token."""
        values = sum(
            layer.batch_size * layer.num_heads * layer.max_cache_len * (layer.k_head_dim + layer.v_head_dim)
            for layer in self.layers
            if layer.is_initialized
        )
        return self.nbytes * 8 / values if values else 0.0

    def memory(self) -> dict[str, int]:
        """Bytes by what they are for: planes and scales by name, what the guard keeps, what a network keeps."""
        found: dict[str, int] = {}
        for layer in self.layers:
            for name in layer.per_sequence if layer.is_initialized else ():
                tensor = getattr(layer, name)
                key = KEPT_FOR.get(name, name)
                found[key] = found.get(key, 0) + tensor.numel() * tensor.element_size()
            if isinstance(layer, InsuredLayer) and layer.is_initialized:
                found["host_copy"] = found.get("host_copy", 0) + layer.copy.nbytes
        return found

    def guard_report(self) -> list[dict[str, Any]]:
        """Per site: steps, share of sub-tiles refined, floor raised and lowered, flags in words. Reads the device."""
        return [_site_report(layer) for layer in self.layers if isinstance(layer, NestedLayer) and layer.is_initialized]


def reset_layers(layers: Sequence[FloatLayer | NestedLayer], ledger: Ledger) -> None:
    """``reset()`` of every layer, with a few launches for all of them together."""
    ledger.retire([(x.name, x.stats) for x in layers if isinstance(x, NestedLayer) and x.is_initialized])
    zero([tensor for layer in layers for tensor in layer.of_sequences()])
    for layer in layers:
        layer.forget()


_LAYERS = {"none": NestedLayer, "host": InsuredLayer}


def _new_layers(spec: CacheSpec, room: int) -> list[FloatLayer | NestedLayer]:
    return [
        FloatLayer(room, f"layer {index}") if layer is None else _nested(layer, room)
        for index, layer in enumerate(spec.layers)
    ]


def _nested(spec: LayerSpec, room: int) -> NestedLayer:
    kind = _LAYERS[spec.plan.exact_tier] if spec.network is None else NetworkLayer
    return kind(spec, room)


def _site_report(layer: NestedLayer) -> dict[str, Any]:
    counts: Sequence[int] = layer.stats.sum((0, 1)).tolist()
    bits = {bit for flags in layer.state[..., guard.FLAGS].flatten().tolist() for bit in (1, 2) if int(flags) & bit}
    if layer.has_exact:
        bits.discard(guard.EXACT_MISSING)  # the step that raises it does not know that the next one has them
    live = counts[guard.LIVE]
    return {
        "site": layer.name,
        "steps": int(layer.stats[..., guard.STEPS].max()),
        "refined_share": counts[guard.REFINED] / live if live else 0.0,
        "raised": counts[guard.RAISED],
        "lowered": counts[guard.LOWERED],
        "bad_steps": counts[guard.BAD],
        "floor": layer.state[..., guard.FLOOR].amax(0).tolist(),
        "error": layer.state[..., guard.ERROR].amax(0).sqrt().tolist(),
        "flags": guard.flag_names(sum(bits)),
        **(layer.network_report() if isinstance(layer, NetworkLayer) else {}),
    }
