"""What Triton's kernels make of a predicted step, and what the reference decides in one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tests.kernels import calls, predicted
from tests.kernels.predicted import Step

AGE, EXTRA, LIMIT = 2, 3, 4
"""Of a step's weights."""


@dataclass(frozen=True)
class Outcome(predicted.After):
    """What a step leaves, with the log-sum-exp and certificate that its guard has seen."""

    lse: Tensor
    certificate: Tensor


def make(seed: int = 0, *, trust: dict[int, Any] | None = None, **given: Any) -> Step:
    """``given`` as of ``predicted.make``; ``trust``: fields that are not as of a fresh head at its fifth step."""
    step = predicted.make(seed, **{"steps": 5.0, "margin": 2.0, **given})
    for field, value in (trust or {}).items():
        step.kept[2][..., field] = torch.as_tensor(value, dtype=torch.float32)
    return step


def levels_of(step: Step) -> Tensor:
    """The reference's precision of each sub-tile ``[B, G, 1, T]``."""
    call, options = step.call, step.options
    how = {name: options[name] for name in ("keys", "trained", "skip", "subtile", "site")}
    importance, below = torch.ops.lamp.arbitrate(
        calls.importance_of(call), predicted.predicted(step), step.kept[2], call.hot[3], step.weights[5], call.seen[4],
        **how,
    )  # fmt: skip
    below = below if options["skip"] > 0 else None
    made = torch.ops.lamp.select(importance, call.hot[0], call.hot[1], call.hot[3], below, exact=False, site="")
    assert isinstance(made, Tensor)
    return made


def by_kernels(step: Step, device: torch.device) -> Outcome:
    """What Triton's kernels leave, on the CPU."""
    from lamp_compile.runtime.kernels.decode_predicted import Gate, decode_predicted

    q, planes, hot, balance, seen, _ = step.call.arguments(device)
    kept = [x.to(device, copy=True) for x in step.kept]
    gate = Gate(*kept, *(x.to(device) for x in step.weights))
    result = decode_predicted(q, planes, hot, balance, seen, gate, step.options)
    left = (result.out, *hot[3:], *kept[1:], result.lse, result.certificate)
    return Outcome(*(x.cpu() for x in left))


def with_planes(step: Step, planes: tuple[Tensor, ...]) -> Step:
    """The same step over other planes."""
    return replace(step, call=replace(step.call, planes=planes))
