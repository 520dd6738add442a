"""For a terminal."""

from __future__ import annotations

from lamp_compile.diff.compare import Change, Comparison
from lamp_compile.diff.reporters._base import TITLES, Reporter, count, sentence, shown, verdict

WIDTH, BEFORE = 200, 60
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
        pairs = zip(change.before, change.after, strict=False)
        first = next((index for index, (x, y) in enumerate(pairs) if x != y), 0)
        start = max(0, first - BEFORE)
        lines += [
            f"    {sign} {_cut(text, start)}" for sign, text in (("-", change.before), ("+", change.after)) if text
        ]
    return lines


def _cut(text: str, start: int) -> str:
    """A window of a long line, from shortly before the first difference."""
    if len(text) <= WIDTH:
        return text
    head = "..." if start else ""
    end = start + WIDTH - len(head)
    return head + text[start:end] + ("..." if end < len(text) else "")


REPORTER = Reporter("text", render)
