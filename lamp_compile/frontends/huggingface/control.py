"""The precision controller of a compiled model, as its user sees it: ``with fast.lamp.control(quality=0.99): ...``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from lamp_compile.control_plan import ControlPlan
from lamp_compile.errors import OptionError
from lamp_compile.runtime import controller, formats
from lamp_compile.runtime.controller import State
from lamp_compile.runtime.controller_thread import ControllerThread, StepClock
from lamp_compile.runtime.controls import Controls, Writer
from lamp_compile.runtime.kv_cache import CacheSpec
from lamp_compile.runtime.readings import Reader

NAME = "controller"


class Control:
    """A controller of one model. It runs until ``stop()``, or to the end of its ``with`` block.

    Leaving the block puts tau back to what it was; ``stop()`` leaves it where the controller had it.

    Args:
        target: What to hold.
        controls: The model's settings.
        spec: The model's layers.
        clock: Times of decode steps.

    Raises:
        OptionError: No site can be controlled, tau starts outside the target's limits, or the guard would act before
            the error limit is reached.
    """

    def __init__(self, target: ControlPlan, controls: Controls, spec: CacheSpec, clock: StepClock) -> None:
        self.target, self._controls = target, controls
        layers = [layer for layer in spec.layers if layer is not None and _refines(layer.plan)]
        self._sites = [layer.plan.name for layer in layers]
        if not layers:
            raise OptionError(
                "no site has a residual plane to choose", where="control", fix="k_format or v_format nested8"
            )
        controller.check_guard(target, [float(controls[name].budget.min()) for name in self._sites])
        self._start = {name: controls[name].tau.tolist() for name in self._sites}
        state = controller.initial(target, [_middle(self._start[name]) for name in self._sites])
        windows = {layer.plan.name: layer.plan.guard.window for layer in layers}
        self._reader = Reader(spec.ledger, windows, clock)
        self._clock, self._writer = clock, Writer(controls)
        self.thread = ControllerThread(state, self._reader.read, self._put)

    def start(self) -> None:
        """Start it again, after ``stop()`` or a death. It goes on from what it knew.

        Raises:
            OptionError: It is running.
        """
        self.thread.start()
        self._controls.holder = NAME

    def stop(self, *, restore: bool = False) -> None:
        """End it.

        Args:
            restore: Put tau back to what it was before the controller began.
        """
        self.thread.stop()
        self._controls.holder = ""
        if restore:
            for name, tau in self._start.items():
                self._controls.set(tau=tau, sites=name, by=NAME)

    def __enter__(self) -> Control:
        return self

    def __exit__(self, *error: object) -> None:
        self.stop(restore=True)

    @property
    def running(self) -> bool:
        """Whether it is at work (a thread that died is not)."""
        return self.thread.status in ("running", "behind")

    def check(self) -> str | None:
        """For the model's side, at each step: what there is to say (see ``ControllerThread.check``)."""
        said = self.thread.check()
        if said is not None and not self.running:
            self._controls.holder = ""
        return said

    def status(self) -> dict[str, Any]:
        """JSON-ready: target, whether calibrated, and by site tau and how it stands."""
        return {
            "status": self.thread.status,
            **controller.described(self.thread.state, self._sites),
            "set_back": self._reader.set_back,
            "unread": self._reader.unread,
            "times_dropped": self._clock.dropped,
            "deaths": self.thread.deaths,
            "lags": self.thread.lags,
            "error": self.thread.error,
        }

    def _put(self, state: State) -> None:
        """Heads keep what they differ in; none leaves the target's limits."""
        least, most = self.target.tau_least, self.target.tau_most
        for name, site in zip(self._sites, state.sites, strict=True):
            factor = site.tau / site.start
            self._writer.write(name, [max(least, min(most, tau * factor)) for tau in self._start[name]])


def _refines(plan: Any) -> bool:
    return any(formats.get(name).residual_bits for name in (plan.k_format, plan.v_format))


def _middle(tau: Sequence[float]) -> float:
    """Geometric mean; 0 where a head has 0."""
    return math.exp(sum(map(math.log, tau)) / len(tau)) if min(tau) > 0 else 0.0
