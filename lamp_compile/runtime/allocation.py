"""Allocations that may fail: turned into a ``CacheError``, with nothing half-done kept alive."""

from __future__ import annotations

import ctypes
import math
import mmap
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from lamp_compile.errors import CacheError

T = TypeVar("T")
LARGE_PAGE = 2 << 20
"""Bytes of the pages that ``in_large_pages`` asks for, as x86-64 and most of AArch64 have them."""
LINE = 64
"""Bytes of a cache line: where tensors in a row begin."""


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


Sizes = Mapping[str, tuple[tuple[int, ...], torch.dtype]]


def zeros(sizes: Sizes, device: torch.device, apart: Collection[str] = ()) -> dict[str, Tensor]:
    """Tensors of zeros by name, none of which shares a storage with another, in large pages where the system has them;
    outside graphs one launch fills all of a dtype. On a CPU any of them may keep the memory of all, but for those named
    in ``apart``."""
    if torch.compiler.is_compiling():
        return {name: torch.zeros(shape, dtype=dtype, device=device) for name, (shape, dtype) in sizes.items()}
    row = _side_by_side({name: size for name, size in sizes.items() if name not in apart}, device) or {}
    made = {
        name: row[name] if name in row else torch.empty(shape, dtype=dtype, device=device)
        for name, (shape, dtype) in sizes.items()
    }
    later = _together.get()
    if later is None:
        zero(made.values())
    else:
        later.extend(made.values())
    return made


def _side_by_side(sizes: Sizes, device: torch.device) -> dict[str, Tensor] | None:
    """Memory for all of them in a row, the smallest first, that begins where a large page does; None where it is not
    worth it or cannot be had. Large pages hold what is small, too, and what lies at the borders of what is not."""
    bytes_of = {name: math.prod(shape) * dtype.itemsize for name, (shape, dtype) in sizes.items()}
    places, total = {}, 0
    for name in sorted(bytes_of, key=bytes_of.__getitem__):
        places[name] = total
        total += -(-bytes_of[name] // LINE) * LINE
    plain = type(torch.empty(0, device=device)) is Tensor  # a fake tensor is of another type
    if not plain or device.type != "cpu" or total < 2 * LARGE_PAGE or _madvise() is None:
        return None
    room = np.empty(total + LARGE_PAGE, dtype=np.uint8)
    begin = -room.ctypes.data % LARGE_PAGE
    in_large_pages(room.ctypes.data + begin, total)
    made = {}
    for name, (shape, dtype) in sizes.items():
        at = begin + places[name]
        memory = torch.from_numpy(room[at : at + bytes_of[name]]).untyped_storage()
        # Neither views nor offsets into a storage: compiled graphs would be guarded by either.
        steps = torch.empty(shape, device="meta").stride()
        made[name] = torch.empty(0, dtype=dtype).set_(memory, 0, shape, steps)
    return made


def in_large_pages(begin: int, size: int) -> bool:
    """Ask the system to put memory that nobody has written to yet into large pages, as many as lie inside: a decode
    step goes through planes of more pages than a processor remembers the places of. What the memory holds is lost.
    Advice: on another system than Linux nothing happens. Whether the system took it."""
    madvise = _madvise()
    first, end = -(-begin // LARGE_PAGE) * LARGE_PAGE, (begin + size) // LARGE_PAGE * LARGE_PAGE
    if madvise is None or end <= first:
        return False
    taken = bool(madvise(first, end - first, mmap.MADV_HUGEPAGE) == 0)
    if taken:  # what was used before lies in small pages already: given back, it comes in large ones when written to
        madvise(first, end - first, mmap.MADV_DONTNEED)
    return taken


@cache
def _madvise() -> Any:
    """The C library's function; None where there is none, or no such advice."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    found = getattr(ctypes.CDLL(None), "madvise", None)
    if found is not None:
        found.argtypes, found.restype = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int), ctypes.c_int
    return found


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
