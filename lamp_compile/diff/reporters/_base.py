"""What a reporter is, and words that several use."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lamp_compile.diff.compare import Change, Comparison

TITLES = {
    "interface": "interface",
    "structure": "structure",
    "attributes": "attributes",
    "types": "types",
    "weights": "weights",
    "precision": "precision plan",
    "numerics": "numbers",
}


@dataclass(frozen=True)
class Reporter:
    """A format.

    Attributes:
        name: As its file.
        render: From a comparison and the number of changes to show per tier (0 = all) to text.
    """

    name: str
    render: Callable[[Comparison, int], str]


def count(number: int, word: str = "difference") -> str:
    """``1 difference``, ``2 differences``."""
    return f"{number:,} {word}" + ("" if number == 1 else "s")


def shown(changes: list[Change], limit: int) -> tuple[list[Change], int]:
    """The first so many, and how many are left."""
    return (changes[:limit], max(0, len(changes) - limit)) if limit else (changes, 0)


def sentence(change: Change) -> str:
    """Where and what, without saying a place twice."""
    return change.text if change.tier == "precision" else f"{change.where}: {change.text}"


def verdict(found: Comparison) -> str:
    """One line: the same or not."""
    allowed = f", {count(len(found.allowed), 'allowed difference')}" if found.allowed else ""
    if found.same and found.only:
        return f"the same {found.only}{allowed}"
    if found.same:
        return f"the same ({count(max(found.counts), 'operation')}{allowed})"
    return f"{count(len(found.changes))}{allowed}"
