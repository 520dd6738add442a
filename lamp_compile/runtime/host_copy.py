"""Keys and values as they came, in the host's memory: insurance that is read only when floor 2 calls for it."""

from __future__ import annotations

import torch
from torch import Tensor

from lamp_compile.runtime.growable_layer import ordinary_tensors


class HostCopy:
    """Keys ``[capacity, B, G, D]`` and values ``[capacity, B, G, Dv]`` in the model's dtype, page-locked where the
    model is on a GPU. Tokens come first: new rows are then one piece of memory, which a copy engine writes while the
    host goes on.

    Args:
        capacity: Tokens there is room for.
        key: Any keys ``[B, G, n, D]`` of the model; its shape, dtype and device are looked at.
        value: Any values ``[B, G, n, Dv]``.
        device: Of the model, where the keys given here are elsewhere.
    """

    def __init__(self, capacity: int, key: Tensor, value: Tensor, device: torch.device | None = None) -> None:
        self.device = key.device if device is None else device
        self.k, self.v = (self._empty(capacity, x) for x in (key, value))

    def _empty(self, capacity: int, like: Tensor) -> Tensor:
        batch, kv_heads, _, dim = like.shape
        with ordinary_tensors():
            return torch.zeros(
                capacity, batch, kv_heads, dim, dtype=like.dtype, pin_memory=self.device.type == "cuda"
            )  # fmt: skip

    @property
    def nbytes(self) -> int:
        """Bytes in the host's memory."""
        return sum(x.numel() * x.element_size() for x in (self.k, self.v))

    def write(self, key: Tensor, value: Tensor, at: int) -> None:
        """Store new rows ``[B, G, n, D]`` from token ``at`` on; on a GPU in its stream's order, without waiting."""
        for stored, rows in ((self.k, key), (self.v, value)):
            stored[at : at + rows.shape[2]].copy_(rows.detach().permute(2, 0, 1, 3).contiguous(), non_blocking=True)

    def fetch(self, tokens: int) -> tuple[Tensor, Tensor]:
        """Keys ``[B, G, tokens, D]`` and values on the model's device."""
        k, v = (x[:tokens].to(self.device, non_blocking=True).permute(1, 2, 0, 3) for x in (self.k, self.v))
        return k, v

    def widened(self, capacity: int) -> HostCopy:
        """A copy with room for more tokens."""
        self._settle()
        made = HostCopy(capacity, self.k.permute(1, 2, 0, 3), self.v.permute(1, 2, 0, 3), self.device)
        made.k[: self.k.shape[0]], made.v[: self.v.shape[0]] = self.k, self.v
        return made

    def take(self, indices: Tensor) -> None:
        """Sequence i becomes what sequence ``indices[i]`` was."""
        self._settle()
        index = indices.to("cpu")
        with ordinary_tensors():
            self.k, self.v = (self._pinned(x.index_select(1, index)) for x in (self.k, self.v))

    def repeat(self, repeats: int) -> None:
        """Each sequence ``repeats`` times in a row."""
        self.take(torch.arange(self.k.shape[1]).repeat_interleave(repeats))

    def _pinned(self, x: Tensor) -> Tensor:
        return x.pin_memory() if self.device.type == "cuda" else x

    def _settle(self) -> None:
        """The host is about to read what the device may still be writing."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
