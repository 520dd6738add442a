"""Allocations that may fail: turned into a ``CacheError``, with nothing half-done kept alive."""

from __future__ import annotations

import ctypes
import math
import mmap
from collections.abc import Callable, Iterable, Iterator, Mapping
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
    """Tensors of zeros by name, each with memory of its own, in large pages where the system has them; outside graphs
    one launch fills all of a dtype."""
    if torch.compiler.is_compiling():
        return {name: torch.zeros(shape, dtype=dtype, device=device) for name, (shape, dtype) in sizes.items()}
    made = {name: _empty(shape, dtype, device) for name, (shape, dtype) in sizes.items()}
    for tensor in made.values():
        in_large_pages(tensor)
    later = _together.get()
    if later is None:
        zero(made.values())
    else:
        later.extend(made.values())
    return made


def _empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory of its own, that begins where a large page does if it will lie in such pages: of planes of a few megabytes
    a quarter would be left outside of them."""
    small = torch.empty(0, dtype=dtype, device=device)
    size = math.prod(shape) * dtype.itemsize
    if not _may_be_large(small, size):
        return torch.empty(shape, dtype=dtype, device=device)
    room = np.empty(size + LARGE_PAGE, dtype=np.uint8)
    skipped = -room.ctypes.data % LARGE_PAGE
    # Neither a view nor an offset into its storage: compiled graphs would be guarded by either.
    memory = torch.from_numpy(room[skipped : skipped + size]).untyped_storage()
    made: Tensor = small.set_(memory, 0, shape, torch.empty(shape, device="meta").stride())
    return made


def _may_be_large(tensor: Tensor, size: int) -> bool:
    plain = type(tensor) is Tensor and tensor.device.type == "cpu"  # a fake tensor is of another type
    return plain and size >= 2 * LARGE_PAGE and _madvise() is not None


def in_large_pages(tensor: Tensor) -> bool:
    """Ask the system to put a tensor that nobody has written to yet into large pages: a decode step goes through planes
    of more pages than a processor remembers the places of. What the tensor holds is lost. Advice: on another system
    than Linux, with a GPU's tensor or a small one nothing happens. Whether the system took it."""
    size, madvise = tensor.numel() * tensor.element_size(), _madvise()
    if not _may_be_large(tensor, size):
        return False
    begin = -(-tensor.data_ptr() // LARGE_PAGE) * LARGE_PAGE
    end = (tensor.data_ptr() + size) // LARGE_PAGE * LARGE_PAGE
    taken = bool(madvise(begin, end - begin, mmap.MADV_HUGEPAGE) == 0)
    if taken:  # what was used before lies in small pages already: given back, it comes in large ones when written to
        madvise(begin, end - begin, mmap.MADV_DONTNEED)
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
