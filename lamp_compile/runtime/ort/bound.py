"""Steps of one shape, bound to a session once: what is small is handed over anew, planes stay where they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lamp_compile.errors import InputError
from lamp_compile.runtime.ort.artifact import GUARD, Artifact
from lamp_compile.runtime.ort.buffers import Buffers
from lamp_compile.runtime.ort.providers import onnxruntime


@dataclass(frozen=True)
class Place:
    """Where a session keeps its tensors: ONNX Runtime's word for the device, and which of them."""

    device: str
    number: int = 0

    @property
    def on_host(self) -> bool:
        return self.device == "cpu"


class BoundStep:
    """An ``onnxruntime.InferenceSession`` with the tensors of all sites bound, for steps of one shape.

    Args:
        raw: The session.
        artifact: What it runs.
        buffers: Tensors of the sequences, as they are allocated now.
        settings: Arrays of tau, floor and budget by input name, read at every step.
        place: Where the session's tensors lie.
        rows: Tokens of each sequence.
        sequence: The only one that takes part; None for all.
        fixed: Small inputs and logits lie in memory of ours on the device, as captured graphs need it.

    Attributes:
        key: ``(rows, sequence)``.
        binding: The ``IOBinding``.
    """

    def __init__(
        self, raw: Any, artifact: Artifact, buffers: Buffers, settings: Mapping[str, NDArray[Any]], place: Place,
        key: tuple[int, int | None], fixed: bool = False,
    ) -> None:  # fmt: skip
        self.key, self.binding, self._raw, self._place = key, raw.io_binding(), raw, place
        rows, sequence = key
        batch = buffers.batch if sequence is None else 1
        buffers.bind(self.binding, sequence)
        names = artifact.inputs
        self._tokens = np.zeros((batch, rows), np.int64)
        self._slots = np.zeros(batch, np.int64)
        self._arrays = {names["tokens"]: self._tokens, names["slots"]: self._slots, **settings}
        if artifact.logits_from:  # nobody looks at the others
            self._arrays[artifact.logits_from] = np.array([-1], np.int64)
            rows = 1
        self._sent: dict[str, NDArray[Any]] = {}
        self._values: dict[str, Any] = {}
        self._logits = None
        if fixed:
            self._values = {name: self._on_device(array) for name, array in self._arrays.items()}
        for name, array in self._arrays.items():
            self._bind(name, array)
        if fixed:
            self._logits = self._on_device(np.zeros((batch, rows, vocabulary(raw, artifact)), np.float32))
            self.binding.bind_ortvalue_output(artifact.logits, self._logits)
        else:
            self.binding.bind_output(artifact.logits, "cpu")

    def run(self, tokens: NDArray[np.int64], slots: NDArray[np.int64]) -> NDArray[np.float32]:
        """Logits ``[B, V]`` of the last token of each; ``tokens`` ``[B, rows]``, their first ``slots`` ``[B]``."""
        self._tokens[...], self._slots[...] = tokens, slots
        if not self._place.on_host:  # the host's session reads these very arrays
            self._send()
        self._raw.run_with_iobinding(self.binding)
        found = self._logits if self._logits is not None else self.binding.get_outputs()[-1]
        last: NDArray[np.float32] = found.numpy()[:, -1].copy()
        return last

    def _send(self) -> None:
        """What changed since it was sent, to the device."""
        for name, array in self._arrays.items():
            if np.array_equal(array, self._sent[name]):
                continue
            if name in self._values:
                self._values[name].update_inplace(array)
                self._sent[name] = array.copy()
            else:
                self._bind(name, array)

    def _bind(self, name: str, array: NDArray[Any]) -> None:
        # ONNX Runtime copies to where the input is read, here and now: what is read on the CPU (a length that shapes
        # have) would not follow a tensor on the device. Not bind_cpu_input: that knows no inputs with defaults.
        value = self._values.get(name) or onnxruntime().OrtValue.ortvalue_from_numpy(array)
        self.binding.bind_ortvalue_input(name, value)
        self._sent[name] = array.copy()

    def _on_device(self, array: NDArray[Any]) -> Any:
        make: Callable[..., Any] = onnxruntime().OrtValue.ortvalue_from_numpy
        return make(array) if self._place.on_host else make(array, self._place.device, self._place.number)


def captured(
    opened: Any, artifact: Artifact, buffers: Buffers, settings: Mapping[str, NDArray[Any]], place: Place
) -> BoundStep:  # fmt: skip
    """A step of one token for all sequences, recorded as a CUDA graph.

    ONNX Runtime runs the graph more than once while it records. Planes do not mind, the same rows are written to the
    same places; guard state and statistics are put back.

    Args:
        opened: A session with shapes fixed to those of ``buffers``, its provider told to capture.
        artifact: As of ``BoundStep``, like the others.
        buffers: See there.
        settings: See there.
        place: See there.

    Raises:
        InputError: The vocabulary's size is not known beforehand.
    """
    step = BoundStep(opened, artifact, buffers, settings, place, (1, None), fixed=True)
    held = buffers.snapshot(GUARD)
    behind = np.full(buffers.batch, buffers.capacity - 1, np.int64)
    try:
        step.run(np.zeros((buffers.batch, 1), np.int64), behind)
    finally:
        buffers.restore(held)
    return step


def vocabulary(raw: Any, artifact: Artifact) -> int:
    """Size of the logits' last axis.

    Raises:
        InputError: The graph leaves it open.
    """
    shape = next(output.shape for output in raw.get_outputs() if output.name == artifact.logits)
    if not shape or not isinstance(shape[-1], int):
        raise InputError(
            f"the vocabulary of {artifact.logits!r} has no fixed size", where="OrtSession", fix="graph=False"
        )
    return int(shape[-1])
