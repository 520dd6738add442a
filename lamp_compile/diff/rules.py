"""Rules for expected changes: ``TIER[@WHERE][#SUBJECT]``, each part a shell pattern."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path

from lamp_compile.diff.compare import TIERS, Change, Comparison
from lamp_compile.errors import InputError, OptionError


@dataclass(frozen=True)
class Rule:
    """Allows the changes of a tier at matching places with a matching subject."""

    tier: str
    where: str = "*"
    subject: str = "*"
    text: str = ""

    def allows(self, change: Change) -> bool:
        """Whether a change is expected by this rule."""
        return (
            self.tier in ("*", change.tier)
            and fnmatchcase(change.where, self.where)
            and fnmatchcase(change.subject, self.subject)
        )


def parse(text: str) -> Rule:
    """One rule.

    Raises:
        OptionError: The tier is none, or a part is empty.
    """
    head, hash_, subject = text.strip().partition("#")
    tier, at, where = head.partition("@")
    if tier not in (*TIERS, "*"):
        raise OptionError(
            f"no tier {tier!r} in the rule {text!r}", where="--allow", fix=f"one of {', '.join(TIERS)}, *"
        )
    if (at and not where) or (hash_ and not subject):
        raise OptionError(
            f"an empty part in the rule {text!r}", where="--allow", fix="TIER@WHERE#SUBJECT, or leave it out"
        )
    return Rule(tier, where or "*", subject or "*", text.strip())


def read(path: str | Path) -> tuple[Rule, ...]:
    """The rules of a file, one a line; lines that begin with # are comments.

    Raises:
        InputError: The file cannot be read, or a line is no rule.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the rules: {error}", where=str(path), fix="check the path") from None
    rules = []
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        try:
            rules.append(parse(line))
        except OptionError as error:
            raise InputError(error.what, where=f"{path}, line {number}", fix=error.fix) from None
    return tuple(rules)


def apply(found: Comparison, rules: Sequence[Rule]) -> Comparison:
    """Set the changes apart that a rule allows; the first that does is named.

    Raises:
        InputError: A rule matched nothing: it is out of date, or misspelt, and would hide something later.
    """
    kept, allowed, used = [], [], set()
    for change in found.changes:
        matching = [rule for rule in rules if rule.allows(change)]
        used |= {rule.text for rule in matching}
        if matching:
            allowed.append((change, matching[0].text))
        else:
            kept.append(change)
    idle = [rule.text for rule in rules if rule.text not in used]
    if idle:
        raise InputError(
            f"nothing matched the rule {', '.join(map(repr, idle))}", where="--allow", fix="take it out, or correct it"
        )
    return replace(found, changes=tuple(kept), allowed=tuple(allowed))
