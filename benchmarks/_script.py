"""How every benchmark ends: the exit status of its main, and bad input as one line instead of a traceback."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import NoReturn

from lamp_compile.errors import LampError


def run(main: Callable[[], int | None]) -> NoReturn:
    """Run ``main`` and leave."""
    try:
        sys.exit(main())
    except LampError as error:
        sys.exit(f"error: {error}")
