"""Parameters that lie one behind the other in one tensor, so that one product serves several linear layers.

The tensor is the parameters' own memory: joining moves them, and nothing is held twice. A parameter can be given other
data at any time (``parameter.data = x``, another ``nn.Parameter`` in its place, a copy of the whole module), so a
compiled graph asks at every call whether they still lie where its joined tensor is.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

ALIGNMENT = 16
"""Bytes: compilers and kernels read rows in pieces of so many, and may have settled on it for these parameters."""


def together(parts: Sequence[Tensor]) -> bool:
    """Whether parameters ``[N_i, ...]`` lie one behind the other in one storage."""
    storage, places = _storage(parts[0]), _places(parts, parts[0].data_ptr())
    return all(
        part.data_ptr() == place and _storage(part) == storage and part.is_contiguous()
        for part, place in zip(parts, places, strict=True)
    )


def why_not(parts: Sequence[Tensor]) -> str | None:
    """Why these parameters cannot be brought together without anybody noticing, or None."""
    home = _home(parts)
    places = [-1] * len(parts) if home is None else _places(parts, home.data_ptr())
    for part, place in zip(parts, places, strict=True):
        if part.data_ptr() != place and (reason := why_not_move(part)) is not None:
            return reason
    return None


def why_not_move(parameter: Tensor) -> str | None:
    """Why the data of a parameter that is in no joined storage cannot be moved without anybody noticing, or None."""
    if type(parameter) is not nn.Parameter:
        return "their weights are no plain parameters"
    if parameter.is_meta or not parameter.is_floating_point() or not parameter.is_contiguous():
        return "their weights are no contiguous floats"
    if parameter.is_inference():
        return "their weights are inference tensors"
    if parameter.nbytes == 0 or parameter.nbytes % ALIGNMENT:
        return f"weights of a size that is no multiple of {ALIGNMENT} bytes"
    storage = parameter.untyped_storage()
    if storage.nbytes() != parameter.nbytes:
        return "their weights are parts of larger tensors"
    if _holders(storage) > 1 or (parameter.device.type == "cpu" and storage.is_shared()):
        return "their weights share memory with other tensors"
    return None


def bring_together(parts: Sequence[Tensor]) -> None:
    """Move parameters ``[N_i, ...]`` into one storage, in this order. The objects stay the same, and what each held is
    freed; the storage they were joined in before is used again where nobody else looks at it. Ask ``why_not`` first.

    Raises:
        torch.OutOfMemoryError: No room for it; nothing was moved.
    """
    first, home, start = parts[0], _home(parts), 0
    shape = (sum(map(len, parts)), *first.shape[1:])
    with torch.inference_mode(False), torch.no_grad():
        whole = torch.empty(shape if home is None else 0, dtype=first.dtype, device=first.device)
        if home is not None:
            whole = whole.set_(home).view(shape)
        for part in parts:
            rows = whole[start : start + len(part)]
            start += len(part)
            if part.data_ptr() != rows.data_ptr():
                rows.copy_(part)
                part.data = rows
    if first.device.type == "cuda":
        torch.cuda.empty_cache()  # the pieces they lay in are too small for the next group, and would stay reserved


def look_at(parts: Sequence[Tensor]) -> Tensor:
    """Parameters that lie together as one tensor ``[sum N_i, ...]`` that does not own its memory: whoever moves or
    deletes a model gets the memory back. Good for as long as their addresses stay what they are."""
    first = parts[0]
    with torch.inference_mode(False), torch.no_grad():
        size = sum(part.nbytes for part in parts)
        storage = torch._C._construct_storage_from_data_pointer(first.data_ptr(), first.device, size)
        flat = torch.empty(0, dtype=first.dtype, device=first.device).set_(storage)
        return flat.view(sum(map(len, parts)), *first.shape[1:])


class JoinedWeights:
    """The joined tensors of one compiled graph."""

    def __init__(self) -> None:
        self._groups: list[_Group] = []
        self._positions: list[int] = []
        self._pointers: list[int] = []
        self._wholes: list[Tensor] = []
        self._warned = False

    def add(self, positions: Sequence[int], parts: Sequence[Tensor]) -> Tensor:
        """Add a group, and give back its joined tensor.

        Args:
            positions: Which arguments of the graph its parameters are.
            parts: The parameters ``[N_i, ...]``, which lie together.
        """
        self._groups.append(_Group(positions))
        self._positions += positions
        self._pointers += [part.data_ptr() for part in parts]
        self._wholes.append(look_at(parts))
        return self._wholes[-1]

    def tensors(self, args: Sequence[Any]) -> list[Tensor]:
        """The joined tensors, with the values that the parameters have now.

        Args:
            args: What the graph is called with.
        """
        if [args[i].data_ptr() for i in self._positions] != self._pointers:
            self._wholes = [group.renewed([args[i] for i in group.positions]) for group in self._groups]
            self._pointers = [args[i].data_ptr() for i in self._positions]
            if reason := next((group.apart for group in self._groups if group.apart), ""):
                self._pointers = []  # asked anew at the next call
                self._say(reason)
        return self._wholes

    def _say(self, reason: str) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"linear layers are joined and {reason} now: they are copied together at every call (said once)",
                stacklevel=3,
            )


class _Group:
    """The parameters of one joined tensor."""

    def __init__(self, positions: Sequence[int]) -> None:
        self.positions = tuple(positions)
        self.apart = ""
        self._copy: Tensor | None = None

    def renewed(self, parts: Sequence[Tensor]) -> Tensor:
        """The joined tensor, after its parameters moved: where they lie, or else a copy; ``apart`` says why a copy."""
        self.apart = "" if together(parts) else why_not(parts) or ""
        if self.apart:
            return self._copied(parts)
        self._copy = None
        if not together(parts):
            bring_together(parts)
        return look_at(parts)

    def _copied(self, parts: Sequence[Tensor]) -> Tensor:
        """Always into the same memory: CUDA graphs are bound to addresses."""
        with torch.inference_mode(False), torch.no_grad():
            if self._copy is None:
                self._copy = torch.cat([part.detach() for part in parts])
            else:
                torch.cat([part.detach() for part in parts], out=self._copy)
        return self._copy


def _home(parts: Sequence[Tensor]) -> torch.UntypedStorage | None:
    """The storage they were joined in before, if those still in it are in their rows and nobody else looks at it: then
    what its other rows hold is nobody's backup."""
    total = sum(part.nbytes for part in parts)
    for part in parts:
        storage = part.untyped_storage()
        if storage.nbytes() == total:
            places = _places(parts, storage.data_ptr())
            inside = sum(p.data_ptr() == place for p, place in zip(parts, places, strict=True))
            if inside == _holders(storage):
                return storage
    return None


def _places(parts: Sequence[Tensor], start: int) -> list[int]:
    """Where each begins when the first begins at ``start``."""
    found = []
    for part in parts:
        found.append(start)
        start += part.nbytes
    return found


def _storage(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


def _holders(storage: torch.UntypedStorage) -> int:
    """Tensors that share a storage."""
    return torch._C._storage_Use_Count(storage._cdata) - _uses_of_one() + 1


@cache
def _uses_of_one() -> int:
    """What torch counts where there is one tensor, which is not the same in all its builds."""
    one = torch.empty(1)
    storage = one.untyped_storage()
    count = torch._C._storage_Use_Count(storage._cdata)
    del one
    return count
