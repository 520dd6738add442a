"""How rows of planes are laid out in storage tiles and pages.

Keys ``[B, G, P, tile, width]``, values ``[B, G, P, width, tile]``. A cache appends with ``positions``; a block table
lists, per sequence, which storage tiles of a shared pool are its own.

On a CPU whose vectors are wide enough, caches keep the same bytes by lanes, so that a vector's lanes are neighbouring
keys or channels as they come from memory: keys ``[B, G, P, width / 4, 32, 4]``, values ``[B, G, P, 8, width, 4]``. The
rank says which it is. What is written ``[B, G, P, tile, width]`` below is by rows.
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
LANES_TILE = 32
"""The storage tile of planes by lanes."""
LANE = 4
"""Bytes of one lane: neighbouring channels of a key, neighbouring keys of a channel of the values."""
LANES = 16
"""Lanes of a vector: channels of values by lanes are a multiple."""


def tiles_for(keys: int, tile: int = TILE) -> int:
    """Storage tiles that hold ``keys`` keys."""
    return -(-keys // tile)


def by_lanes(plane: Tensor) -> bool:
    """Whether a plane of keys or values lies by lanes."""
    return plane.dim() == 6


def lanes_fit(tile: int, key_width: int, value_width: int) -> bool:
    """Whether planes of these sizes, in bytes, can lie by lanes."""
    return tile == LANES_TILE and key_width % LANE == 0 and value_width % LANES == 0


def tile_of(keys: Tensor) -> int:
    """Keys per storage tile of a plane of keys."""
    return keys.shape[4] if by_lanes(keys) else keys.shape[3]


def key_width(keys: Tensor) -> int:
    """Width of a row in a plane of keys."""
    return keys.shape[3] * LANE if by_lanes(keys) else keys.shape[4]


def value_width(values: Tensor) -> int:
    """Width of a row in a plane of values."""
    return values.shape[4] if by_lanes(values) else values.shape[3]


def key_shape(tile: int, width: int, lanes: bool = False) -> tuple[int, ...]:
    """What follows ``[B, G, P]`` in the shape of a plane of keys."""
    return (width // LANE, tile, LANE) if lanes else (tile, width)


def value_shape(tile: int, width: int, lanes: bool = False) -> tuple[int, ...]:
    """What follows ``[B, G, P]`` in the shape of a plane of values."""
    return (tile // LANE, width, LANE) if lanes else (width, tile)


def as_lanes(plane: Tensor) -> Tensor:
    """Keys ``[B, G, P, 32, width]`` -> ``[B, G, P, width / 4, 32, 4]``, or values ``[B, G, P, width, 32]`` ->
    ``[B, G, P, 8, width, 4]``; a plane by lanes as it is."""
    return plane if by_lanes(plane) else _lanes(plane).transpose(3, 4).contiguous()


def as_rows(plane: Tensor) -> Tensor:
    """The plane of keys or values by rows: itself if it lies so, otherwise a copy."""
    return plane.transpose(3, 4).flatten(4) if by_lanes(plane) else plane


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
    """``[B, G, P, tile, width]`` -> ``[B, G, P * tile, width]``: a view, or of planes by lanes a copy."""
    return as_rows(planes).flatten(2, 3)


def value_rows(planes: Tensor) -> Tensor:
    """``[B, G, P, width, tile]`` -> ``[B, G, P * tile, width]``."""
    return as_rows(planes).transpose(-1, -2).flatten(2, 3)


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
    if by_lanes(planes):
        page, key = positions // LANES_TILE, positions % LANES_TILE
        planes[:, :, page, :, key] = _lanes(rows.permute(2, 0, 1, 3))
        return
    key_rows(planes).index_copy_(2, positions, rows)


def write_values(planes: Tensor, rows: Tensor, positions: Tensor) -> None:
    """Write rows ``[B, G, n, width]`` at key positions ``[n]``, in place."""
    # The index tensors stand apart, so the indexed dimension comes first: [n, B, G, width].
    new = rows.permute(2, 0, 1, 3)
    if by_lanes(planes):
        page, key = positions // LANES_TILE, positions % LANES_TILE
        planes[:, :, page, key // LANE, :, key % LANE] = new
        return
    tile = planes.shape[-1]
    planes[:, :, positions // tile, :, positions % tile] = new


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
    new = rows.transpose(1, 2)[place.kept]
    if by_lanes(planes):
        planes[place.sequence, :, place.page, :, place.key] = _lanes(new)
        return
    planes[place.sequence, :, place.page, place.key] = new


def put_values(planes: Tensor, rows: Tensor, place: Places) -> None:
    """Write rows ``[B, G, n, width]`` of values at their places, in place."""
    new = rows.transpose(1, 2)[place.kept]
    if by_lanes(planes):
        planes[place.sequence, :, place.page, place.key // LANE, :, place.key % LANE] = new
        return
    planes[place.sequence, :, place.page, :, place.key] = new


def put_scales(scale: Tensor, rows: Tensor, place: Places, tile: int) -> None:
    """Write scales ``[B, G, n]`` at their places, in place."""
    scale[place.sequence, :, place.page * tile + place.key] = rows.transpose(1, 2)[place.kept]


def _lanes(x: Tensor) -> Tensor:
    """The last dimension cut into lanes."""
    return x.reshape(*x.shape[:-1], x.shape[-1] // LANE, LANE)
