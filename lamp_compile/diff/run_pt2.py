"""A ``.pt2`` archive run without loading it: its calls one by one, operators of ``aten`` and ``lamp`` only.

``torch.export.load`` would unpickle and evaluate what the file says.
"""

from __future__ import annotations

import operator
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lamp_compile.diff.graph import Graph, Ref
from lamp_compile.diff.readers import pt2
from lamp_compile.diff.readers.pt2_archive import Archive
from lamp_compile.diff.readers.torch_calls import Call, Word, overload
from lamp_compile.diff.run_torch import named, tensor
from lamp_compile.errors import InputError

_REFUSED = ("from_file", "_print", "warn")
_ARITHMETIC: Mapping[str, Callable[..., Any]] = {
    name: getattr(operator, name)
    for name in (
        "add",
        "sub",
        "mul",
        "floordiv",
        "mod",
        "truediv",
        "neg",
        "pow",
        "eq",
        "ne",
        "lt",
        "le",
        "gt",
        "ge",
        "getitem",
    )
} | {"and_": operator.and_, "or_": operator.or_, "not_": operator.not_}


def run_archive(path: Path, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Outputs as ``output.0`` and so on.

    Raises:
        InputError: It is no archive, holds what is not run from a file, or does not run on these inputs.
    """
    with zipfile.ZipFile(path) as opened:
        archive = Archive(opened, str(path))
        data = archive.model()
        values = {name: tensor(value) for name, value in inputs.items()}
        calls, results, kinds = pt2.calls(data)
        for id_, (kind, name) in kinds.items():
            if kind == "constant":
                values[id_] = name
            elif kind != "user_input":
                values[id_] = _held(archive, name, path)
    with torch.no_grad():
        for call in calls:
            _step(call, values, path)
        return named([_filled(item, values) for item in results])


def _held(archive: Archive, name: str, path: Path) -> Tensor:
    found = archive.values(name, archive.folder(name))
    if found is None:
        raise InputError(f"{name} is pickled", where=f"--numerics, {path}", fix="the program in memory, through Python")
    dtype, sizes, data = found
    held = (
        torch.frombuffer(bytearray(data), dtype=getattr(torch, dtype))
        if data
        else torch.empty(0, dtype=getattr(torch, dtype))
    )
    return held.reshape(sizes)


def _step(call: Call, values: dict[str, Any], path: Path) -> None:
    try:
        got = _function(call, path)(call, values)
    except (RuntimeError, TypeError, ValueError, IndexError, KeyError, NotImplementedError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"{call.op} does not run on these inputs: {(str(error).splitlines() or [''])[0][:300]}",
            where=f"--numerics, {path}", fix="other sizes, such as --size d1=64",
        ) from None  # fmt: skip
    several = list(got) if isinstance(got, tuple | list) else [got]
    values |= {name: value for name, value in zip(call.outputs, several, strict=False) if name}


def _function(call: Call, path: Path) -> Callable[[Call, Mapping[str, Any]], Any]:
    family, _, rest = call.op.partition(".")
    if family == "operator" and rest in _ARITHMETIC:
        return lambda call, values: _ARITHMETIC[rest](*(_filled(v, values) for _, v in call.arguments))
    found = overload(call.op)
    if family not in ("aten", "lamp") or found is None or rest.split(".")[0] in _REFUSED:
        raise InputError(
            f"{call.op} is not run from a file", where=f"--numerics, {path}",
            fix="the program in memory: lamp_compile.compare(a, b, numerics=True)",
        )  # fmt: skip
    # By name: an archive leaves arguments out that have their default, also between others.
    return lambda call, values: found(**{name: _filled(v, values) for name, v in call.arguments})


def _filled(x: Any, values: Mapping[str, Any]) -> Any:
    if isinstance(x, Ref):
        return values[x.id]
    if isinstance(x, list):
        return [_filled(item, values) for item in x]
    if isinstance(x, Word):
        text = x.text.partition(":")[0]
        if text in ("cpu", "cuda", "meta", "xpu", "mps"):
            return torch.device("cpu")
        found = getattr(torch, text, None)
        if not isinstance(found, torch.dtype | torch.layout | torch.memory_format):
            raise ValueError(f"unknown word {x.text!r}")
        return found
    if isinstance(x, Graph | dict):
        raise ValueError("control flow is not run from a file")
    return x
