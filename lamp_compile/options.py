"""What a user may ask of the graph compiler, checked at once: unknown names and impossible values are refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lamp_compile import backends
from lamp_compile.errors import OptionError
from lamp_compile.plan import GUARD_OPTIONS, PRESETS, SITE_OPTIONS, Plan, template

INDUCTOR = "inductor."
JOIN = ("auto", "never", "always")
OWN = ("preset", "fuel", "lower", "mode", "join_linears")


@dataclass(frozen=True)
class Options:
    """Checked options.

    Attributes:
        preset: Starting point of the plan (``plan.PRESETS``).
        plan: A plan to obey instead.
        fuel: Rewrite only the first so many sites.
        lower: Backend that runs the rewritten graph.
        overrides: Fields of every row of the plan.
        inductor: Settings handed to Inductor.
        mode: ``torch.compile`` mode.
        join_linears: Whether linear layers of one input become one product ("auto": on CUDA and ROCm devices, where
            the graph is compiled).
        dry: Only count them, and move no weights.
    """

    preset: str = "balanced"
    plan: Plan | None = None
    fuel: int | None = None
    lower: str = "inductor"
    overrides: Mapping[str, Any] = field(default_factory=dict)
    inductor: Mapping[str, Any] = field(default_factory=dict)
    mode: str | None = None
    join_linears: str = "auto"
    dry: bool = False

    @staticmethod
    def parse(given: Mapping[str, Any]) -> Options:
        """Check ``preset``, ``plan`` (a Plan or a path), ``fuel``, ``lower``, ``mode``, ``join_linears``, any field of
        a plan's row, ``guard_<field>`` and ``inductor.<key>``.

        Raises:
            OptionError: Unknown name or impossible value.
            PlanError: The plan cannot be read, or a row's field is impossible.
        """
        values = dict(given)
        own = {name: values.pop(name) for name in OWN if name in values}
        plan = _plan(values.pop("plan", None))
        inductor = {name.removeprefix(INDUCTOR): values.pop(name) for name in list(values) if name.startswith(INDUCTOR)}
        known = ("plan", *OWN, *SITE_OPTIONS, *(f"guard_{name}" for name in GUARD_OPTIONS))
        for name in values:
            if name not in known:
                raise OptionError(
                    f"unknown option {name!r}", where="options", fix=f"one of {', '.join(known)}, inductor.<key>"
                )
        if plan is not None and (values or "preset" in own):
            name = next(iter(values), "preset")
            raise OptionError(f"{name!r} beside a plan", where="options", fix="edit the plan's rows instead")
        if plan is not None and any(row.apply for row in plan.linears):
            raise OptionError(
                "the plan replaces linear layers, which a graph does not",
                where="plan",
                fix="lamp_compile.compile(model, plan=...) of a transformers decoder, or a plan without linears",
            )
        _refuse_supervision(plan)
        for name in ("tau", "floor"):
            if isinstance(values.get(name), list):
                values[name] = tuple(values[name])
        options = Options(plan=plan, overrides=values, inductor=inductor, **own)
        options._check()
        return options

    def _check(self) -> None:
        if self.preset not in PRESETS:
            raise OptionError(f"unknown preset {self.preset!r}", where="preset", fix=f"one of {', '.join(PRESETS)}")
        if self.fuel is not None and (isinstance(self.fuel, bool) or not isinstance(self.fuel, int) or self.fuel < 0):
            raise OptionError(f"fuel is {self.fuel!r}", where="fuel", fix="how many sites to rewrite: 0, 1, 2, ...")
        check_join(self.join_linears)
        _refuse_supervision(Plan((template(self.preset, **self.overrides),)))
        backends.get(self.lower)
        if self.lower == "inductor":
            from lamp_compile.backends.inductor import check, mode_options

            mode_options(self.mode)
            check(self.inductor)
        elif self.inductor:
            raise OptionError(
                f"inductor.{next(iter(self.inductor))} with lower={self.lower!r}",
                where="options",
                fix="lower='inductor'",
            )


def check_join(asked: object) -> str:
    """A value of ``join_linears``.

    Raises:
        OptionError: It is none.
    """
    if asked not in JOIN:
        raise OptionError(f"join_linears is {asked!r}", where="join_linears", fix=f"one of {', '.join(JOIN)}")
    return str(asked)


def _plan(given: object) -> Plan | None:
    if given is None:
        return None
    if isinstance(given, Plan):
        return given.validate()
    if isinstance(given, str | Path):
        return Plan.load(given)
    raise OptionError(f"plan is a {type(given).__name__}", where="plan", fix="a Plan or the path of a plan file")


def _refuse_supervision(plan: Plan | None) -> None:
    """What goes on around steps of a model is not a graph's to do."""
    if plan is None:
        return
    asked = {
        "a controller": plan.control is not None,
        "shadow steps": plan.shadow > 0,
        "guard.retry": any(row.apply and row.guard.retry for row in plan.sites),
        "exact_tier 'host'": any(row.apply and row.exact_tier != "none" for row in plan.sites),
    }
    for name, given in asked.items():
        if given:
            raise OptionError(
                f"the plan asks for {name}, which a graph cannot do",
                where="plan",
                fix="lamp_compile.compile(model, ...) of a transformers decoder, or a plan without it",
            )
