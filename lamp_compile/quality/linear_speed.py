"""How many times as fast one row goes through INT8 weights on this CPU, as the compiler runs it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Graph, GraphModule

from lamp_compile import backends
from lamp_compile.runtime import linear as _linear  # noqa: F401  (registers lamp::linear_int8)

BYTES, MOST_COPIES = 64 << 20, 12
"""Weights read in turn, as a decode step reads those of other layers between two uses; and copies made for it."""
REPEATS, ROUNDS = 8, 5
"""Timings in a row, and turns that the two take. The fastest counts: what else runs here only ever adds."""

ATTEMPTS, PLAUSIBLE = 3, 0.5
"""No layer is that much slower by itself: threads then wait for each other because others use the cores. After a
second, and after two more, it is measured again."""


@cache
def speedup(outputs: int, inputs: int, group: int, dtype: torch.dtype, dynamic: bool) -> float:
    """Time of ``F.linear`` over that of compiled INT8 loops, for one row of ``inputs`` numbers.

    Measured once a process and shape. Inductor keeps what it compiled on disk.

    Raises:
        CaptureError: Inductor cannot compile here.
    """
    copies = max(1, min(MOST_COPIES, BYTES // (outputs * inputs * dtype.itemsize)))
    x = torch.randn(1, inputs).to(dtype)
    originals = [torch.randn(outputs, inputs).to(dtype) for _ in range(copies)]
    rounded = [torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8) for _ in range(copies)]
    scale = torch.rand(outputs, inputs // group if group else 1)
    run = _compiled(x, rounded, scale, dynamic)
    before = [partial(F.linear, x, weight) for weight in originals]
    after = [partial(run, x, scale, *rounded)]
    turns: list[tuple[float, float]] = []
    with torch.no_grad():
        for attempt in range(ATTEMPTS):
            time.sleep(attempt)
            turns += [(_fastest(before), _fastest(after)) for _ in range(ROUNDS)]
            ratio = min(turn[0] for turn in turns) / min(turn[1] for turn in turns)
            if ratio >= PLAUSIBLE:
                break
    return ratio


def _fastest(calls: Sequence[Callable[[], Any]]) -> float:
    """Seconds of all calls, one after the other, at best."""
    times = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        for call in calls:
            call()
        times.append(time.perf_counter() - began)
    return min(times[1:])


def _compiled(x: Tensor, rounded: list[Tensor], scale: Tensor, dynamic: bool) -> Any:
    """One graph with a layer for each of the weights."""
    graph = Graph()
    inputs = (x, scale, *rounded)
    nodes = []
    for index, tensor in enumerate(inputs):
        node = graph.placeholder(f"input{index}")
        node.meta["val"] = tensor
        nodes.append(node)
    target: Any = torch.ops.lamp.linear_int8.default
    outs = [
        graph.call_function(target, (nodes[0], weight, nodes[1], None), {"dynamic": dynamic, "site": "speed"})
        for weight in nodes[2:]
    ]
    graph.output(tuple(outs))
    module = GraphModule(torch.nn.Module(), graph)
    return backends.get("inductor").lower(module, inputs, None, {})
