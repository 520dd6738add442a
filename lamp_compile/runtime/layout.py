"""How rows of planes are laid out in storage tiles and pages.

Keys ``[B, G, P, tile, width]``, values ``[B, G, P, width, tile]``. A cache appends with ``positions``; a block table
lists, per sequence, which storage tiles of a shared pool are its own.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

TILE = 128
"""Keys per storage tile."""
SUBTILE = 32
"""Keys per precision decision."""


def tiles_for(keys: int, tile: int = TILE) -> int:
    """Storage tiles that hold ``keys`` keys."""
    return -(-keys // tile)


def key_tiles(rows: Tensor, tile: int) -> Tensor:
    """``[B, G, N, width]`` -> ``[B, G, P, tile, width]``, zero-padded to whole tiles."""
    pad = -rows.shape[2] % tile
    padded = F.pad(rows, (0, 0, 0, pad))
    return padded.reshape(*rows.shape[:2], padded.shape[2] // tile, tile, rows.shape[3])


def value_tiles(rows: Tensor, tile: int) -> Tensor:
    """``[B, G, N, width]`` -> ``[B, G, P, width, tile]``, zero-padded to whole tiles."""
    return key_tiles(rows, tile).transpose(-1, -2).contiguous()


def scale_tiles(scale: Tensor, tile: int) -> Tensor:
    """``[B, G, N]`` -> ``[B, G, P * tile]``, zero-padded to whole tiles."""
    return F.pad(scale, (0, -scale.shape[2] % tile))


def key_rows(planes: Tensor) -> Tensor:
    """``[B, G, P, tile, width]`` -> ``[B, G, P * tile, width]``: a view."""
    return planes.flatten(2, 3)


def value_rows(planes: Tensor) -> Tensor:
    """``[B, G, P, width, tile]`` -> ``[B, G, P * tile, width]``."""
    return planes.transpose(-1, -2).flatten(2, 3)


def gather_pages(planes: Tensor, block_table: Tensor) -> Tensor:
    """Pool ``[1, G, P_pool, ...]`` and table ``[B, P]`` -> ``[B, G, P, ...]``; entries below 0 read tile 0 (never
    live)."""
    pages = planes[0].index_select(1, block_table.clamp(min=0).flatten().long())
    return pages.reshape(pages.shape[0], *block_table.shape, *pages.shape[2:]).transpose(0, 1)


def gather_scales(scale: Tensor, block_table: Tensor, tile: int) -> Tensor:
    """Pool ``[1, G, P_pool * tile]`` and table ``[B, P]`` -> ``[B, G, P * tile]``."""
    return gather_pages(scale.reshape(*scale.shape[:2], -1, tile), block_table).flatten(2, 3)


def write_keys(planes: Tensor, rows: Tensor, positions: Tensor) -> None:
    """Write rows ``[B, G, n, width]`` at key positions ``[n]``, in place."""
    key_rows(planes).index_copy_(2, positions, rows)


def write_values(planes: Tensor, rows: Tensor, positions: Tensor) -> None:
    """Write rows ``[B, G, n, width]`` at key positions ``[n]``, in place."""
    tile = planes.shape[-1]
    # The two index tensors stand apart, so the indexed dimension comes first: [n, B, G, width].
    planes[:, :, positions // tile, :, positions % tile] = rows.permute(2, 0, 1, 3)


def write_scales(scale: Tensor, rows: Tensor, positions: Tensor) -> None:
    """Write scales ``[B, G, n]`` at key positions ``[n]``, in place."""
    scale.index_copy_(2, positions, rows)
