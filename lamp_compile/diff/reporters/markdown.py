"""For the summary of a CI job or a comment on a pull request."""

from __future__ import annotations

import re

from lamp_compile.diff.compare import Change, Comparison
from lamp_compile.diff.reporters._base import TITLES, Reporter, count, sentence, shown, verdict


def render(found: Comparison, limit: int) -> str:
    """A verdict, the precision plan as a list, all other tiers folded."""
    lines = [f"### {_plain(found.names[0])} → {_plain(found.names[1])}", "", f"**{verdict(found)}**", ""]
    tiers = found.by_tier()
    if tiers:
        lines += ["| | differences |", "|---|---|", *(f"| {TITLES[t]} | {len(c):,} |" for t, c in tiers.items()), ""]
    for tier, changes in tiers.items():
        first, left = shown(changes, limit)
        more = [f"- and {left:,} more"] if left else []
        if tier in ("precision", "numerics", "interface"):
            lines += [f"**{TITLES[tier]}**", "", *(f"- {_plain(sentence(c))}" for c in first), *more, ""]
        else:
            lines += [f"<details><summary>{TITLES[tier]}: {count(len(changes))}</summary>", ""]
            for change in first:
                lines += [f"- {_plain(sentence(change))}", *_fence(change)]
            lines += [*more, "", "</details>", ""]
    if found.allowed:
        lines += ["**allowed**", "", *(f"- {_plain(sentence(c))} ({_plain(rule)})" for c, rule in found.allowed), ""]
    lines += [f"> {_plain(note)}\n" for note in found.notes]
    return "\n".join(lines).rstrip() + "\n"


def _fence(change: Change) -> list[str]:
    pairs = [(sign, text) for sign, text in (("-", change.before), ("+", change.after)) if text]
    ticks = "`" * max(3, 1 + max((len(run) for _, text in pairs for run in re.findall("`+", text)), default=0))
    return ["", f"  {ticks}diff", *(f"  {sign} {text}" for sign, text in pairs), f"  {ticks}", ""] if pairs else []


def _plain(text: str) -> str:
    """Text that Markdown and HTML show as it is."""
    return re.sub(r"([\\`*_{}\[\]<>|#~@])", r"\\\1", " ".join(text.split()))


REPORTER = Reporter("markdown", render)
