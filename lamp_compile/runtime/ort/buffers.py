"""The tensors of an artifact's sequences: planes, guard state and statistics, bound to the session as inputs and as the
outputs that take their place. They stay where they are from step to step; only growth and another batch move them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lamp_compile.errors import CacheError, InputError
from lamp_compile.runtime.capacity import rounded_capacity
from lamp_compile.runtime.ort.artifact import Buffer, Site
from lamp_compile.runtime.ort.providers import onnxruntime

Array = NDArray[Any]
LENGTH_STEPS = 6
"""Capacities are rounded up to a sixteenth at most: portable bodies compute over all that is allocated, and no graph is
compiled anew when it grows."""


class Buffers:
    """All per-sequence tensors of all sites.

    Attributes:
        batch: Sequences held.
        capacity: Keys there is room for.
    """

    def __init__(self, sites: Sequence[Site], device: str, device_id: int) -> None:
        self._sites, self._device, self._device_id = sites, device, device_id
        self._values: dict[str, dict[str, Any]] = {}
        self._arrays: dict[str, dict[str, Array]] = {}
        self.batch = self.capacity = 0
        self._step = max((site.tile for site in sites), default=32) or 32

    def _all(self) -> Iterator[tuple[Site, str, Buffer]]:
        for site in self._sites:
            for name, buffer in site.buffers.items():
                yield site, name, buffer

    def __getitem__(self, site: str) -> dict[str, Any]:
        """The ``OrtValue`` of every tensor of a site by name; they speak DLPack."""
        return dict(self._values[site])

    def dimensions(self) -> dict[str, int]:
        """Sizes of a step of one token by the names of the artifact's dimensions."""
        return {"batch": self.batch, "tokens": 1, "capacity": self.capacity, "tiles": self.capacity // self._step}

    def read(self, site: str, name: str) -> Array:
        """A copy on the host."""
        if self._device == "cpu":
            return self._arrays[site][name].copy()
        return np.array(self._values[site][name].numpy())

    def allocate(self, batch: int, keys: int) -> None:
        """Fresh tensors, all zero, for ``batch`` sequences of at least ``keys`` keys.

        Raises:
            CacheError: There is no memory for them. What was there is as it was.
        """
        capacity = rounded_capacity(keys, self._step, LENGTH_STEPS)
        self._install(self._guarded(lambda buffer: np.zeros(buffer.shape_for(batch, capacity), buffer.dtype)))
        self.batch, self.capacity = batch, capacity

    def grow(self, keys: int) -> bool:
        """Make room for ``keys`` keys; contents are kept. Whether anything moved.

        Raises:
            CacheError: There is no memory for them. What was there is as it was.
        """
        if keys <= self.capacity:
            return False
        capacity = rounded_capacity(keys, self._step, LENGTH_STEPS)

        def wider(site: Site, name: str, buffer: Buffer) -> Array:
            old = self._host(site.name, name)
            made = np.zeros(buffer.shape_for(self.batch, capacity), buffer.dtype)
            made[:, :, : old.shape[2]] = old
            return made

        made = self._guarded_each(lambda site, name, buffer: wider(site, name, buffer) if buffer.keys else None)
        self._install(made)
        self.capacity = capacity
        return True

    def select(self, indices: Sequence[int]) -> bool:
        """Sequence i becomes what sequence ``indices[i]`` was: in place where there are as many of them as before.
        Whether anything moved.

        Raises:
            InputError: An index is no sequence.
        """
        order = np.asarray(indices)
        if order.ndim != 1 or order.size == 0 or order.dtype.kind not in "iu":
            raise InputError(f"indices are {indices!r}", where="OrtSession.reorder", fix="a list of sequence numbers")
        if order.min() < 0 or order.max() >= self.batch:
            raise InputError(f"indices {order.tolist()} for {self.batch} sequences", where="OrtSession.reorder")
        if order.size == self.batch:
            for site, name, _ in self._all():
                self._write(site.name, name, self._host(site.name, name)[order])
            return False
        self._install(self._guarded_each(lambda site, name, _: self._host(site.name, name)[order]))
        self.batch = int(order.size)
        return True

    def clear(self) -> None:
        """Zeros everywhere; nothing moves."""
        for site, name, _ in self._all():
            self._write(site.name, name, np.zeros_like(self._host(site.name, name)))

    def snapshot(self, names: Sequence[str]) -> dict[tuple[str, str], Array]:
        """Copies on the host of these tensors of every site that has them, for ``restore``."""
        return {(site.name, name): self.read(site.name, name) for site, name, _ in self._all() if name in names}

    def restore(self, held: Mapping[tuple[str, str], Array]) -> None:
        """Put back what ``snapshot`` gave; nothing moves."""
        for (site, name), array in held.items():
            self._write(site, name, array)

    def bind(self, binding: Any, sequence: int | None = None) -> None:
        """As inputs and as outputs of the next runs, both the same memory; of one sequence alone where it is given."""
        for site, name, buffer in self._all():
            value = self._values[site.name][name]
            if sequence is None:
                binding.bind_ortvalue_input(buffer.past, value)
                binding.bind_ortvalue_output(buffer.present, value)
                continue
            dtype, shape = np.dtype(buffer.dtype), (1, *value.shape()[1:])
            place = value.data_ptr() + sequence * math.prod(shape) * dtype.itemsize
            for bind, which in ((binding.bind_input, buffer.past), (binding.bind_output, buffer.present)):
                bind(which, self._device, self._device_id, dtype.type, shape, place)

    def nbytes(self) -> int:
        """Bytes of keys and values as allocated, scales included; the guard's left out."""
        return sum(
            int(self._values[site.name][name].tensor_size_in_bytes())
            for site, name, buffer in self._all()
            if buffer.keys
        )

    def _host(self, site: str, name: str) -> Array:
        return self._arrays[site][name] if self._device == "cpu" else self._values[site][name].numpy()

    def _write(self, site: str, name: str, array: Array) -> None:
        if self._device == "cpu":
            self._arrays[site][name][...] = array
        else:
            self._values[site][name].update_inplace(np.ascontiguousarray(array))

    def _guarded(self, make: Any) -> dict[str, dict[str, Array]]:
        return self._guarded_each(lambda site, name, buffer: make(buffer))

    def _guarded_each(self, make: Any) -> dict[str, dict[str, Array]]:
        """What ``make`` gives for every tensor; where it gives None, the tensor stays."""
        try:
            made: dict[str, dict[str, Array]] = {}
            for site, name, buffer in self._all():
                array = make(site, name, buffer)
                if array is not None:
                    made.setdefault(site.name, {})[name] = array
            return made
        except MemoryError as error:
            raise CacheError(
                f"no memory for the planes: {error}", where="OrtSession", fix="fewer sequences or fewer tokens"
            ) from error

    def _install(self, made: dict[str, dict[str, Array]]) -> None:
        ort = onnxruntime()
        for site, arrays in made.items():
            for name, array in arrays.items():
                if self._device == "cpu":  # the value is the array's memory
                    self._arrays.setdefault(site, {})[name] = array
                    value = ort.OrtValue.ortvalue_from_numpy(array)
                else:
                    value = ort.OrtValue.ortvalue_from_numpy(array, self._device, self._device_id)
                self._values.setdefault(site, {})[name] = value
