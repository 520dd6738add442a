"""Spellings of attention, one file each. ``all_patterns()`` lists them."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import cache

from lamp_compile import _plugins
from lamp_compile.passes.patterns._base import Pattern


@cache
def all_patterns() -> Mapping[str, Pattern]:
    """Every pattern in this folder, by name."""
    return _plugins.load(sys.modules[__name__], "PATTERN", Pattern)
