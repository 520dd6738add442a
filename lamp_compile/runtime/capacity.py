"""How many keys to allocate for. No torch."""

from __future__ import annotations

LENGTH_STEPS = 4
"""Capacities are rounded up to an eighth to a quarter of their size, so that nearby lengths share one compiled
graph."""


def rounded_capacity(keys: int, tile: int = 32, steps: int = LENGTH_STEPS) -> int:
    """Keys to allocate for ``keys`` keys: whole tiles, few different sizes (``2^(steps - 1)`` for each doubling)."""
    tiles = max(1, -(-keys // tile))
    step = max(1, 1 << max(0, (tiles - 1).bit_length() - steps + 1))
    return -(-tiles // step) * step * tile
