"""Rows of a plan for linear layers: which keep their weights, which are read in INT8, and why."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from lamp_compile.errors import PlanError

FORMATS = ("int8", "int8_dynamic")
"""``int8`` rounds weights only. ``int8_dynamic`` rounds each row of activations too, for integer products."""
GROUP = 32
"""Inputs that share a scale by default."""
LARGEST_GROUP = 2**20


@dataclass(frozen=True)
class LinearPlan:
    """Decision for one linear layer, by its module path. Everything is compiled in."""

    name: str
    apply: bool = True
    """False keeps the original weights."""
    reason: str = ""
    """Why it is kept, or what was measured when it was chosen."""
    format: str = "int8"
    group: int = GROUP
    """Inputs of one output channel that share a scale; 0 = all of them (what ``int8_dynamic`` needs)."""
    speedup: float | None = None
    """Time of the original over that of INT8 at one row, where it was measured."""
    error: float | None = None
    """Relative error of this layer's outputs by its own rounding, where it was measured."""
    kl: float | None = None
    """Mean KL (nats) of the model's predictions with this layer alone in INT8, where it was measured."""

    def validate(self, where: str = "") -> None:
        """Check every field.

        Raises:
            PlanError: Naming the field, its value and what it may be.
        """
        where = where or f"plan, linear {self.name!r}"
        for name, wanted in (("name", str), ("apply", bool), ("reason", str)):
            if not isinstance(getattr(self, name), wanted):
                raise PlanError(f"{name} is {getattr(self, name)!r}", where=where, fix=f"a {wanted.__name__}")
        if not self.name:
            raise PlanError("a linear needs a name", where=where, fix="the module path that `explain` prints")
        if self.format not in FORMATS:
            raise PlanError(f"format is {self.format!r}", where=where, fix=f"one of {', '.join(FORMATS)}")
        if isinstance(self.group, bool) or not isinstance(self.group, int) or not 0 <= self.group <= LARGEST_GROUP:
            raise PlanError(f"group is {self.group!r}", where=where, fix="a divisor of the inputs, or 0 for all")
        if self.format == "int8_dynamic" and self.group:
            raise PlanError(f"group is {self.group} with int8_dynamic", where=where, fix="group 0: one scale a channel")
        for name in ("speedup", "error", "kl"):
            value = getattr(self, name)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if value is not None and not (number and math.isfinite(value)):
                raise PlanError(f"{name} is {value!r}", where=where, fix="a finite number, or null")

    def text(self) -> str:
        """One line for a report: what is done, and why."""
        if not self.apply:
            return f"kept: {self.reason or 'the plan says apply: false'}"
        scales = f"groups of {self.group}" if self.group else "one scale a channel"
        return f"{self.format}, {scales}" + (f"; {self.reason}" if self.reason else "")


def read(rows: object, where: str) -> tuple[LinearPlan, ...]:
    """The rows of a plan's JSON.

    Raises:
        PlanError: No list of objects, an unknown field, no name.
    """
    if not isinstance(rows, list):
        raise PlanError("`linears` must be a list", where=where, fix="see docs/plan.md, or leave it out")
    return tuple(_row(row, f"{where}, linear {index}") for index, row in enumerate(rows))


def validate(rows: Sequence[LinearPlan]) -> None:
    """Check every row, and that no layer has two.

    Raises:
        PlanError: A row is malformed or a name occurs twice.
    """
    names: set[str] = set()
    for row in rows:
        row.validate()
        if row.name in names:
            raise PlanError(f"linear {row.name!r} occurs twice", where="plan", fix="keep one of the rows")
        names.add(row.name)


def summary(rows: Sequence[LinearPlan]) -> list[str]:
    """Lines of a report: how many layers are in INT8, and each with its reason."""
    if not rows:
        return []
    done = sum(row.apply for row in rows)
    return [f"{done} of {len(rows)} linear layers in INT8", *(f"  {row.name}  {row.text()}" for row in rows)]


def _row(row: Any, where: str) -> LinearPlan:
    if not isinstance(row, dict):
        raise PlanError(f"expected an object, got {type(row).__name__}", where=where, fix="see docs/plan.md")
    known = {f.name for f in fields(LinearPlan)}
    if unknown := sorted(set(row) - known):
        raise PlanError(f"unknown field {unknown[0]!r}", where=where, fix=f"one of {', '.join(sorted(known))}")
    if not isinstance(row.get("name"), str):
        raise PlanError("a linear needs a name", where=where, fix="the module path that `lamp-compile explain` prints")
    return LinearPlan(**row)
