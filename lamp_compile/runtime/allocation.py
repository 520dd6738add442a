"""Allocations that may fail: turned into a ``CacheError``, with nothing half-done kept alive."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from lamp_compile.errors import CacheError

T = TypeVar("T")


def allocate(make: Callable[[], T], what: str, *, where: str, fix: str) -> T:
    """What ``make()`` gives.

    Raises:
        CacheError: There was not enough memory. What had been allocated by then is free again: the error holds on to
            no frame of ``make``.
    """
    try:
        return make()
    except (MemoryError, RuntimeError) as error:
        if not _out_of_memory(error):
            raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    # Outside the handler: a chained exception would keep the tensors of its frames.
    raise CacheError(f"{what}: out of memory ({reason})", where=where, fix=fix)


def _out_of_memory(error: Exception) -> bool:
    """torch has no type of its own for the CPU: its allocator raises a plain RuntimeError."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(error)
