"""The precision controller of a session: the same pure function as beside a torch model, called between steps.

No thread: a session belongs to one. A round reads the guards' small tensors, and comes when twice the guard's window of
steps has passed, since its running mean follows no faster.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lamp_compile.control_plan import ControlPlan
from lamp_compile.errors import OptionError
from lamp_compile.runtime import controller
from lamp_compile.runtime.controller import SiteSample, Statistics

if TYPE_CHECKING:
    from lamp_compile.runtime.ort.session import OrtSession

WINDOWS = 2
NAMES = ("steps", "live", "refined", "raised", "bad")


class SessionControl:
    """Adjusts tau of every site while the session steps; ``with session.control(error_budget=0.05): ...``.

    Leaving the block puts tau back to what it was; ``stop()`` leaves it where it is.

    Args:
        session: Whose steps and settings.
        target: What to hold.

    Raises:
        OptionError: The artifact has no planes, tau starts outside the target's limits, or the guard would act before
            the error limit is reached.
    """

    def __init__(self, session: OrtSession, target: ControlPlan) -> None:
        self.target, self._session = target, session
        self._sites = [site.name for site in session.artifact.planes]
        if not self._sites:
            raise OptionError("no site has planes to choose from", where="control", fix="a decoder's artifact")
        controller.check_guard(target, [float(session.controls[name].budget.min()) for name in self._sites])
        self._start = {name: session.controls[name].tau.copy() for name in self._sites}
        self.state = controller.initial(target, [_middle(self._start[name]) for name in self._sites])
        self._windows = {site.name: site.window for site in session.artifact.planes}
        self._pause = WINDOWS * max(self._windows.values())
        self._before: dict[str, dict[str, NDArray[Any]]] = {}
        self._steps, self._began = 0, time.perf_counter()
        self.running = True

    def stop(self, *, restore: bool = False) -> None:
        """End it.

        Args:
            restore: Put tau back to what it was before.
        """
        self.running = False
        if restore:
            for name, tau in self._start.items():
                self._session.controls.set(tau=tau.tolist(), sites=name)

    def __enter__(self) -> SessionControl:
        return self

    def __exit__(self, *error: object) -> None:
        self.stop(restore=True)

    def status(self) -> dict[str, Any]:
        """JSON-ready: target, whether calibrated, and by site tau and how it stands."""
        status = "running" if self.running else "stopped"
        return {"status": status, **controller.described(self.state, self._sites)}

    def stepped(self) -> None:
        """For the session: a step is done."""
        if not self.running:
            return
        self._steps += 1
        if self._steps >= self._pause:
            seconds = (time.perf_counter() - self._began) / self._steps
            self._round(seconds)
            self._steps, self._began = 0, time.perf_counter()

    def _round(self, seconds: float) -> None:
        found = self._session.statistics()
        samples = tuple(self._sample(name, vars(found[name])) for name in self._sites)
        self.state = controller.step(self.state, Statistics(samples, seconds))
        least, most = self.target.tau_least, self.target.tau_most
        for name, site in zip(self._sites, self.state.sites, strict=True):
            tau = np.clip(self._start[name] * (site.tau / site.start), least, most)
            self._session.controls.set(tau=tau.tolist(), sites=name)

    def _sample(self, name: str, now: Mapping[str, NDArray[Any]]) -> SiteSample:
        """What one site did since the last round, over all sequences that went on."""
        before, self._before[name] = self._before.get(name), {field: now[field].copy() for field in NAMES}
        delta = {}
        for field in NAMES:
            same = before is not None and before[field].shape == now[field].shape
            delta[field] = now[field] - before[field] if same and before is not None else now[field]
        back = np.any([value < 0 for value in delta.values()], axis=0)  # sequences that began anew
        delta = {field: np.where(back, now[field], value) for field, value in delta.items()}
        moved = delta["steps"] > 0
        # A running mean that began at 0 has seen 1 - (1 - 1 / window)^steps of its weight.
        seen = 1.0 - (1.0 - 1.0 / self._windows[name]) ** now["steps"].astype(np.float64)
        square = now["error"].astype(np.float64) ** 2 / np.maximum(seen, 1e-9)
        return SiteSample(
            steps=int(delta["steps"].sum()),
            error=float(np.sqrt(square[moved].mean())) if moved.any() else 0.0,
            live=int(delta["live"].sum()),
            refined=int(delta["refined"].sum()),
            raised=int(delta["raised"].sum()),
            bad=int(delta["bad"].sum()),
            held=bool((now["floor"][moved] > 0).any()),
        )


def _middle(tau: NDArray[np.float32]) -> float:
    """Geometric mean; 0 where a head has 0."""
    return math.exp(float(np.log(tau.astype(np.float64)).mean())) if tau.min() > 0 else 0.0
