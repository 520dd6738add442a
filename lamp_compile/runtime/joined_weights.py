"""Parameters that lie one behind the other, so that one product serves several linear layers.

Joining moves parameters into one allocation, and nothing is held twice. Each keeps a storage of its own, of its own
rows: who saves, copies, moves or deletes parameters sees nothing of it, and the allocation lives as long as one of them
does. A parameter can be given other data at any time (``parameter.data = x``, another ``nn.Parameter`` in its place, a
copy of the whole module), so a compiled graph asks at every call whether they still lie where its joined tensor is.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import dlpack
from torch.utils.weak import WeakTensorKeyDictionary

ALIGNMENT = 16
"""Bytes: compilers and kernels read rows in pieces of so many, and may have settled on it for these parameters."""


@dataclass(frozen=True)
class _Home:
    """An allocation that parameters were moved into; this does not keep it alive."""

    storage: Any
    start: int
    size: int

    @staticmethod
    def of(parameter: Tensor) -> _Home | None:
        """Where a parameter lies, if it was moved there and is there still."""
        home: _Home | None = _homes.get(parameter)
        if home is None or home.storage.expired():
            return None
        return home if home.start <= parameter.data_ptr() < home.start + home.size else None

    @property
    def pieces(self) -> int:
        """How many tensors' storages lie in it."""
        return _holders(self.storage)


_homes: Any = WeakTensorKeyDictionary()
_weak: Any = StorageWeakRef
_to_dlpack: Any = dlpack.to_dlpack  # type: ignore[attr-defined]


def together(parts: Sequence[Tensor]) -> bool:
    """Whether parameters ``[N_i, ...]`` lie one behind the other in one allocation."""
    places = _places(parts, parts[0].data_ptr())
    if not all(p.is_contiguous() and p.data_ptr() == place for p, place in zip(parts, places, strict=True)):
        return False
    return len({_allocation(part) for part in parts}) == 1


def why_not(parts: Sequence[Tensor]) -> str | None:
    """Why these parameters cannot be brought together without anybody noticing, or None."""
    return next((reason for part in parts if (reason := why_not_move(part, parts)) is not None), None)


def why_not_move(parameter: Tensor, parts: Sequence[Tensor] = ()) -> str | None:
    """Why the data of a parameter cannot be moved, together with others, without anybody noticing, or None."""
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
    if _holders(_weak(storage)) > 1 or (parameter.device.type == "cpu" and storage.is_shared()):
        return "their weights share memory with other tensors"
    home = _Home.of(parameter)
    if home is not None and home.pieces != sum(_Home.of(part) == home for part in parts):
        return "their weights lie in another group, or in memory that somebody holds a part of"
    return None


def bring_together(parts: Sequence[Tensor]) -> None:
    """Move parameters ``[N_i, ...]`` into one allocation, in this order. The objects stay the same, and what each held
    is freed; an allocation that is theirs alone is used again. Ask ``why_not`` first.

    Raises:
        torch.OutOfMemoryError: No room for it; nothing was moved.
    """
    first, sizes = parts[0], [part.nbytes for part in parts]
    with torch.inference_mode(False), torch.no_grad():
        storage = _used_again(parts)
        if storage is None:
            storage = torch.empty(sum(sizes), dtype=torch.uint8, device=first.device).untyped_storage()
        home = _Home(_weak(storage), storage.data_ptr(), sum(sizes))
        for part, place in zip(parts, _places(parts, home.start), strict=True):
            if part.data_ptr() != place:
                flat = torch.empty(0, dtype=part.dtype, device=part.device)
                flat.set_(storage, (place - home.start) // part.element_size(), (part.numel(),), (1,))
                flat.copy_(part.view(-1))
                # Through DLPack it becomes a storage of these rows alone, which keeps the allocation alive.
                part.data = dlpack.from_dlpack(_to_dlpack(flat)).as_strided(part.shape, part.stride())
            _homes[part] = home
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


def _used_again(parts: Sequence[Tensor]) -> torch.UntypedStorage | None:
    """The allocation of some of them, if those are in their rows and it has no other pieces (``why_not``)."""
    for home in filter(None, map(_Home.of, parts)):
        places = zip(parts, _places(parts, home.start), strict=True)
        inside = sum(part.data_ptr() == place for part, place in places)
        if home.size == sum(part.nbytes for part in parts) and home.pieces == inside:
            return torch.UntypedStorage._new_with_weak_ptr(home.storage.cdata)
    return None


def _allocation(x: Tensor) -> int:
    home = _Home.of(x)
    return x.untyped_storage().data_ptr() if home is None else home.start


def _places(parts: Sequence[Tensor], start: int) -> list[int]:
    """Where each begins when the first begins at ``start``."""
    found = []
    for part in parts:
        found.append(start)
        start += part.nbytes
    return found


def _holders(storage: Any) -> int:
    """Tensors that share a storage, given as a weak reference."""
    return torch._C._storage_Use_Count(storage.cdata) - _uses_of_one() + 1


@cache
def _uses_of_one() -> int:
    """What torch counts where there is one tensor, which is not the same in all its builds."""
    one = torch.empty(1)
    count = torch._C._storage_Use_Count(_weak(one.untyped_storage()).cdata)
    del one
    return count
