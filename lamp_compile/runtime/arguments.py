"""The operators' arguments, gathered into what they mean. Shapes as in ``runtime/ops.py``."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lamp_compile.runtime import layout

CAUSAL = ("", "top_left", "bottom_right")


@dataclass(frozen=True)
class Planes:
    """Stored keys and values."""

    k_high: Tensor
    k_residual: Tensor
    k_scale: Tensor
    v_high: Tensor
    v_residual: Tensor
    v_scale: Tensor

    @property
    def tile(self) -> int:
        """Keys per storage tile."""
        return int(layout.tile_of(self.k_high))

    @property
    def tiles(self) -> int:
        """Storage tiles per sequence."""
        return int(self.k_high.shape[2])

    @property
    def bytes(self) -> int:
        """Bytes of all planes and scales."""
        return sum(t.numel() * t.element_size() for t in vars(self).values())

    def gathered(self, block_table: Tensor | None) -> Planes:
        """The planes of each sequence in order; themselves without a block table."""
        if block_table is None:
            return self
        return Planes(
            layout.gather_pages(self.k_high, block_table),
            layout.gather_pages(self.k_residual, block_table),
            layout.gather_scales(self.k_scale, block_table, self.tile),
            layout.gather_pages(self.v_high, block_table),
            layout.gather_pages(self.v_residual, block_table),
            layout.gather_scales(self.v_scale, block_table, self.tile),
        )


@dataclass(frozen=True)
class Visibility:
    """Which key each query may see, and what is added to its score."""

    keys: int
    mask: Tensor | None = None
    bias: Tensor | None = None
    sinks: Tensor | None = None
    start: Tensor | None = None
    lengths: Tensor | None = None
    causal: str = ""
    window: int = 0

    def live(self, rows: slice, queries: int, capacity: int, device: torch.device) -> Tensor:
        """Boolean, broadcastable to ``[B, H, rows, capacity]``: the liveness rule of ``runtime/ops.py``."""
        j = torch.arange(capacity, device=device)
        end = torch.full((1, 1, 1, 1), self.keys, device=device)  # no copy from the host: CUDA graphs refuse it
        if self.lengths is not None:
            end = torch.minimum(end, self.lengths.reshape(-1, 1, 1, 1))
        live = j < end
        if self.start is not None:
            live = live & (j >= self.start.reshape(-1, 1, 1, 1))
        if self.causal:
            i = torch.arange(queries, device=device)[rows][:, None]
            if self.causal == "bottom_right":
                i = i + (end - queries)
            live = live & (j <= i)
            if self.window:
                live = live & (j > i - self.window)
        if self.mask is not None:
            live = live & _pad_keys(_take_rows(self.mask, rows), capacity, False)
        return live

    def added(self, rows: slice, capacity: int) -> Tensor | None:
        """The additive bias of these rows, broadcastable to ``[B, H, rows, capacity]``, or None."""
        return None if self.bias is None else _pad_keys(_take_rows(self.bias, rows), capacity, 0.0)


@dataclass(frozen=True)
class Scores:
    """How a score is formed from q.k, and how the query is prepared."""

    scale: float
    softcap: float = 0.0
    rotation: str = "none"
    query_bits: int = 8
    """8 = the query is rounded to int8 with one scale per row, as the integer kernels do; 16 = bfloat16; 0 = as it
    is."""


def _take_rows(x: Tensor, rows: slice) -> Tensor:
    x = x.reshape((1,) * (4 - x.dim()) + tuple(x.shape))
    return x if x.shape[2] == 1 else x[:, :, rows]


def _pad_keys(x: Tensor, capacity: int, fill: float | bool) -> Tensor:
    """Pad the keys of a mask up to the capacity; a mask of one column broadcasts as it is."""
    if x.shape[-1] in (1, capacity):
        return x
    if x.shape[-1] > capacity:
        return x[..., :capacity]
    return torch.nn.functional.pad(x, (0, capacity - x.shape[-1]), value=fill)
