"""Where a cache stands before a step, so that the step can be taken back: lengths, the guard's state, statistics, and
what a look-ahead network keeps.

Planes are not copied. Rows behind the length belong to nobody, and the next step writes over them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lamp_compile.ir import Floor
from lamp_compile.runtime import formats, guard
from lamp_compile.runtime.cache_layers import NestedLayer
from lamp_compile.runtime.kv_cache import NestedCache
from lamp_compile.runtime.slot_cache import SlotView

NETWORK = ("history", "trust")
"""Of layers that a network predicts; summaries are of rows, like planes."""
EVENTS = (guard.RAISED, guard.LOWERED, guard.BAD)


class Checkpoint:
    """Taken before a step; ``rollback`` undoes the step. No host synchronisation but in ``rose``.

    Args:
        cache: Of the compiled model; it may be empty.
    """

    def __init__(self, cache: NestedCache) -> None:
        self._cache = cache
        self._layers = [layer for layer in cache.layers if isinstance(layer, NestedLayer)]
        self._lengths = [length.clone() for length in _lengths(cache)]
        self._marks = (cache._longest, [layer.host_marks() for layer in cache.layers])
        ready = all(layer.is_initialized for layer in self._layers)
        self._before = _gather(self._layers) if ready else None
        self._kept = [(layer, name, _clone(layer, name)) for layer in self._layers for name in _network(layer)]
        self._filled = list(cache.rows.table.filled) if isinstance(cache, SlotView) else []

    def rose(self) -> bool:
        """Whether, in a site whose plan asks for a retry, a floor rose to a level that changes what is read. Waits for
        the device."""
        self._risen = self._rises()
        return bool(self._risen.any())

    def rollback(self, *, keep_rises: bool = False) -> None:
        """The cache as it was before the step.

        Args:
            keep_rises: After ``rose()``: floors that rose stay up, and these events stay counted.
        """
        for length, held in zip(_lengths(self._cache), self._lengths, strict=True):
            length.copy_(held)
        self._cache._longest = self._marks[0]
        for layer, marks in zip(self._cache.layers, self._marks[1], strict=True):
            layer.set_host_marks(marks)
        for layer, name, kept in self._kept:
            if layer.is_initialized:
                getattr(layer, name).copy_(kept) if kept is not None else getattr(layer, name).zero_()
        if isinstance(self._cache, SlotView):
            self._cache.rows.table.filled[:] = self._filled
        ready = [layer for layer in self._layers if layer.is_initialized]
        state, stats = self._at_start(ready)
        if keep_rises:
            now_state, now_stats = _gather(ready)
            risen = self._risen[:, None]
            events = torch.zeros_like(stats)
            events[:, EVENTS] = (now_stats - stats)[:, EVENTS]
            state, stats = torch.where(risen, now_state, state), stats + events * risen
        _scatter(ready, state, stats)

    def _at_start(self, ready: list[NestedLayer]) -> tuple[Tensor, Tensor]:
        if self._before is not None:
            return self._before
        state, stats = _gather(ready)
        return torch.zeros_like(state), torch.zeros_like(stats)

    def _rises(self) -> Tensor:
        """Bool, one per layer, sequence and kv head."""
        ready = [layer for layer in self._layers if layer.is_initialized]
        before, after = self._at_start(ready)[0], _gather(ready)[0]
        floors = torch.cat([layer.controls.floor.expand(layer.state.shape[:2]).flatten() for layer in ready])
        most = torch.cat([torch.full_like(layer.state[..., 0], _most(layer)).flatten() for layer in ready])
        old, new = (torch.maximum(x[:, guard.FLOOR], floors).minimum(most) for x in (before, after))
        return new > old


def _most(layer: NestedLayer) -> float:
    """The highest level that differs from the one below; -1 where the plan asks for no retry."""
    if not layer.plan.guard.retry:
        return -1.0
    if layer.has_exact:
        return float(Floor.EXACT)
    refines = any(formats.get(name).residual_bits for name in (layer.plan.k_format, layer.plan.v_format))
    return float(Floor.BOTH if refines else Floor.RULE)


def _network(layer: NestedLayer) -> list[str]:
    return [name for name in NETWORK if name in layer.per_sequence]


def _clone(layer: NestedLayer, name: str) -> Tensor | None:
    """A copy, or None of a layer that holds nothing yet: it begins with zeros."""
    found: Tensor | None = getattr(layer, name).clone() if layer.is_initialized else None
    return found


def _lengths(cache: NestedCache) -> list[Tensor]:
    if isinstance(cache, SlotView):
        return [cache.lengths]
    return [layer.cumulative_length for layer in cache.layers]


def _gather(layers: list[NestedLayer]) -> tuple[Tensor, Tensor]:
    """States ``[n, 4]`` and statistics ``[n, 7]`` of all layers, copied."""
    return (
        torch.cat([layer.state.reshape(-1, guard.STATE_FIELDS) for layer in layers]),
        torch.cat([layer.stats.reshape(-1, guard.STATS_FIELDS) for layer in layers]),
    )


def _scatter(layers: list[NestedLayer], state: Tensor, stats: Tensor) -> None:
    sizes: list[Any] = [layer.state.shape[0] * layer.state.shape[1] for layer in layers]
    for name, whole in (("state", state), ("stats", stats)):
        targets = [getattr(layer, name) for layer in layers]
        parts = [part.view_as(target) for part, target in zip(torch.split(whole, sizes), targets, strict=True)]
        torch._foreach_copy_(targets, parts)
