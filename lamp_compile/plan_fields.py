"""Checks and JSON that all rows of a plan share."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from lamp_compile.errors import PlanError

LARGEST = 2**53
"""Whole numbers beyond this are no settings, and no operator takes them."""


def read_row(kind: type[Any], data: object, where: str) -> dict[str, Any]:
    """The fields of one row that was read from JSON, unknown ones refused."""
    if not isinstance(data, dict):
        raise PlanError(f"expected an object, got {type(data).__name__}", where=where, fix="see docs/plan.md")
    known = {f.name for f in fields(kind)}
    if unknown := sorted(set(data) - known):
        raise PlanError(f"unknown field {unknown[0]!r}", where=where, fix=f"one of {', '.join(sorted(known))}")
    return dict(data)


def jsonable(value: Any) -> Any:
    """Lists for tuples, and a word for infinity."""
    if isinstance(value, Mapping):
        return {key: jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(item) for item in value]
    return "Infinity" if value == math.inf else value


def each(value: Any) -> tuple[Any, ...]:
    """All values of a field that is one number or one per kv head."""
    return value if isinstance(value, tuple) else (value,)


def choice(value: Any, allowed: tuple[Any, ...], name: str, where: str) -> None:
    """Raise PlanError unless the value is one of those allowed."""
    if isinstance(value, bool | float) or value not in allowed:
        raise PlanError(f"{name} is {value!r}", where=where, fix=f"one of {', '.join(map(str, allowed))}")


def number(
    value: Any, name: str, where: str, *, least: float | None = None, above: float | None = None,
    most: float | None = None, infinite: bool = False,
) -> None:  # fmt: skip
    """Raise PlanError unless the value is a number within its limits."""
    ok = isinstance(value, int | float) and not isinstance(value, bool)
    ok = ok and (isinstance(value, float) or abs(value) <= LARGEST) and not math.isnan(value)
    ok = ok and (infinite or math.isfinite(value))
    ok = (
        ok
        and (least is None or value >= least)
        and (above is None or value > above)
        and (most is None or value <= most)
    )
    if not ok:
        limits = [
            f">= {least}" if least is not None else "",
            f"> {above}" if above is not None else "",
            f"<= {most}" if most is not None else "",
        ]
        raise PlanError(f"{name} is {value!r}", where=where, fix=f"a number {' and '.join(filter(None, limits))}")
