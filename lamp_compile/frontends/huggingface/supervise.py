"""Steps that are more than one forward: shadow steps, which also run exactly, and steps done again at a raised floor.

Both take a step back, so that each row is in the cache once: lengths, the guard's state and statistics go to where they
were, and the next forward writes over the rows. What is generated does not depend on shadow steps in any bit.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from lamp_compile.plan import Plan
from lamp_compile.runtime.checkpoint import Checkpoint
from lamp_compile.runtime.kv_cache import NestedCache
from lamp_compile.runtime.ledger import Ledger
from lamp_compile.runtime.shadow import Measure, Schedule, ShadowTally, measuring
from lamp_compile.runtime.slot_cache import SlotView

MOST_RETRIES = 2
"""Levels there are above 0."""
RETRIED = "steps retried"
_inside: ContextVar[bool] = ContextVar("lamp_supervised", default=False)


def inside() -> bool:
    """Whether this forward belongs to a step that is supervised already."""
    return _inside.get()


class Supervisor:
    """Of one compiled model.

    Args:
        plan: Says what to shadow and what to retry.
        ledger: Where retries are counted.
    """

    def __init__(self, plan: Plan, ledger: Ledger) -> None:
        self.retries = any(row.apply and row.guard.retry for row in plan.sites)
        self.schedule = Schedule(plan.shadow)
        self.tally = ShadowTally()
        self.active = self.retries or plan.shadow > 0.0
        self.running = False
        self._ledger = ledger

    def run(
        self, step: Callable[[], Any], eager: Callable[[], Any], cache: NestedCache, warn: Callable[[str], None]
    ) -> Any:
        """One step of the model.

        Args:
            step: Runs it.
            eager: Runs it outside any graph, for the exact path.
            cache: What it adds to.
            warn: Says something once.

        Returns:
            What ``step`` returns.
        """
        if not self.active or _inside.get():
            return step()
        token, self.running = _inside.set(True), True
        try:
            exact = self._shadow(eager, cache, warn) if self.schedule.due() else None
            out = self._again(step, cache) if self.retries else step()
        finally:
            _inside.reset(token)
            self.running = False
        if exact is not None:
            self._compare(exact, out, cache)
        return out

    @torch.no_grad()
    def _shadow(self, eager: Callable[[], Any], cache: NestedCache, warn: Callable[[str], None]) -> Tensor | None:
        before, measure = Checkpoint(cache), Measure()
        try:
            with measuring(measure):
                exact = _last_logits(eager())
        finally:
            before.rollback()
        loud = measure.finish(self.tally)
        if loud:
            warn(
                f"a shadow step found a true error beyond the guard's budget in {', '.join(loud[:3])}"
                f"{f' and {len(loud) - 3} more' if len(loud) > 3 else ''}: see fast.lamp.statistics()"
            )
        return exact

    def _again(self, step: Callable[[], Any], cache: NestedCache) -> Any:
        before = Checkpoint(cache)
        out = step()
        for _ in range(MOST_RETRIES):
            if not before.rose():
                break
            before.rollback(keep_rises=True)
            self._ledger.events[RETRIED] += 1
            before = Checkpoint(cache)
            del out
            out = step()
        return out

    @torch.no_grad()
    def _compare(self, exact: Tensor, out: Any, cache: NestedCache) -> None:
        lamp = _last_logits(out)
        if lamp is None:
            return
        if isinstance(cache, SlotView):  # slots outside the step have no logits
            taken = cache.rows.positions >= 0
            exact, lamp = exact[taken], lamp[taken]
        if exact.shape[0]:
            self.tally.add_logits(exact, lamp)


def _last_logits(out: Any) -> Tensor | None:
    """Logits ``[B, V]`` of the last position; None where the model gives none."""
    logits = getattr(out, "logits", None)
    if logits is None and isinstance(out, tuple):
        logits = out[0]
    if not isinstance(logits, Tensor) or logits.dim() != 3:
        return None
    last: Tensor = logits[:, -1].detach().clone()
    return last
