"""What happened in all caches of one compiled model, those that are gone included, and what was decided on the host.

Caches are watched weakly. What one counted is kept when it dies, is reset, or gives a slot to another sequence.
"""

from __future__ import annotations

import weakref
from collections import Counter, deque
from collections.abc import Iterable
from itertools import count
from threading import Lock
from typing import Any

import torch
from torch import Tensor

MOST_GONE = 4096
"""Layers of dead caches that wait for a controller's reading; more are dropped, the oldest first, and counted."""
MOST_PENDING = 1024
"""Statistics of dead caches that are kept as tensors; beyond it they are read, which waits for the device."""


class Ledger:
    """Counters of one compiled model.

    Attributes:
        events: What happened on the host, by name: retried steps, fetched exact copies, ...
        gone: Layers of dead caches, for the controller's next reading: cache's number, site, state, statistics.
        unread: Of these, how many were dropped.
    """

    def __init__(self) -> None:
        self.events: Counter[str] = Counter()
        self.gone: deque[tuple[int, str, Tensor, Tensor]] = deque(maxlen=MOST_GONE)
        self.unread = 0
        self._live: dict[int, weakref.ref[Any]] = {}
        """By a number of each cache's own: its ``id`` would be another's when it is gone."""
        self._numbers = count()
        self._pending: dict[int, tuple[str, Tensor]] = {}
        """Statistics of dead caches, by ``id`` of the tensor."""
        self._retired: dict[tuple[Any, ...], Tensor] = {}
        """Sums of what was zeroed ``[sites, 7]``, by device and names of the sites."""
        self._past: dict[str, list[int]] = {}
        self._kept = Lock()
        """Of the three above, for what is moved from one to another. Finalisers, which only add, do without: they may
        run in the middle of it."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Ledger:
        """Copies of a model or a cache count in the same place."""
        return self

    def watch(self, cache: Any) -> None:
        """Take a new cache into account from now on."""
        number = next(self._numbers)
        self._live[number] = weakref.ref(cache)
        # A finaliser may run anywhere, also while a graph is captured: it takes names down and touches no device.
        weakref.finalize(cache, self._gone, number, cache.layers).atexit = False
        if len(self._pending) > MOST_PENDING:
            self._fold()

    def caches(self) -> list[Any]:
        """The caches that are alive."""
        return [cache for _, cache in self.numbered()]

    def numbered(self) -> list[tuple[int, Any]]:
        """The caches that are alive, each with its number."""
        held = self._live.copy()  # in one go: finalisers run in any thread
        found = [(number, ref()) for number, ref in held.items()]
        return [(number, cache) for number, cache in found if cache is not None]

    def retire(self, counts: Iterable[tuple[str, Tensor]]) -> None:
        """Keep what statistics ``[B, G, 7]`` of some sites say that are about to be zeroed. No synchronisation, and of
        what happens often (a slot that gets another sequence) nothing piles up: it is summed where it is."""
        rows = list(counts)
        with self._kept:
            for _, stats in rows:
                self._pending.pop(id(stats), None)  # of a dead cache whose tensors another has taken over
            for sites, new in _summed(rows):
                key = (new.device, *sites)
                held = self._retired.get(key)
                self._retired[key] = new if held is None else held + new

    def totals(self) -> dict[str, list[int]]:
        """Statistics (``runtime.guard``) by site, over all caches there were. Reads the device."""
        self._fold()
        with self._kept:
            found = {site: list(counts) for site, counts in self._past.items()}
        live = [(layer.name, layer.stats) for cache in self.caches() for layer in counted(cache)]
        for sites, summed in _summed(live):
            _add(found, sites, summed)
        return found

    def _gone(self, number: int, layers: list[Any]) -> None:
        self._live.pop(number, None)
        for layer in layers:
            if _counts(layer):
                self._pending[id(layer.stats)] = (layer.name, layer.stats)
                self.unread += len(self.gone) == MOST_GONE
                self.gone.append((number, layer.name, layer.state, layer.stats))

    def _fold(self) -> None:
        """Read what is kept as tensors. Those of dead caches are zeroed: their memory may serve another cache, which
        counts anew."""
        with self._kept:
            while self._retired:
                (_, *sites), summed = self._retired.popitem()
                _add(self._past, sites, summed)
            dead = []
            while self._pending:
                dead.append(self._pending.popitem()[1])
            for sites, summed in _summed(dead):
                _add(self._past, sites, summed)
            for _, stats in dead:
                stats.zero_()


def counted(cache: Any) -> list[Any]:
    """The layers of a cache that have statistics."""
    return [layer for layer in cache.layers if _counts(layer)]


def _counts(layer: Any) -> bool:
    return bool(layer.is_initialized) and hasattr(layer, "stats")


def _summed(rows: Iterable[tuple[str, Tensor]]) -> list[tuple[list[str], Tensor]]:
    """Sites, and sums ``[sites, 7]`` over sequences and kv heads of their statistics ``[B, G, 7]``: a few launches for
    all that are alike."""
    alike: dict[tuple[Any, ...], list[tuple[str, Tensor]]] = {}
    for site, stats in rows:
        alike.setdefault((stats.shape, stats.device), []).append((site, stats.detach()))
    return [
        ([site for site, _ in group], torch.stack([stats for _, stats in group]).sum((1, 2)))
        for group in alike.values()
    ]


def _add(counts: dict[str, list[int]], sites: Iterable[str], summed: Tensor) -> None:
    for site, new in zip(sites, summed.tolist(), strict=True):
        held = counts.get(site, [0] * len(new))
        counts[site] = [a + b for a, b in zip(held, new, strict=True)]
