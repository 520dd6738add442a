"""For programs: one object, all changes."""

from __future__ import annotations

import json

from lamp_compile.diff.compare import Comparison
from lamp_compile.diff.reporters._base import Reporter


def render(found: Comparison, limit: int) -> str:
    """All of it, whatever the limit."""
    return json.dumps(found.to_dict(), indent=2) + "\n"


REPORTER = Reporter("json", render)
