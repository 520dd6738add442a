"""Tensors, types and attributes of ONNX as text."""

from __future__ import annotations

import json
from functools import cache
from typing import TYPE_CHECKING, Any

from lamp_compile.diff import literals
from lamp_compile.diff.graph import Type
from lamp_compile.errors import InputError

if TYPE_CHECKING:
    from lamp_compile.frontends.onnx.files.reading import Folder

_NAMED = ("to", "dtype", "softmax_precision", "stash_type", "output_dtype")
"""Attributes that hold an element type."""


def dtype(number: int) -> str:
    """The name of an element type: ``float32``, ``bfloat16``."""
    from onnx import TensorProto

    try:
        name = str(TensorProto.DataType.Name(number)).lower()
    except ValueError:
        return f"type{number}"
    return {"float": "float32", "double": "float64", "float8e4m3fn": "float8_e4m3fn"}.get(name, name)


def type_of(info: Any) -> Type | None:
    """Of a ValueInfoProto; None where it says nothing."""
    kind = info.type.WhichOneof("value") if info.HasField("type") else None
    if kind is None:
        return None
    if kind != "tensor_type":
        return Type(kind.removesuffix("_type"))
    tensor = info.type.tensor_type
    if not tensor.HasField("shape"):
        return Type(dtype(tensor.elem_type))
    sizes = tuple(
        d.dim_value if d.HasField("dim_value") else (d.dim_param if d.dim_param else "?") for d in tensor.shape.dim
    )
    return Type(dtype(tensor.elem_type), sizes)


def literal(item: Any, folder: Folder | None, values: bool = True, always: bool = False) -> tuple[str, bool]:
    """A TensorProto as text, and whether it was written out in full. ``always`` raises where the bytes are missing."""
    sizes = tuple(item.dims)
    count = 1
    for size in sizes:
        count *= size
    if item.data_location == item.EXTERNAL:
        text = _external(item, folder)
        if text is None:
            if always:
                raise InputError(
                    f"the values of {item.name} are in another file", where="--weights", fix="a file on disk, not bytes"
                )
            text = "#external"
        return literals.tensor(dtype(item.data_type), sizes, None, None) + text, False
    if item.data_type == item.STRING:
        data = b"\0".join(item.string_data)
        return literals.tensor("string", sizes, None, data), False
    array = _array(item)
    if values and count <= literals.MOST_INLINE:
        listed = [_python(x) for x in array.reshape(-1)]
        return literals.tensor(dtype(item.data_type), sizes, listed, None), True
    return literals.tensor(dtype(item.data_type), sizes, None, array.tobytes()), False


def _array(item: Any) -> Any:
    from onnx import numpy_helper

    try:
        return numpy_helper.to_array(item)
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(
            f"the values of {item.name or 'a tensor'} do not fit its shape: {error}", where="initializer",
            fix="check the model with onnx.checker",
        ) from None  # fmt: skip


def _python(x: Any) -> Any:
    """A NumPy scalar as a Python number that prints in its own precision."""
    if getattr(x, "dtype", None) is not None and x.dtype.kind == "f" and x.dtype.itemsize < 8:
        return float(str(x))
    got = x.item() if hasattr(x, "item") else x
    return got if isinstance(got, bool | int | float) else float(got) if not isinstance(got, complex) else str(got)


def _external(item: Any, folder: Folder | None) -> str | None:
    """Hash of external data, which is read from inside the folder only; None without a folder."""
    if folder is None:
        return None
    from lamp_compile.frontends.onnx.files.reading import read_external

    return literals.digest(read_external(item, folder, f"external data of {item.name}"))


def attribute(item: Any, folder: Folder | None) -> str:
    """An attribute's value as text."""
    from onnx import AttributeProto as A

    if item.ref_attr_name:
        return f"@{item.ref_attr_name}"
    if item.type == A.TENSOR:
        return literal(item.t, folder)[0]
    if item.type == A.INT:
        return dtype(item.i) if item.name in _NAMED else str(item.i)
    if item.type == A.FLOAT:
        return literals.number(_single(item.f))
    if item.type == A.STRING:
        return json.dumps(item.s.decode("utf-8", "backslashreplace"))
    if item.type == A.INTS:
        return f"[{', '.join(map(str, item.ints))}]"
    if item.type == A.FLOATS:
        return f"[{', '.join(literals.number(_single(x)) for x in item.floats)}]"
    if item.type == A.STRINGS:
        return f"[{', '.join(json.dumps(s.decode('utf-8', 'backslashreplace')) for s in item.strings)}]"
    if item.type == A.TENSORS:
        return f"[{', '.join(literal(t, folder)[0] for t in item.tensors)}]"
    return literals.digest(item.SerializeToString(deterministic=True))


def constant(item: Any, folder: Folder | None) -> str:
    """The attribute of a Constant node as a tensor's text, as an initialiser of the same value reads."""
    from onnx import AttributeProto as A

    if item.type == A.FLOAT:
        return literals.tensor("float32", (), [_single(item.f)], None)
    if item.type == A.INT:
        return literals.tensor("int64", (), [item.i], None)
    if item.type == A.INTS and len(item.ints) <= literals.MOST_INLINE:
        return literals.tensor("int64", (len(item.ints),), list(item.ints), None)
    if item.type == A.FLOATS and len(item.floats) <= literals.MOST_INLINE:
        return literals.tensor("float32", (len(item.floats),), [_single(x) for x in item.floats], None)
    if item.type == A.TENSOR:
        return literal(item.t, folder)[0]
    return f"constant{attribute(item, folder)}"


def _single(x: float) -> float:
    """A float32 as the shortest decimal that gives it back."""
    import numpy as np

    return float(str(np.float32(x)))


@cache
def _schema_defaults(domain: str, op: str, version: int) -> tuple[tuple[str, str], ...]:
    from onnx import defs

    try:
        schema = defs.get_schema(op, version, domain)
    except defs.SchemaError:
        return ()
    return tuple(
        (name, attribute(a.default_value, None)) for name, a in schema.attributes.items() if a.default_value.type
    )


def schema_defaults(domain: str, op: str, version: int) -> dict[str, str]:
    """What attributes are when they are left out; nothing for operators that onnx does not know."""
    return dict(_schema_defaults(domain, op, version))
