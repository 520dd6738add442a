"""What the controller reads of a model's caches, off to one side: the model's stream is never waited for.

On a GPU the guard's tensors are copied to page-locked memory on a stream of the reader's own, and an event says when
they are there; on a CPU they are copied. Either may catch a step half-way: counts then lag by a layer.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lamp_compile.runtime import guard
from lamp_compile.runtime.controller import SiteSample, Statistics
from lamp_compile.runtime.controller_thread import StepClock
from lamp_compile.runtime.ledger import Ledger, counted

WINDOWS = 2
"""Readings are apart by so many of the guard's windows at least: its mean follows that slowly."""
POLL = 0.0005


_Entry = tuple[int, bool, str, Tensor, Tensor]
"""A layer to read: its cache's number, whether the cache is alive, its site, state and statistics."""


class SideCopies:
    """Copies device tensors to the host on a stream of its own."""

    def __init__(self) -> None:
        self._streams: dict[torch.device, Any] = {}
        self._buffers: dict[tuple[torch.device, int], Tensor] = {}

    def __call__(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The tensors, on the host; the next call may write over those from a GPU."""
        events, copies = [], []
        for index, x in enumerate(tensors):
            if x.device.type != "cuda":
                copies.append(x.detach().clone())
                continue
            if x.device not in self._streams:
                self._streams[x.device] = torch.cuda.Stream(x.device)  # type: ignore[no-untyped-call]
            stream = self._streams[x.device]
            buffer = self._buffers.get((x.device, index))
            if buffer is None or buffer.shape != x.shape or buffer.dtype != x.dtype:
                buffer = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
                self._buffers[(x.device, index)] = buffer
            with torch.cuda.stream(stream):
                buffer.copy_(x, non_blocking=True)
            copies.append(buffer)
        for stream in self._streams.values():
            event: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(stream)
            events.append(event)
        while not all(event.query() for event in events):
            time.sleep(POLL)
        return copies


class Reader:
    """Differences of all caches' statistics between readings.

    Args:
        ledger: Of the model.
        windows: The guard's window in steps, by site, in the controller's order.
        clock: Times of decode steps.

    Attributes:
        set_back: Counters that were found set back to 0, or that a slot's new sequence began anew.
    """

    def __init__(self, ledger: Ledger, windows: Mapping[str, int], clock: StepClock) -> None:
        self._ledger, self._windows, self._clock = ledger, dict(windows), clock
        self._before: dict[tuple[int, str], Tensor] = {}
        self._copy = SideCopies()
        self.set_back = 0
        self._unread = ledger.unread
        ledger.gone.clear()

    @property
    def unread(self) -> int:
        """Layers of caches that came and went between two readings, and were too many to keep."""
        return self._ledger.unread - self._unread

    def read(self) -> Statistics | None:
        """What happened since the last reading; None while that is too little to judge by."""
        gone = list(self._ledger.gone)
        found = self._entries(gone)
        both = self._copy([tensor for *_, state, stats in found for tensor in (state, stats)])
        sites: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {name: [] for name in self._windows}
        after = {}
        back = 0
        for index, (number, alive, site, *_) in enumerate(found):
            state, stats = both[2 * index], both[2 * index + 1].clone()
            if state.shape[:2] != stats.shape[:2]:
                continue  # the batch changed between the two copies
            delta = stats - self._held(number, site, stats)  # wraps as the counters do
            back += int((delta < 0).any(-1).sum())
            sites[site].append((state, stats, torch.where((delta < 0).any(-1, keepdim=True), stats, delta)))
            if alive:
                after[(number, site)] = stats
        most = max((int(delta[..., guard.STEPS].max()) for parts in sites.values() for *_, delta in parts), default=0)
        if most < WINDOWS * max(self._windows.values()):
            return None
        self._before = after
        self.set_back += back
        for _ in range(min(len(gone), len(self._ledger.gone))):
            self._ledger.gone.popleft()
        return Statistics(
            tuple(_sample(sites[name], window) for name, window in self._windows.items()), self._clock.drain()
        )

    def _entries(self, gone: Sequence[tuple[int, str, Tensor, Tensor]]) -> list[_Entry]:
        """Layers of caches alive, and of those that died since the last reading, unless another cache has their
        tensors by now."""
        found: list[_Entry] = [
            (number, True, layer.name, layer.state, layer.stats)
            for number, cache in self._ledger.numbered()
            for layer in counted(cache)
            if layer.name in self._windows
        ]
        taken = {id(stats) for *_, stats in found}
        return found + [
            (number, False, site, state, stats)
            for number, site, state, stats in gone
            if site in self._windows and id(stats) not in taken
        ]

    def _held(self, number: int, site: str, stats: Tensor) -> Tensor:
        """The same cache's statistics at the last reading; zeros for a cache that is new."""
        before = self._before.get((number, site))
        return before if before is not None and before.shape == stats.shape else torch.zeros_like(stats)


def _sample(parts: Sequence[tuple[Tensor, Tensor, Tensor]], window: int) -> SiteSample:
    """One site's, over all caches and sequences that went on."""
    totals, squares, held = torch.zeros(guard.STATS_FIELDS, dtype=torch.int64), [], False
    for state, stats, delta in parts:
        moved = delta[..., guard.STEPS] > 0
        totals += delta.sum((0, 1))
        # A running mean that began at 0 has seen 1 - (1 - 1 / window)^steps of its weight.
        seen = 1.0 - (1.0 - 1.0 / window) ** stats[..., guard.STEPS].double()
        squares.append((state[..., guard.ERROR].double() / seen.clamp_min(1e-9))[moved])
        held = held or bool((state[..., guard.FLOOR][moved] > 0).any())
    square = torch.cat(squares) if squares else torch.zeros(0)
    return SiteSample(
        steps=int(totals[guard.STEPS]),
        error=float(square.mean().sqrt()) if square.numel() else 0.0,
        live=int(totals[guard.LIVE]),
        refined=int(totals[guard.REFINED]),
        raised=int(totals[guard.RAISED]),
        bad=int(totals[guard.BAD]),
        held=held,
    )
