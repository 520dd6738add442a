"""How rows of planes are laid out in storage tiles and pages.

Keys ``[B, G, P, tile, width]``, values ``[B, G, P, width, tile]``. A cache appends with ``positions``; a block table
lists, per sequence, which storage tiles of a shared pool are its own.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

TILE = 128
"""Keys that caches grow by, a multiple of every storage tile; the storage tile where no plan says one."""
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


class Places(NamedTuple):
    """Where new rows ``[B, n]`` of a cache go: which of them are stored at all, and of those the plane's sequence,
    storage tile and key within it."""

    kept: Tensor
    sequence: Tensor
    page: Tensor
    key: Tensor


def places(positions: Tensor, batch: int, rows: int, tile: int, block_table: Tensor | None) -> Places:
    """Places of ``rows`` new rows per sequence, the first at ``positions`` (``[1]`` or ``[B]``; below 0 = nowhere).

    With a block table the planes are a pool; a row whose page is not there (an entry below 0, or past the table's end)
    goes nowhere.
    """
    first = positions.reshape(-1, 1).expand(batch, 1).long()
    index = first + torch.arange(rows, device=positions.device)
    kept = (first >= 0).expand(batch, rows)
    page, key = index.clamp(min=0) // tile, index.clamp(min=0) % tile
    if block_table is None:
        sequence = torch.arange(batch, device=positions.device)[:, None].expand(batch, rows)
        return Places(kept, sequence[kept], page[kept], key[kept])
    kept = kept & (page < block_table.shape[1])
    page = block_table.long().gather(1, page.clamp(max=block_table.shape[1] - 1))
    kept = kept & (page >= 0)
    return Places(kept, torch.zeros_like(page)[kept], page[kept], key[kept])


def put_keys(planes: Tensor, rows: Tensor, place: Places) -> None:
    """Write rows ``[B, G, n, width]`` of keys at their places, in place."""
    planes[place.sequence, :, place.page, place.key] = rows.transpose(1, 2)[place.kept]


def put_values(planes: Tensor, rows: Tensor, place: Places) -> None:
    """Write rows ``[B, G, n, width]`` of values at their places, in place."""
    planes[place.sequence, :, place.page, :, place.key] = rows.transpose(1, 2)[place.kept]


def put_scales(scale: Tensor, rows: Tensor, place: Places, tile: int) -> None:
    """Write scales ``[B, G, n]`` at their places, in place."""
    scale[place.sequence, :, place.page * tile + place.key] = rows.transpose(1, 2)[place.kept]
