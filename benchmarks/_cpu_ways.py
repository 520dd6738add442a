"""Ways to attend with one new token on a CPU: torch in floats, e4m3, and lamp. Each is a row of calls over sets of keys
and values that no cache holds together, whose outputs are known."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from _planes import STORE, Attention, Case, Inputs, Shape, importance
from _rivals import error
from torch import Tensor

from lamp_compile.runtime import kernels, layout
from lamp_compile.runtime.allocation import zeros

BLOCK = 1024
"""Keys that are turned from e4m3 into floats at once, so that the floats stay in a core's own cache."""
E4M3_LARGEST = 448.0
CACHE_TIMES = 3
"""Bytes that the sets of a way touch together, over the last-level cache's."""
MOST_SETS, DISTINCT, QUICK = 256, 2, 2


@dataclass
class Way:
    """One row: ``calls[i]`` attends over set ``i``, whose inputs are those of source ``i`` modulo their number."""

    name: str
    calls: Sequence[Callable[[], Tensor | None]]
    touched: float
    """Bytes that one call must read."""
    facts: dict[str, Any] = field(default_factory=dict)
    finish: Callable[[], dict[str, Any]] = dict
    """Facts known after the rounds."""


@dataclass(frozen=True)
class Sources:
    """What all ways of a case attend over: different inputs, and how large the last-level cache is."""

    case: Case
    shape: Shape
    inputs: Sequence[Inputs]
    cache: int

    def count(self, touched: float) -> int:
        """Sets that the cache does not hold."""
        return min(MOST_SETS, max(2, -(-CACHE_TIMES * self.cache // int(touched))))

    def of(self, index: int) -> Inputs:
        """The inputs of a set."""
        return self.inputs[index % len(self.inputs)]

    def bytes(self, per_value: float, per_key: float = 0.0) -> float:
        """Bytes of keys and values that take ``per_value`` each, and ``per_key`` more for every key."""
        return self.case.tokens * self.shape.kv_heads * (2 * self.shape.dim * per_value + per_key)


def _grouped(q: Tensor, k: Tensor) -> Tensor:
    return q.reshape(q.shape[0], k.shape[1], -1, q.shape[3])


def _repeated(x: Tensor, heads: int) -> Tensor:
    return x.repeat_interleave(heads // x.shape[1], dim=1)


def _multiply(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = _grouped(q, k) * q.shape[3] ** -0.5 @ k.mT
    return (scores.softmax(-1) @ v).reshape(q.shape)


Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
SDPA: dict[str, Attend] = {
    "enable_gqa": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True),
    "grouped as queries": lambda q, k, v: F.scaled_dot_product_attention(_grouped(q, k), k, v).reshape(q.shape),
    "repeated heads": lambda q, k, v: F.scaled_dot_product_attention(
        q, _repeated(k, q.shape[1]), _repeated(v, q.shape[1])
    ),
}
"""The group of a kv head as so many queries is the same without a mask, and what a careful caller would write."""
PRODUCTS: dict[str, Attend] = {"matmul, softmax, matmul": _multiply}


def floats(name: str, sources: Sources, dtype: torch.dtype, attends: dict[str, Attend]) -> Way:
    """Keys and values in a float type, by the fastest of several calls."""
    touched = sources.bytes(dtype.itemsize)
    sets = []
    for index in range(sources.count(touched)):
        given = sources.of(index)
        wide = (x.to(dtype, copy=True) for x in (given.q, given.k, given.v))
        sets.append(tuple(x.contiguous() for x in wide))
    tried = {word: _quick([lambda a=attend, s=s: a(*s) for s in sets]) for word, attend in attends.items()}
    best = min(tried, key=tried.__getitem__)
    calls = [lambda s=s: attends[best](*s) for s in sets]
    return Way(name, calls, touched, {"how": best, "tried_ms": tried})


def _quick(calls: Sequence[Callable[[], Any]]) -> float:
    """Milliseconds of a call, roughly."""
    calls[0]()
    times = []
    for call in (calls * QUICK)[: 2 * QUICK]:
        began = time.perf_counter()
        call()
        times.append((time.perf_counter() - began) * 1e3)
    return statistics.median(times)


def round_per_token(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values ``[..., N, D]`` as e4m3 with a scale per token and head keeps them, in float32."""
    (k8, ks), (v8, vs) = _e4m3(k), _e4m3(v)
    return k8.float() * ks[..., None], v8.float() * vs[..., None]


def _e4m3(x: Tensor) -> tuple[Tensor, Tensor]:
    """``[..., N, D]`` in e4m3, and a scale ``[..., N]``."""
    scale = (x.float().abs().amax(-1) / E4M3_LARGEST).clamp_min(1e-20)
    return (x.float() / scale[..., None]).to(torch.float8_e4m3fn), scale


def _attend_fp8(q: Tensor, k: tuple[Tensor, Tensor], v: tuple[Tensor, Tensor], dtype: torch.dtype) -> Tensor:
    """Blocks turned into ``dtype``; scales go to the scores and to the weights, not to every value."""
    (k8, k_scale), (v8, v_scale) = k, v
    keys, wide = k8.shape[2], (_grouped(q, k8) * q.shape[3] ** -0.5).to(dtype)
    blocks = [slice(start, start + BLOCK) for start in range(0, keys, BLOCK)]
    scores = torch.cat([wide @ k8[:, :, block].to(dtype).mT for block in blocks], -1).float()
    weights = ((scores * k_scale[:, :, None]).softmax(-1) * v_scale[:, :, None]).to(dtype)
    parts = [(weights[..., block] @ v8[:, :, block].to(dtype)).float() for block in blocks]
    return torch.stack(parts).sum(0).reshape(q.shape)


def fp8(sources: Sources) -> Way:
    """Keys and values in e4m3, a scale per token and head, as well as plain torch does it."""
    touched = sources.bytes(1, 8)
    stored = [(s.q.float(), _e4m3(s.k), _e4m3(s.v)) for s in sources.inputs]
    sets = []
    for index in range(sources.count(touched)):
        q, k, v = stored[index % len(stored)]
        sets.append((q, tuple(x.clone() for x in k), tuple(x.clone() for x in v)))
    kinds = (torch.bfloat16, torch.float32)
    tried = {str(kind)[6:]: _quick([lambda s=s, t=kind: _attend_fp8(*s, t) for s in sets]) for kind in kinds}
    best = min(tried, key=tried.__getitem__)
    kind = getattr(torch, best)
    return Way(
        "fp8",
        [lambda s=s: _attend_fp8(*s, kind) for s in sets],
        touched,
        {"how": f"blocks to {best}", "tried_ms": tried},
    )


class Lamp:
    """``lamp::append`` and ``lamp::fused_attention`` over planes of their own, in memory as a cache has it."""

    def __init__(self, sources: Sources) -> None:
        self.sources = sources
        count = sources.count(sources.shape.bytes_touched(sources.case, 0.0))
        self.sets = []
        for index in range(count):
            given = sources.of(index)
            stored = [_as_stored(p, sources.shape.dim) for p in given.planes]
            made = zeros({str(at): (tuple(p.shape), p.dtype) for at, p in enumerate(stored)}, given.q.device)
            planes = tuple(mine.copy_(p) for mine, p in zip(made.values(), stored, strict=True))
            self.sets.append(replace(given, q=given.q.float(), planes=planes))
        self.ranked = [importance(s) for s in self.sets[: len(sources.inputs)]]

    def at(self, name: str, shares: Sequence[float]) -> Way:
        """The attention with these shares of refined sub-tiles, which take turns as layers do."""
        kinds = len(self.ranked)
        ops: list[list[Attention]] = []
        got = []
        for share in shares:
            ops.append([])
            for inputs, ranked in zip(self.sets, self.ranked, strict=False):
                op = Attention(inputs)
                got.append(op.impose(inputs, share, ranked))
                ops[-1].append(op)
        share = statistics.fmean(got)
        turns = [ops[index % len(ops)][index % kinds] for index in range(len(self.sets))]
        calls = [lambda s=s, op=op: op(s) for s, op in zip(self.sets, turns, strict=True)]
        facts = {"refined_share": share, "wanted_shares": list(shares), "how": ops[0][0].path(self.sets[0])}
        return Way(name, calls, self.sources.shape.bytes_touched(self.sources.case, share), facts)

    def append(self) -> Way:
        """The newest row stored again where it lies: planes must not change by it."""
        position = torch.tensor([self.sources.case.length - 1])
        rows = [(s.k[:, :, -1:].float(), s.v[:, :, -1:].float()) for s in self.sources.inputs]
        before = [[p.clone() for p in s.planes] for s in self.sets[: len(rows)]]

        def call(index: int) -> None:
            k, v = rows[index % len(rows)]
            torch.ops.lamp.append(k, v, *self.sets[index].planes, None, position, None, **STORE, site="benchmark")

        def differing() -> dict[str, Any]:
            pairs = [
                (a, b) for s, old in zip(self.sets, before, strict=False) for a, b in zip(s.planes, old, strict=True)
            ]
            return {"values_changed": sum(int((a != b).sum()) for a, b in pairs)}

        case, shape = self.sources.case, self.sources.shape
        touched = case.batch * shape.kv_heads * (shape.dim * (4 * 2 + 2) + 8)
        calls = [lambda i=i: call(i) for i in range(len(self.sets))]
        return Way("lamp append", calls, touched, {"how": "one row of keys and one of values"}, differing)


def _as_stored(plane: Tensor, dim: int) -> Tensor:
    """In the order of bytes that a cache on this machine has."""
    lanes = kernels.cpu.by_lanes() and layout.lanes_fit(layout.SUBTILE, dim // 2, dim // 2)
    return layout.as_lanes(plane) if plane.dim() == 5 and lanes else plane


def measure(
    ways: Sequence[Way], wanted: Sequence[dict[int, Tensor]], rounds: int, seconds: float
) -> list[dict[str, Any]]:
    """Rows: in every round each way calls for about ``seconds`` (once at least), and every output is checked. The order
    is another one in every round, so that none always follows the same. ``wanted``: of each source, the exact outputs
    of some sequences."""
    bursts = [_Burst(way, wanted, seconds) for way in ways]
    for turn in range(rounds):
        for burst in random.Random(turn).sample(bursts, len(bursts)):
            burst.run()
    return [burst.row() for burst in bursts]


class _Burst:
    """A way on its turn."""

    def __init__(self, way: Way, wanted: Sequence[dict[int, Tensor]], seconds: float) -> None:
        self.way, self.wanted, self.next = way, wanted, 0
        self.times: list[float] = []
        self.errors: list[float] = []
        self.count, self.failed = 1, ""
        try:
            self.count = max(1, int(seconds * 1e3 / _quick(way.calls)))
        except Exception as problem:  # noqa: BLE001  (one way that fails must not cost the others)
            self.failed = f"{type(problem).__name__}: {str(problem)[:400]}"

    def run(self) -> None:
        """Untimed once, so that threads are awake, then timed; then hold every output against what is known."""
        if self.failed:
            return
        try:
            self._run()
        except Exception as problem:  # noqa: BLE001
            self.failed = f"{type(problem).__name__}: {str(problem)[:400]}"

    def _run(self) -> None:
        calls, total = self.way.calls, len(self.way.calls)
        calls[self.next]()
        turns = [(self.next + 1 + step) % total for step in range(self.count)]
        began = time.perf_counter()
        outs = [calls[index]() for index in turns]
        self.times.append((time.perf_counter() - began) * 1e3 / len(turns))
        self.next = turns[-1]
        for index, out in zip(turns, outs, strict=True):
            if out is not None:
                self.errors.append(error(out, self.wanted[index % len(self.wanted)]))

    def row(self) -> dict[str, Any]:
        """What was measured."""
        if self.failed or not self.times:
            return {"name": self.way.name, "failed": self.failed or "no round ran"}
        ms = statistics.median(self.times)
        made = {"name": self.way.name, "ms": ms, "ms_least": min(self.times), "rounds_ms": self.times}
        made |= {"calls": self.count * len(self.times), "sets": len(self.way.calls), "bytes": self.way.touched}
        made |= {"error": None, "error_largest": None, "refined_share": None, **self.way.facts, **self.way.finish()}
        if self.errors:
            made |= {"error": statistics.median(self.errors), "error_largest": max(self.errors)}
            if not max(self.errors) < 0.5:
                return {**made, "failed": f"wrong output: error {max(self.errors):.2g}"}
        return made
