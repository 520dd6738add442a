"""Tensors as text: few values in full, many as a hash."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence

MOST_INLINE = 16
"""Values written out; more are given as a hash of their bytes."""


def numbers(values: Iterable[object]) -> str:
    """``{1.0, inf, true}``: floats as the shortest text that gives them back."""
    return "{" + ", ".join(map(number, values)) + "}"


def number(value: object) -> str:
    """One number as text."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return "nan" if math.isnan(value) else repr(value)
    return str(value)


def digest(data: bytes | memoryview) -> str:
    """Of the bytes of a tensor, little-endian, contiguous."""
    return "#" + hashlib.sha256(data).hexdigest()[:12]


def tensor(dtype: str, sizes: Sequence[int], values: Sequence[object] | None, data: bytes | None) -> str:
    """``float32[2]{1.0, 2.0}`` or ``float32[64,64]#4f5e...``."""
    head = f"{dtype}[{','.join(map(str, sizes))}]"
    if values is not None:
        return head + numbers(values)
    return head + (digest(data) if data is not None else "")
