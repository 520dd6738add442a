"""What a compiled model did so far, in numbers: counters by site and reason, shadow steps, the controller."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from lamp_compile.runtime import guard, prompt
from lamp_compile.runtime.controls import Controls
from lamp_compile.runtime.ledger import Ledger, counted


@dataclass(frozen=True)
class SiteStatistics:
    """One site, over all caches that the model had. Counts are summed over sequences and kv heads."""

    site: str
    steps: int
    refined_share: float
    """Of the live sub-tiles."""
    exact_share: float
    """Of the live sub-tiles: read at level 2."""
    over_budget: int
    """Floors raised by one because the running mean of the estimated error was over the guard's budget."""
    lowered: int
    """Floors lowered by one by hysteresis, after their hold."""
    nonfinite: int
    """Steps with a non-finite output: each sets the floor to 2."""
    by_user: int
    """Calls of ``controls.set``."""
    by_controller: int
    """Settings changed by the precision controller."""
    tau: tuple[float, ...]
    """Now, per kv head."""
    floor: tuple[int, ...]
    """Now, per kv head: the highest among the caches alive and the setting."""
    error: float
    """Estimated relative error of the output now: root mean square over the caches alive."""


@dataclass(frozen=True)
class RunStatistics:
    """All of it; ``fast.lamp.statistics()``."""

    sites: tuple[SiteStatistics, ...]
    events: dict[str, int]
    """Steps retried, exact copies fetched, ..."""
    shadow: dict[str, Any] | None
    """``ShadowTally.to_dict()``; None without shadow steps."""
    control: dict[str, Any] | None
    """``Control.status()``; None without a controller."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)

    def notes(self) -> tuple[str, ...]:
        """What a report should say: nothing where nothing happened."""
        found = []
        for name, words in (
            ("over_budget", "floors raised: estimated error over budget"),
            ("nonfinite", "steps with a non-finite output (floor 2 at once)"),
            ("lowered", "floors lowered by hysteresis"),
            ("by_user", "settings changed by the user"),
            ("by_controller", "settings changed by the controller"),
        ):
            count = sum(getattr(site, name) for site in self.sites)
            if count:
                found.append(f"guard: {count} {words}")
        about = {what: "" if what.startswith(prompt.SLOWLY) else "guard: " for what in self.events}
        found += [f"{about[what]}{count} {what}" for what, count in self.events.items() if count]
        return (*found, *self._shadow_notes(), *self._control_notes())

    def _shadow_notes(self) -> list[str]:
        if not self.shadow or not self.shadow["steps"]:
            return []
        sites = self.shadow["sites"]
        worst = max(sites, key=lambda name: sites[name]["error"], default="")
        lines = []
        if self.shadow["positions"]:
            kl = self.shadow["kl"]
            lines.append(
                f"shadow: {self.shadow['steps']} steps, next token agrees in {self.shadow['agreement']:.2%} of "
                f"{self.shadow['positions']}" + (f", mean KL {kl:.2g}" if kl is not None else "")
            )
        if worst:
            lines.append(
                f"shadow: true relative error up to {sites[worst]['error']:.3g} ({worst}), against "
                f"{sites[worst]['basis']}; {sum(s['over_budget'] for s in sites.values())} rows over the guard's budget"
            )
        return lines

    def _control_notes(self) -> list[str]:
        if not self.control:
            return []
        state, verdicts = self.control, [site["verdict"] for site in self.control["sites"].values()]
        line = f"controller: {state['status']}, {state['readings']} readings; " + ", ".join(
            f"{verdicts.count(verdict)} sites {verdict}" for verdict in dict.fromkeys(verdicts)
        )
        lines = [line]
        if not state["calibrated"]:
            lines.append("controller: quality is uncalibrated on this model; shadow=0.01 measures what it gives")
        if state["deaths"] or state["lags"]:
            lines.append(
                f"controller: died {state['deaths']} times, fell behind {state['lags']} times; {state['error']}"
            )
        return lines


def collect(ledger: Ledger, controls: Controls, shadow: Any, control: Any) -> RunStatistics:
    """Read everything. Waits for the device."""
    totals = ledger.totals()
    sites = []
    for name in controls:
        counts = totals.get(name, [0] * guard.STATS_FIELDS)
        live = counts[guard.LIVE]
        layers = [layer for cache in ledger.caches() for layer in counted(cache) if layer.name == name]
        squares = [x for layer in layers for x in _errors(layer)]
        floors = [layer.state[..., guard.FLOOR].amax(0).tolist() for layer in layers]
        floors.append(controls[name].floor.tolist())
        sites.append(
            SiteStatistics(
                site=name,
                steps=counts[guard.STEPS],
                refined_share=counts[guard.REFINED] / live if live else 0.0,
                exact_share=counts[guard.EXACT] / live if live else 0.0,
                over_budget=counts[guard.RAISED],
                lowered=counts[guard.LOWERED],
                nonfinite=counts[guard.BAD],
                by_user=controls.changes[(name, "user")],
                by_controller=controls.changes[(name, "controller")],
                tau=tuple(controls[name].tau.tolist()),
                floor=tuple(int(max(heads)) for heads in zip(*floors, strict=True)),
                error=(sum(squares) / len(squares)) ** 0.5 if squares else 0.0,
            )
        )
    return RunStatistics(
        tuple(sites),
        dict(ledger.events),
        shadow.to_dict() if shadow is not None else None,
        control.status() if control is not None else None,
    )


def _errors(layer: Any) -> list[float]:
    """Mean squared relative errors of the sequences and kv heads that took a step."""
    found: list[float] = layer.state[..., guard.ERROR][layer.stats[..., guard.STEPS] > 0].tolist()
    return found
