"""A queue of requests with mixed lengths, the padded batches that a server without slots makes of it, and its clock."""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from _timing import Energy, synchronize
from torch import Tensor

FIRST_ID = 3
"""The smallest random token id: those below are often special."""


@dataclass(frozen=True)
class Request:
    """One prompt, int64 ``[n]`` on the CPU, and how many tokens are wanted."""

    index: int
    prompt: Tensor
    new: int

    @property
    def length(self) -> int:
        """Tokens of the prompt."""
        return int(self.prompt.shape[0])

    @property
    def tokens(self) -> int:
        """Tokens that a cache must hold: the last one is never fed back."""
        return self.length + self.new - 1


def lengths(
    count: int, prompts: tuple[int, int], median: float, sigma: float, outputs: tuple[int, int], seed: int
) -> list[tuple[int, int]]:
    """(prompt, new tokens) of every request: clipped log-normal, and uniform."""
    generator = torch.Generator().manual_seed(seed)
    sizes = (median * (sigma * torch.randn(count, generator=generator)).exp()).round().clamp(*prompts)
    new = torch.randint(outputs[0], outputs[1] + 1, (count,), generator=generator)
    return [(int(size), int(n)) for size, n in zip(sizes, new, strict=True)]


def make(sizes: Sequence[tuple[int, int]], vocabulary: int, text: Tensor | None, seed: int) -> list[Request]:
    """Requests of these sizes: random ids, or slices of a text ``[n]`` at random places."""
    generator = torch.Generator().manual_seed(seed + 1)
    made = []
    for index, (size, new) in enumerate(sizes):
        if text is None:
            prompt = torch.randint(FIRST_ID, vocabulary, (size,), generator=generator)
        else:
            start = int(torch.randint(max(1, len(text) - size), (1,), generator=generator))
            prompt = text[start : start + size].clone()
        made.append(Request(index, prompt.long(), new))
    return made


def spread(requests: Sequence[Request], count: int) -> list[Request]:
    """So many requests from the shortest to the longest prompt."""
    ranked = sorted(requests, key=lambda request: request.length)
    count = min(count, len(ranked))
    return [ranked[round(i * (len(ranked) - 1) / max(1, count - 1))] for i in range(count)]


def pool_for(requests: Sequence[Request], streams: int, slack: float = 1.25) -> int:
    """Tokens of a pool in which ``streams`` requests usually fit side by side, and the longest always does."""
    longest = max(request.tokens for request in requests)
    mean = sum(request.tokens for request in requests) / len(requests)
    return min(streams * longest, max(longest, math.ceil(streams * mean * slack))) + streams * 32


@dataclass
class Batch:
    """Requests that are padded to one width, start together and go on until the longest answer ends."""

    requests: list[Request]
    rows: int
    capacity: int = 0

    @property
    def width(self) -> int:
        """Of the longest prompt."""
        return max(request.length for request in self.requests)

    @property
    def new(self) -> int:
        """Tokens of the longest answer."""
        return max(request.new for request in self.requests)

    @property
    def needed(self) -> int:
        """Tokens of a row."""
        return self.width + self.new - 1


def batches(requests: Sequence[Request], streams: int, most_tokens: float, sizes: int) -> list[Batch]:
    """Batches of similar prompt length, of ``streams`` rows, or fewer where a cache holds ``most_tokens`` at most. Each
    shape costs a compiled graph, so that no more than ``sizes`` capacities are used for each number of rows."""
    waiting, made = sorted(requests, key=lambda request: request.length), []
    while waiting:
        rows = streams
        while rows > 1 and rows * Batch(waiting[:rows], rows).needed > most_tokens:
            rows //= 2
        made.append(Batch(waiting[:rows], rows))
        waiting = waiting[rows:]
    for rows in {batch.rows for batch in made}:
        _share_capacities([batch for batch in made if batch.rows == rows], sizes)
    return made


def _share_capacities(group: list[Batch], sizes: int) -> None:
    """Give these batches at most so many different capacities, with the fewest padded keys read."""
    group = sorted(group, key=lambda batch: batch.needed)

    @functools.cache
    def best(first: int, left: int) -> tuple[float, tuple[int, ...]]:
        if first == len(group):
            return 0.0, ()
        found: tuple[float, tuple[int, ...]] = (math.inf, ())
        for end in range(first + 1, len(group) + 1) if left > 1 else [len(group)]:
            cost, ends = best(end, left - 1)
            cost += group[end - 1].needed * sum(batch.new for batch in group[first:end])
            found = min(found, (cost, (end, *ends)))
        return found

    start = 0
    for end in best(0, sizes)[1]:
        for batch in group[start:end]:
            batch.capacity = -(-group[end - 1].needed // 32) * 32
        start = end


class Clock:
    """Seconds and joules, counted only between ``start`` and ``stop``."""

    def __init__(self, device: torch.device, energy: Energy) -> None:
        self._device, self._energy = device, energy
        self.seconds, self.joules = 0.0, None if energy.joules() is None else 0.0
        self._began, self._used = 0.0, 0.0

    def start(self) -> None:
        """Count from here."""
        synchronize(self._device)
        self._used, self._began = self._energy.joules() or 0.0, time.perf_counter()

    def stop(self) -> None:
        """Count up to here."""
        synchronize(self._device)
        self.seconds += time.perf_counter() - self._began
        if self.joules is not None:
            self.joules += (self._energy.joules() or self._used) - self._used

    def at(self, moment: float) -> float:
        """Counted seconds at a moment of ``time.perf_counter`` since the last start."""
        return self.seconds + moment - self._began


@dataclass
class Served:
    """What came of a queue."""

    tokens: dict[int, list[int]] = field(default_factory=dict)
    """New tokens of the finished requests."""
    first: dict[int, float] = field(default_factory=dict)
    """Seconds from the start of the queue to the first token."""
    admitted: dict[int, float] = field(default_factory=dict)
    steps: int = 0
    """Decode steps of the whole batch."""
    busy: int = 0
    """Rows of these steps that made a token which somebody waits for."""
    slot_steps: int = 0
    """Rows of these steps; 0 where nobody knows."""
    kv_bytes: int | None = None
    kv_tokens: int | None = None
    extra: dict[str, Any] = field(default_factory=dict)


def median(values: Sequence[float]) -> float | None:
    """The median; None of nothing."""
    return statistics.median(values) if values else None


def mean(values: Sequence[float]) -> float | None:
    """The mean; None of nothing."""
    return statistics.fmean(values) if values else None
