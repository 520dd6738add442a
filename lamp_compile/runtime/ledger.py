"""What happened in all caches of one compiled model, those that are gone included, and what was decided on the host.

Caches are watched weakly. What one counted is kept when it dies, is reset, or gives a slot to another sequence.
"""

from __future__ import annotations

import weakref
from collections import Counter, deque
from typing import Any

from torch import Tensor

MOST_GONE = 4096
"""Layers of dead caches that wait for a controller's reading; more are dropped, the oldest first, and counted."""
MOST_PENDING = 1024
"""Statistics of dead caches that are kept as tensors; beyond it they are read, which waits for the device."""


class Ledger:
    """Counters of one compiled model.

    Attributes:
        events: What happened on the host, by name: retried steps, fetched exact copies, ...
        gone: Layers of dead caches, for the controller's next reading: cache's key, site, state, statistics.
        unread: Of these, how many were dropped.
    """

    def __init__(self) -> None:
        self.events: Counter[str] = Counter()
        self.gone: deque[tuple[int, str, Tensor, Tensor]] = deque(maxlen=MOST_GONE)
        self.unread = 0
        self._live: dict[int, weakref.ref[Any]] = {}
        self._pending: deque[tuple[str, Tensor]] = deque()
        self._past: dict[str, list[int]] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> Ledger:
        """Copies of a model or a cache count in the same place."""
        return self

    def watch(self, cache: Any) -> None:
        """Take a new cache into account from now on."""
        self._live[id(cache)] = weakref.ref(cache)
        # A finaliser may run anywhere, also while a graph is captured: it takes names down and touches no device.
        weakref.finalize(cache, self._gone, id(cache), cache.layers).atexit = False
        if len(self._pending) > MOST_PENDING:
            self._fold()

    def caches(self) -> list[Any]:
        """The caches that are alive."""
        found = [ref() for ref in self._live.copy().values()]  # copied in one go: finalisers run in any thread
        return [cache for cache in found if cache is not None]

    def retire(self, site: str, stats: Tensor) -> None:
        """Keep what statistics ``[B, G, 7]`` say that are about to be zeroed. No synchronisation."""
        summed = (site, stats.detach().sum((0, 1)))
        for index in range(len(self._pending)):  # another thread or a finaliser may append meanwhile
            if self._pending[index][1] is stats:
                self._pending[index] = summed
                return
        self._pending.append(summed)

    def totals(self) -> dict[str, list[int]]:
        """Statistics (``runtime.guard``) by site, over all caches there were. Reads the device."""
        self._fold()
        found = {site: list(counts) for site, counts in self._past.items()}
        for cache in self.caches():
            for layer in counted(cache):
                _add(found, layer.name, layer.stats)
        return found

    def _gone(self, key: int, layers: list[Any]) -> None:
        self._live.pop(key, None)
        for layer in layers:
            if _counts(layer):
                self._pending.append((layer.name, layer.stats))
                self.unread += len(self.gone) == MOST_GONE
                self.gone.append((key, layer.name, layer.state, layer.stats))

    def _fold(self) -> None:
        """Read what is pending. The tensors are zeroed: their memory may serve another cache, which counts anew."""
        while self._pending:
            site, stats = self._pending.popleft()
            _add(self._past, site, stats)
            stats.zero_()


def counted(cache: Any) -> list[Any]:
    """The layers of a cache that have statistics."""
    return [layer for layer in cache.layers if _counts(layer)]


def _counts(layer: Any) -> bool:
    return bool(layer.is_initialized) and hasattr(layer, "stats")


def _add(counts: dict[str, list[int]], site: str, stats: Tensor) -> None:
    new = [sum(column) for column in zip(*stats.reshape(-1, stats.shape[-1]).tolist(), strict=True)]
    held = counts.get(site, [0] * len(new))
    counts[site] = [a + b for a, b in zip(held, new, strict=True)]
