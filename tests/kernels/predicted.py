"""Steps whose importance a look-ahead network predicts: inputs, what Triton's kernels make of them, what the reference
does."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lamp_compile.runtime.network import audit, gate
from lamp_compile.runtime.network import ops as _ops  # noqa: F401 (registers torch.ops.lamp)
from tests.kernels import calls

GROUP = 8
WEIGHTS = ("query", "query_bias", "age", "extra", "limit", "margin")


@dataclass(frozen=True)
class Step:
    """Arguments of one ``lamp::fused_predicted``."""

    call: calls.Call
    summary: Tensor
    history: Tensor
    trust: Tensor
    weights: dict[str, Tensor]
    options: dict[str, Any]

    @property
    def kept(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.summary, self.history, self.trust

    def how(self) -> dict[str, Any]:
        """The keyword arguments of ``lamp::predict``."""
        names = ("causal", "window", "scale", "softcap", "keys", "rotation", "query_bits", "subtile", "site", "room",
                 "pages")  # fmt: skip
        return {name: self.options[name] for name in names}

    def predicted(self) -> Tensor:
        """The reference's prediction ``[B, G, 1, T]``."""
        call, weights = self.call, [self.weights[name] for name in WEIGHTS[:4]]
        made = torch.ops.lamp.predict(
            call.q, self.summary, self.history, *weights, None, call.balance, *call.seen, **self.how()
        )
        assert isinstance(made, Tensor)
        return made


@dataclass(frozen=True)
class Outcome:
    """What a step leaves; of the reference without the log-sum-exp and certificate of a kernel's own."""

    out: Tensor
    state: Tensor
    stats: Tensor
    history: Tensor
    trust: Tensor
    lse: Tensor | None = None
    certificate: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        return {name: x for name, x in vars(self).items() if x is not None}


def random_gate(heads: int, kv_heads: int, dim: int, rank: int, scale: float) -> dict[str, Tensor]:
    """Weights that say something: content as large as ``scale``, and some of everything else."""
    made = {
        "query": torch.randn(heads, dim, rank) * scale / dim**0.5, "query_bias": torch.randn(heads, rank) * 0.1,
        "key": torch.randn(kv_heads, dim, rank) * scale / dim**0.5, "key_bias": torch.randn(kv_heads, rank) * 0.1,
        "age": torch.randn(heads, gate.AGES) * 0.3, "extra": torch.randn(heads, 4) * 0.3,
        "limit": torch.full((kv_heads,), 8.0), "margin": torch.full((kv_heads,), 2.0),
    }  # fmt: skip
    return {name: x.half().float() for name, x in made.items()}


def make(
    seed: int = 0, *, rank: int = 16, skip: float = 0.0, trained: int = 1 << 20, share: float = 0.3,
    trust: dict[int, Any] | None = None, gate_scale: float = 4.0, tau: Any = None, **given: Any,
) -> Step:  # fmt: skip
    """``given`` as of ``calls.make``; ``trust``: fields that are not as of a fresh head."""
    call = calls.make(seed, tau=1.0, **given)
    batch, heads, _, dim = call.q.shape
    table, tile = call.seen[5], call.planes[0].shape[3]
    kv_heads = call.planes[0].shape[1]
    pages = call.planes[0].shape[2]
    room = (pages if table is None else table.shape[1]) * tile
    weights = random_gate(heads, kv_heads, dim, rank, gate_scale)
    summary = torch.zeros(call.planes[0].shape[0], kv_heads, pages * tile // GROUP, rank, dtype=torch.float16)
    torch.ops.lamp.summarize(
        *call.planes[:3], summary, weights.pop("key"), weights.pop("key_bias"), torch.zeros(1, dtype=torch.int64),
        table, rows=min(room, call.keys), group=GROUP, k_format="nested8", site="",
    )  # fmt: skip
    tiles = room // call.options["subtile"]
    history = torch.rand(batch, kv_heads, tiles, 2) ** 4
    trusted = audit.new(batch, kv_heads)
    trusted[..., audit.STEPS] = 5.0
    for field, value in (trust or {}).items():
        trusted[..., field] = torch.as_tensor(value, dtype=torch.float32)
    options = {**call.options, "trained": trained, "skip": skip, "room": room, "pages": pages}
    step = Step(call, summary, history, trusted, weights, options)
    chosen = calls.between(step.predicted(), share) if tau is None else tau
    chosen = chosen if isinstance(chosen, Tensor) else torch.full((kv_heads,), float(chosen))
    call.hot[0].resize_(chosen.shape).copy_(chosen)
    return step


def levels_of(step: Step) -> Tensor:
    """The reference's precision of each sub-tile ``[B, G, 1, T]``."""
    call, options = step.call, step.options
    how = {name: options[name] for name in ("keys", "trained", "skip", "subtile", "site")}
    exact = calls.importance_of(call)
    importance, below = torch.ops.lamp.arbitrate(
        exact, step.predicted(), step.trust, call.hot[3], step.weights["margin"], call.seen[4], **how
    )
    below = below if options["skip"] > 0 else None
    made = torch.ops.lamp.select(importance, call.hot[0], call.hot[1], call.hot[3], below, exact=False, site="")
    assert isinstance(made, Tensor)
    return made


def by_reference(step: Step) -> Outcome:
    """``lamp::predict`` and ``lamp::attention.predicted``, whose kernels are the reference."""
    call, weights = step.call, [step.weights[name] for name in WEIGHTS[4:]]
    options = {name: x for name, x in step.options.items() if name not in ("room", "pages")}
    out, *new = torch.ops.lamp.attention.predicted(
        call.q, *call.planes, *call.hot, call.balance, *call.seen, step.predicted(), *step.kept[1:], *weights, **options
    )
    return Outcome(out, *new)


def by_kernels(step: Step, device: torch.device) -> Outcome:
    """What Triton's kernels leave, on the CPU."""
    from lamp_compile.runtime.kernels.decode_predicted import Gate, decode_predicted

    q, planes, hot, balance, seen, _ = step.call.arguments(device)
    kept = [x.to(device, copy=True) for x in step.kept]
    weights = [step.weights[name].to(device) for name in WEIGHTS]
    result = decode_predicted(q, planes, hot, balance, seen, Gate(*kept, *weights), step.options)
    left = (result.out, *hot[3:], *kept[1:], result.lse, result.certificate)
    return Outcome(*(x.cpu() for x in left))


def after(step: Step, outcome: Outcome) -> Step:
    """The same query once more, from what a step has left."""
    call = replace(step.call, hot=(*step.call.hot[:3], outcome.state, outcome.stats))
    return replace(step, call=call, history=outcome.history, trust=outcome.trust)
