"""Time of device work: captured graphs replayed between events on a GPU, the clock elsewhere."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

Call = Callable[[], Any]
LEAST_CALLS = 16
"""Calls in one captured graph at least: the graph's start and the events count once for all of them."""


def milliseconds(calls: Sequence[Call], repeats: int, device: torch.device) -> float:
    """Median time of one call. On CUDA the calls (the same work on different inputs, more than the caches hold) take
    turns inside one captured graph, which is replayed between events."""
    if device.type != "cuda":
        return _on_the_host(calls, repeats)
    turns = [*calls] * -(-LEAST_CALLS // len(calls))
    cuda: Any = torch.cuda
    side = cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in (*turns, *turns)[: max(3, len(calls))]:
            call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in turns:
            call()
    for _ in range(2):
        graph.replay()
    marks = [tuple(cuda.Event(enable_timing=True) for _ in range(2)) for _ in range(repeats)]
    for began, ended in marks:
        began.record()
        graph.replay()
        ended.record()
    torch.cuda.synchronize()
    return statistics.median(float(began.elapsed_time(ended)) for began, ended in marks) / len(turns)


def _on_the_host(calls: Sequence[Call], repeats: int) -> float:
    calls[0]()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        for call in calls:
            call()
        times.append((time.perf_counter() - began) * 1e3 / len(calls))
    return statistics.median(times)
