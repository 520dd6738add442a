"""Allocations that may fail: turned into a ``CacheError``, with nothing half-done kept alive."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

import torch
from torch import Tensor

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


def zeros(sizes: Mapping[str, tuple[tuple[int, ...], torch.dtype]], device: torch.device) -> dict[str, Tensor]:
    """Tensors of zeros by name, each with memory of its own; outside graphs one launch fills all of a dtype."""
    if torch.compiler.is_compiling():
        return {name: torch.zeros(shape, dtype=dtype, device=device) for name, (shape, dtype) in sizes.items()}
    made = {name: torch.empty(shape, dtype=dtype, device=device) for name, (shape, dtype) in sizes.items()}
    later = _together.get()
    if later is None:
        zero(made.values())
    else:
        later.extend(made.values())
    return made


_together: ContextVar[list[Tensor] | None] = ContextVar("lamp_zeros", default=None)


@contextmanager
def together() -> Iterator[None]:
    """Within the block, what ``zeros`` makes is filled at the end of the block, all of it together."""
    made: list[Tensor] = []
    token = _together.set(made)
    try:
        yield
    finally:
        _together.reset(token)
        zero(made)


def zero(tensors: Iterable[Tensor]) -> None:
    """Fill tensors with zeros: one launch for all of a device and dtype, if they are not very large."""
    alike: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for tensor in tensors:
        alike.setdefault((tensor.device, tensor.dtype), []).append(tensor)
    for group in alike.values():
        torch._foreach_zero_(group)


def _out_of_memory(error: Exception) -> bool:
    """torch has no type of its own for the CPU: its allocator raises a plain RuntimeError."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(error)
