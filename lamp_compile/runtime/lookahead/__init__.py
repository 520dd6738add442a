"""Selection rules, one per file: from look-ahead scores to the importance of each sub-tile of keys."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import cache

from lamp_compile import _plugins
from lamp_compile.errors import OptionError
from lamp_compile.runtime.lookahead._base import Rule


@cache
def all_rules() -> Mapping[str, Rule]:
    """Every rule in this folder, by name; controls included."""
    return _plugins.load(sys.modules[__name__], "RULE", Rule)


def get(name: str) -> Rule:
    """The rule called ``name``.

    Raises:
        OptionError: There is none of that name.
    """
    try:
        return all_rules()[name]
    except KeyError:
        names = [rule.name for rule in all_rules().values() if not rule.control]
        raise OptionError(f"unknown rule {name!r}", where="rule", fix=f"one of {', '.join(names)}") from None
