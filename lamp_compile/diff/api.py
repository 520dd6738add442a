"""``lamp_compile.snapshot`` and ``lamp_compile.compare``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lamp_compile.diff import rules as rules_
from lamp_compile.diff.compare import TIERS, Comparison, compare_snapshots
from lamp_compile.diff.inputs import snapshot
from lamp_compile.diff.snapshot import Snapshot
from lamp_compile.errors import InputError, OptionError

TOLERANCE = 1e-5
"""Largest difference of an output over its largest value, unless something else is said."""
__all__ = ["TOLERANCE", "compare", "snapshot"]


def compare(
    a: Any,
    b: Any,
    *,
    allow: Sequence[str] = (),
    weights: bool = False,
    numerics: bool = False,
    seed: int = 0,
    tolerance: float = TOLERANCE,
    sizes: dict[str, int] | None = None,
) -> Comparison:
    """What changed from ``a`` to ``b``: interface, structure, attributes, types, weights, precision plan, numbers.

    Args:
        a: Anything that ``lamp_compile.snapshot`` takes.
        b: The same. Graphs of different kinds are compared by their precision plans (and numbers) only.
        allow: Rules for expected changes, ``TIER[@WHERE][#SUBJECT]`` with shell patterns, such as
            ``"precision@layers.3*#tau"``.
        weights: Compare the values of parameters too.
        numerics: Run both on the same random inputs and compare outputs.
        seed: Of those inputs.
        tolerance: Largest difference of an output, over its largest absolute value.
        sizes: Symbolic sizes of those inputs, such as ``{"d1": 64}``.

    Raises:
        InputError: A side cannot be read or run, the two have nothing in common to compare, or a rule matched nothing.
        OptionError: A rule is malformed, or an option makes no sense.
        PlanError: A plan is malformed.
    """
    parsed = [rules_.parse(text) for text in allow]
    if not 0 <= tolerance < float("inf"):
        raise OptionError(f"tolerance is {tolerance!r}", where="tolerance", fix="a number, 0 or more")
    if sizes and not numerics:
        raise OptionError("sizes are for numerics", where="sizes", fix="numerics=True")
    names = (_name(a, "A"), _name(b, "B"))
    first, second = snapshot(a, weights=weights), snapshot(b, weights=weights)
    _check_comparable(first, second, names, numerics)
    for side, name in ((first, names[0]), (second, names[1])):
        if weights and any(" = " not in value for value in side.params.values()):
            raise InputError(
                "this snapshot holds no values of parameters", where=name, fix="write it again with --weights"
            )
    found = compare_snapshots(first, second, names)
    if numerics:
        from lamp_compile.diff import numbers

        changes, notes = numbers.compare((a, first), (b, second), seed, tolerance, sizes or {})
        found = replace(found, changes=(*found.changes, *changes), notes=(*found.notes, *notes))
    looked = {"weights": weights and not found.only, "numerics": numerics, "precision": True}
    compared = tuple(tier for tier in TIERS if looked.get(tier, not found.only))
    return rules_.apply(replace(found, compared=compared), parsed)


def _check_comparable(a: Snapshot, b: Snapshot, names: tuple[str, str], numerics: bool) -> None:
    """Nothing compared is not the same as no difference."""
    if a.kind == b.kind or numerics or (a.sites and b.sites):
        return
    without = " and ".join(name for name, side in zip(names, (a, b), strict=True) if not side.sites)
    raise InputError(
        f"nothing can be compared: one is {a.kind}, the other {b.kind}, and there is no precision plan in {without}",
        where=f"{names[0]}, {names[1]}", fix="two of one kind, two with a precision plan, or --numerics",
    )  # fmt: skip


def _name(thing: Any, default: str) -> str:
    return str(thing) if isinstance(thing, str | Path) else default
