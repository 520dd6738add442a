"""Switching LAMP off for a block of code."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_off: ContextVar[bool] = ContextVar("lamp_disabled", default=False)


@contextmanager
def disable() -> Iterator[None]:
    """Within the block, compiled models run as the original ones. Local to the thread and to the task."""
    token = _off.set(True)
    try:
        yield
    finally:
        _off.reset(token)


def disabled() -> bool:
    """Whether we are inside ``disable()``."""
    return _off.get()
