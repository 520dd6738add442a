"""For a terminal."""

from __future__ import annotations

from lamp_compile.diff.compare import Change, Comparison
from lamp_compile.diff.reporters._base import TITLES, Reporter, count, sentence, shown, verdict

WIDTH = 200
_ONE_LINE = ("interface", "precision", "numerics", "weights")
"""Tiers whose sentence says it all."""


def render(found: Comparison, limit: int) -> str:
    """Tiers one after the other, the precision plan first."""
    lines = [f"{letter} {name}" for letter, name in zip("-+", found.names, strict=True)]
    for tier, changes in found.by_tier().items():
        lines.append(f"{TITLES[tier]}: {count(len(changes))}")
        first, left = shown(changes, limit)
        for change in first:
            lines += _change(change)
        lines += [f"  and {left:,} more (--limit 0 shows all)"] if left else []
    for change, rule in found.allowed:
        lines.append(f"allowed by {rule}: {sentence(change)}")
    lines += [f"note: {note}" for note in found.notes]
    lines.append(verdict(found))
    return "\n".join(lines) + "\n"


def _change(change: Change) -> list[str]:
    lines = [f"  {sentence(change)}"]
    if change.tier not in _ONE_LINE and not change.subject.startswith("parameter "):
        lines += [f"    {sign} {_cut(text)}" for sign, text in (("-", change.before), ("+", change.after)) if text]
    return lines


def _cut(text: str) -> str:
    return text if len(text) <= WIDTH else text[: WIDTH - 3] + "..."


REPORTER = Reporter("text", render)
