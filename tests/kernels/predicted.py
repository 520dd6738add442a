"""Calls of ``lamp::fused_predicted``: a gate of random weights over a call of ``calls.make``, by kernels and by the
reference."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lamp_compile.runtime import kernels, layout
from lamp_compile.runtime.kernels import cpu
from lamp_compile.runtime.network import audit, gate
from lamp_compile.runtime.network import ops as _ops  # noqa: F401  (registers the operators)
from tests.kernels import calls
from tests.kernels.calls import Call, Native

SCORES = ("causal", "window", "scale", "softcap", "keys", "rotation", "query_bits", "subtile", "site")


@dataclass(frozen=True)
class Step:
    """Arguments of one step."""

    call: Call
    kept: tuple[Tensor, Tensor, Tensor]
    """Summaries, history, trust."""
    weights: tuple[Tensor, ...]
    """query, query_bias, age, extra, limit, margin."""
    options: dict[str, Any]

    @property
    def seen(self) -> tuple[Tensor | None, ...]:
        """balance, mask, bias, sinks, start, lengths, block table."""
        return (self.call.balance, *self.call.seen)

    def after(self, end: After) -> Step:
        """The same step once more, with what this one left."""
        call = replace(self.call, hot=(*self.call.hot[:3], end.state, end.stats))
        return replace(self, call=call, kept=(self.kept[0], end.history, end.trust))


@dataclass(frozen=True)
class After:
    """What a step leaves."""

    out: Tensor
    state: Tensor
    stats: Tensor
    history: Tensor
    trust: Tensor

    def same(self, other: After) -> bool:
        """Whether all bits are."""
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return all(torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) for a, b in pairs)


def make(
    seed: int = 0, *, rank: int = 16, group: int = 8, skip: float = 0.0, trained: int = 1 << 20, share: float = 0.3,
    limit: float = 8.0, margin: float = 1.0, steps: float = 3.0, half: bool = True, level: float = 0.0, **given: Any,
) -> Step:  # fmt: skip
    """``steps`` is where the audit's count stands; ``level`` is added to what the gate says. ``share`` of the sub-tiles
    is refined by the gate's word, as in ``calls.make``."""
    call = calls.make(seed, **{"tau": 0.01, **given})
    (batch, heads, _, dim), (stored, kv_heads, pages) = call.q.shape, call.planes[0].shape[:3]
    tile = layout.tile_of(call.planes[0])
    table = call.seen[5]
    room = (pages if table is None else table.shape[1]) * tile
    weights = {name: torch.randn(shape) for name, shape in gate.shapes(heads, kv_heads, dim, rank, 0).items()}
    weights["query"] = weights["query"] * 0.3
    weights["extra"] = weights["extra"] * 0.3
    weights["extra"][..., gate.OFFSET] = level
    summary = torch.randn(stored, kv_heads, pages * tile // group, rank).half()
    history = torch.rand(batch, kv_heads, room // call.options["subtile"], 2).square()
    trust = audit.new(batch, kv_heads)
    trust[..., audit.STEPS] = steps
    options = {**call.options, "trained": trained, "skip": skip, "room": room, "pages": pages}
    step = Step(
        call, (summary, history, trust),
        (
            weights["query"].half() if half else weights["query"], weights["query_bias"], weights["age"][0],
            weights["extra"][0], torch.full((kv_heads,), limit), torch.full((kv_heads,), margin),
        ),
        options,
    )  # fmt: skip
    if "tau" in given:
        return step
    tau = calls.between(predicted(step), share)
    return replace(step, call=replace(call, hot=(tau, *call.hot[1:])))


def layouts(step: Step, native: Native) -> list[Step]:
    """The step over planes of either layout, as ``calls.layouts``."""
    return [replace(step, call=call) for call in calls.layouts(step.call, native)]


def predicted(step: Step) -> Tensor:
    """The reference's prediction ``[B, G, 1, T]``."""
    how = {name: step.options[name] for name in (*SCORES, "room", "pages")}
    found: Tensor = torch.ops.lamp.predict(
        step.call.q, step.kept[0], step.kept[1], *step.weights[:4], None, *step.seen, **how
    )
    return found


def by_reference(step: Step) -> After:
    """The operators of the reference, one after the other."""
    how = {name: x for name, x in step.options.items() if name not in ("room", "pages")}
    call = step.call
    out, *new = torch.ops.lamp.attention.predicted(
        call.q, *call.planes, *call.hot, *step.seen, predicted(step), *step.kept[1:], *step.weights[4:], **how
    )
    return After(out, *new)


def by_kernel(step: Step, native: Native) -> After:
    """The kernel; what it writes are copies."""
    assert cpu.instruction_set() == native.name
    hot = (*step.call.hot[:3], *(x.clone() for x in step.call.hot[3:]))
    kept = (step.kept[0], *(x.clone() for x in step.kept[1:]))
    q, planes = step.call.q, step.call.planes
    assert kernels.why_not_attend(q, planes, hot[3], step.options) is None
    assert kernels.why_not_predicted(q, planes, kept, step.options) is None
    out = kernels.attend_predicted(q, planes, hot, step.seen, kept, step.weights, step.options)
    return After(out, *hot[3:], *kept[1:])
