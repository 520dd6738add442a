"""How a comparison is written. One file adds a format: it declares ``REPORTER``."""

from __future__ import annotations

import sys

from lamp_compile import _plugins
from lamp_compile.diff.compare import Comparison
from lamp_compile.diff.reporters._base import Reporter

NAMES = _plugins.names("diff/reporters")


def render(found: Comparison, name: str, limit: int) -> str:
    """The comparison in one format; text formats show at most ``limit`` changes of a tier."""
    return _plugins.load(sys.modules[__name__], "REPORTER", Reporter)[name].render(found, limit)
