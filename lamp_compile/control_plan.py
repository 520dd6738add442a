"""What the precision controller is to hold: the part of a plan that acts while the model runs. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from lamp_compile.errors import OptionError, PlanError
from lamp_compile.plan_fields import number, read_row

LIMITS = ("quality", "error_budget")
"""Targets that limit the error. At most one of them."""
GOALS = ("speed", "refined")
"""Targets that say how cheap a step should be. At most one of them; an error limit beside it has the last word."""


RELATION = (0.0099, 0.036, 0.65)
"""Default (base, start, slope) of disagreement = base + slope * max(0, error - start), where error is the certificate's
estimate: at or above what was measured on two trained models (``benchmarks/control_relation.py``)."""


@dataclass(frozen=True)
class ControlPlan:
    """Targets and limits of the precision controller (``runtime/controller.py``)."""

    quality: float | None = None
    """Share of next tokens that should agree with the original model, between 0 and 1; by ``relation`` it becomes an
    error budget."""
    error_budget: float | None = None
    """Relative error of an attention's output that the certificate may report, root mean square of each layer."""
    speed: float | None = None
    """Decode steps per second to reach."""
    refined: float | None = None
    """Share of sub-tiles to refine, over all layers."""
    tau_least: float = 1e-4
    """``tau`` never goes below this."""
    tau_most: float = 0.25
    """``tau`` never goes above this."""
    interval: float = 0.2
    """Seconds between readings, at least: the thread waits longer where reading takes long."""
    relation: tuple[float, float, float] | None = None
    """(base, start, slope) of disagreement = base + slope * max(0, error - start), measured on this model; None takes
    ``RELATION``, and reports say "uncalibrated"."""

    @property
    def error_limit(self) -> float | None:
        """The estimated relative error that no layer should exceed, or None without such a target."""
        if self.quality is None:
            return self.error_budget
        base, start, slope = self.relation or RELATION
        return start + (1.0 - self.quality - base) / slope

    def validate(self, where: str = "plan, control") -> None:
        """Check every field, and that the targets do not contradict each other.

        Raises:
            PlanError: Naming the field, its value and what it may be.
        """
        for name in ("quality", "refined"):
            if getattr(self, name) is not None:
                number(getattr(self, name), name, where, above=0.0, most=1.0)
        for name in ("error_budget", "speed"):
            if getattr(self, name) is not None:
                number(getattr(self, name), name, where, above=0.0)
        for name in ("tau_least", "tau_most", "interval"):
            number(getattr(self, name), name, where, above=0.0)
        if self.tau_least >= self.tau_most:
            raise PlanError(
                f"tau_least {self.tau_least} is not below tau_most {self.tau_most}", where=where, fix="leave both out"
            )
        if self.relation is not None:
            if not isinstance(self.relation, tuple) or len(self.relation) != 3:
                raise PlanError(f"relation is {self.relation!r}", where=where, fix="three numbers, or null")
            for value in self.relation[:2]:
                number(value, "relation", where, least=0.0)
            number(self.relation[2], "relation", where, above=0.0)
        self._check_targets(where)
        if self.quality is not None and 1.0 - self.quality <= (self.relation or RELATION)[0]:
            raise PlanError(
                f"quality {self.quality:g} is beyond what both planes everywhere are known to give "
                f"({1.0 - (self.relation or RELATION)[0]:g})",
                where=where,
                fix="a lower one; a relation measured on this model; or apply: false for its most sensitive layers",
            )

    def _check_targets(self, where: str) -> None:
        given = [name for name in (*LIMITS, *GOALS) if getattr(self, name) is not None]
        for group in (LIMITS, GOALS):
            both = [name for name in group if name in given]
            if len(both) > 1:
                raise PlanError(
                    f"{both[0]} and {both[1]} contradict each other: both set the same thing", where=where, fix="one"
                )
        if not given:
            raise PlanError(
                "nothing to hold", where=where, fix="quality=0.99, error_budget=0.05, speed=30 or refined=0.1"
            )

    @staticmethod
    def of(options: Mapping[str, Any], where: str = "control") -> ControlPlan:
        """From options by name, checked.

        Raises:
            OptionError: An unknown name; ``memory``, which no running model can change.
            PlanError: An impossible value.
        """
        known = [f.name for f in fields(ControlPlan)]
        for name in options:
            if name == "memory":
                raise OptionError(
                    "memory cannot be held while the model runs: planes take what their formats and their capacity "
                    "say, and tau moves no byte of them",
                    where=where,
                    fix="tokens = fast.lamp.tokens_for(memory), then fast.lamp.cache(tokens) or slots(tokens=tokens)",
                )
            if name not in known:
                raise OptionError(f"unknown option {name!r}", where=where, fix=f"one of {', '.join(known)}")
        values = dict(options)
        if isinstance(values.get("relation"), list):
            values["relation"] = tuple(values["relation"])
        made = ControlPlan(**values)
        made.validate(where)
        return made


def parse(given: Any, where: str = "control") -> ControlPlan | None:
    """What ``compile(control=...)`` takes: None, a ControlPlan, or a mapping of its fields.

    Raises:
        OptionError, PlanError: See ``ControlPlan.of``; or it is something else.
    """
    if given is None:
        return None
    if isinstance(given, ControlPlan):
        given.validate(where)
        return given
    if isinstance(given, Mapping):
        return ControlPlan.of(given, where)
    raise OptionError(f"control is a {type(given).__name__}", where=where, fix='{"quality": 0.99}, or a ControlPlan')


def read(data: object, where: str) -> ControlPlan | None:
    """From a plan's JSON.

    Raises:
        PlanError: Unknown or impossible fields.
    """
    if data is None:
        return None
    values = read_row(ControlPlan, data, f"{where}, control")
    if isinstance(values.get("relation"), list):
        values["relation"] = tuple(values["relation"])
    made = ControlPlan(**values)
    made.validate(f"{where}, control")
    return made
