"""Both sides run on the same random inputs, output by output."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lamp_compile.diff.compare import Change
from lamp_compile.diff.inputs import kind_of
from lamp_compile.diff.snapshot import Snapshot
from lamp_compile.errors import InputError

FIRST_AXIS, OTHER_AXIS = 2, 40
"""Sizes for symbols that nothing limits: where they stand first in a shape, and elsewhere."""
LARGEST_INTEGER = 8
"""Integer inputs are below: they may be token ids of a small vocabulary."""
MOST_VALUES = 2**28
Arrays = Mapping[str, Any]


def compare(
    a: tuple[Any, Snapshot], b: tuple[Any, Snapshot], seed: int, tolerance: float, sizes: Mapping[str, int]
) -> tuple[list[Change], list[str]]:  # fmt: skip
    """Changes beyond the tolerance, and a note with the numbers of each output.

    Raises:
        InputError: A side cannot be run: a plan or snapshot, a missing package, an operator without a kernel.
    """
    runs = [_runner(thing, found) for thing, found in (a, b)]
    if list(a[1].inputs) != list(b[1].inputs):
        raise InputError(
            f"inputs are {', '.join(a[1].inputs)} and {', '.join(b[1].inputs)}",
            where="--numerics",
            fix="graphs with the same inputs",
        )
    inputs = random_inputs(a[1], seed, sizes)
    results = [run(inputs) for run in runs]
    changes, notes = [], []
    names = list(results[0])
    others = names if set(names) == set(results[1]) else list(results[1])
    if len(names) != len(others):
        raise InputError(
            f"{len(names)} outputs and {len(others)}", where="--numerics", fix="graphs with as many outputs"
        )
    for name, other in zip(names, others, strict=True):
        text, beyond = _difference(np.asarray(results[0][name]), np.asarray(results[1][other]), tolerance)
        if beyond:
            changes.append(Change("numerics", name, name, f"output {name}: {text}"))
        else:
            notes.append(f"numbers: output {name}: {text}")
    return changes, notes


def random_inputs(found: Snapshot, seed: int, sizes: Mapping[str, int]) -> dict[str, Any]:
    """An array for each declared input: normal floats, small integers, fair booleans. Each has its own stream by name.

    Raises:
        InputError: A type or size is unknown.
        OptionError: A size is given that no input has.
    """
    from lamp_compile.diff import sizes as parsing

    table = parsing.choose(found, sizes, FIRST_AXIS, OTHER_AXIS)
    made = {}
    for name, text in found.inputs.items():
        dtype, shape = parsing.shape(text, table, name)
        stream = int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:8], "little")
        rng = np.random.default_rng(stream)
        if int(np.prod(shape, dtype=np.float64)) > MOST_VALUES:
            raise InputError(
                f"input {name} would have more than {MOST_VALUES:,} values", where="--numerics", fix="--size"
            )
        made[name] = _random(dtype, shape, rng, name)
    return made


def _random(dtype: str, shape: tuple[int, ...], rng: np.random.Generator, name: str) -> Any:
    if dtype in ("float32", "float64", "float16"):
        return rng.standard_normal(shape).astype(dtype)
    if dtype == "bool":
        return rng.random(shape) < 0.5
    if dtype in ("int64", "int32", "int16", "int8", "uint8", "uint16", "uint32", "uint64"):
        return rng.integers(0, LARGEST_INTEGER, shape).astype(dtype)
    if dtype == "bfloat16":
        import ml_dtypes

        return rng.standard_normal(shape).astype(ml_dtypes.bfloat16)
    raise InputError(f"input {name} is {dtype}", where="--numerics", fix="float, integer or boolean inputs")


def _difference(a: Any, b: Any, tolerance: float) -> tuple[str, bool]:
    """In words, and whether it is beyond the tolerance."""
    if a.shape != b.shape:
        return f"shape {a.shape} -> {b.shape}", True
    x, y = a.astype(np.float64), b.astype(np.float64)
    finite = np.isfinite(x) & np.isfinite(y)
    odd = int((~(finite | (x == y) | (np.isnan(x) & np.isnan(y)))).sum())
    error = np.abs(np.where(finite, x - y, 0.0))
    largest = float(np.abs(np.where(finite, x, 0.0)).max(initial=0.0))
    worst = float(error.max(initial=0.0))
    relative = worst / largest if largest else worst
    text = f"largest difference {worst:.3g}, {relative:.3g} of the largest value"
    text += f"; {odd} values are NaN or infinite on one side only" if odd else ""
    return text, bool(odd) or relative > tolerance


def _runner(thing: Any, found: Snapshot) -> Callable[[Arrays], dict[str, Any]]:
    """How one side is run."""
    if found.kind == "plan" or not found.blocks or isinstance(thing, Snapshot):
        raise InputError("a plan or snapshot cannot be run", where="--numerics", fix="the graph itself on both sides")
    if isinstance(thing, str | Path):
        path = Path(thing)
        kind = kind_of(path)
        if kind == "snapshot":
            raise InputError(
                "a snapshot cannot be run", where=f"--numerics, {path}", fix="the graph itself on both sides"
            )
        if kind == "torch":
            from lamp_compile.diff.run_pt2 import run_archive

            return lambda inputs: run_archive(path, inputs)
        return lambda inputs: _onnx(path, found, inputs)
    if found.kind == "onnx":
        return lambda inputs: _onnx(thing, found, inputs)
    from lamp_compile.diff.run_torch import run_program

    return lambda inputs: run_program(thing, inputs)


def _onnx(model: Any, found: Snapshot, inputs: Arrays) -> dict[str, Any]:
    import onnxruntime as ort

    ort.disable_telemetry_events()
    options = ort.SessionOptions()
    options.log_severity_level = 3
    source = str(model) if isinstance(model, Path) else model.SerializeToString()
    where = source if isinstance(model, Path) else "model"
    try:
        session = ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        given = {i.name: inputs[i.name] for i in session.get_inputs() if i.name in inputs}
        names = [o.name for o in session.get_outputs()]
        return dict(zip(names, session.run(names, given), strict=True))
    except Exception as error:
        if isinstance(error, MemoryError):
            raise
        raise InputError(
            f"ONNX Runtime cannot run it: {str(error).splitlines()[0][:300]}", where=f"--numerics, {where}",
            fix="check the model, or other sizes: --size d1=64",
        ) from None  # fmt: skip
