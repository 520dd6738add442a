"""Tensors of a file: the bytes they declare against the bytes they have, in the file or beside it."""

from __future__ import annotations

import math
import os
import stat
from collections.abc import Sequence
from pathlib import Path, PureWindowsPath
from typing import TYPE_CHECKING, Any

from lamp_compile.frontends.onnx.files.limits import Limits, bad, shown

if TYPE_CHECKING:
    from onnx import SparseTensorProto, TensorProto

STRING = 8
BITS = {
    1: 32, 2: 8, 3: 8, 4: 16, 5: 16, 6: 32, 7: 64, 9: 8, 10: 16, 11: 64, 12: 32, 13: 64, 14: 64, 15: 128, 16: 16,
    17: 8, 18: 8, 19: 8, 20: 8, 21: 4, 22: 4, 23: 4, 24: 8, 25: 2, 26: 2, 27: 8, 28: 8,
}  # fmt: skip
"""Bits of one element, by ``TensorProto.DataType``. Strings (8) have no fixed size."""
_TYPED = {
    "float_data": (1, 14),
    "int32_data": (2, 3, 4, 5, 6, 9, 10, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28),
    "int64_data": (7,),
    "double_data": (11, 15),
    "uint64_data": (12, 13),
    "string_data": (STRING,),
}
_KEYS = ("location", "offset", "length", "checksum", "basepath")
_EXPORT = "export the model again"
_INSIDE = "keep the data in the model's own folder and name it by a relative path"


def check_shape(dims: Sequence[int], limits: Limits, where: str) -> int:
    """Elements of a declared shape, once it is plausible."""
    for size in dims:
        if not 0 <= size <= limits.dimension:
            raise bad(f"a dimension of {size:,}", where, f"0 to {limits.dimension:,}")
    # Zeros aside, so that [2^40, 2^40, 0] does not overflow whoever multiplies in 64 bits.
    if math.prod(size for size in dims if size) > limits.elements:
        raise bad(f"shape {list(dims)} declares more than {limits.elements:,} elements", where, _EXPORT)
    return math.prod(dims)


def check_tensor(tensor: TensorProto, limits: Limits, folder: Folder | None, where: str) -> None:
    """Hold a tensor's shape and type against its data; nothing is read from external files but their size."""
    kind = tensor.data_type
    if kind != STRING and kind not in BITS:
        raise bad(f"tensor of data type {kind}, which is none", where, _EXPORT)
    if tensor.HasField("segment"):
        raise bad("a tensor in segments", where, "no runtime reads these: " + _EXPORT)
    count = check_shape(tensor.dims, limits, where)
    # Who reads a tensor asks whether it has raw_data, not whether there is anything in it.
    filled = [name for name in _TYPED if len(getattr(tensor, name))]
    filled += ["raw_data"] if tensor.HasField("raw_data") else []
    if tensor.data_location == 1:
        if filled:
            raise bad(f"a tensor with external data and {filled[0]}", where, _EXPORT)
        locate(tensor, folder, where)
        return
    if tensor.external_data:
        raise bad("a tensor lists external data without saying that it is external", where, _EXPORT)
    if len(filled) > 1:
        raise bad(f"a tensor with both {filled[0]} and {filled[1]}", where, _EXPORT)
    held = filled[0] if filled else "raw_data"
    if held == "raw_data" and kind != STRING:
        has, needs, unit = len(tensor.raw_data), data_bytes(count, kind), "bytes"
    elif held == "raw_data" and not filled:
        has, needs, unit = 0, count, "strings"
    elif kind not in _TYPED.get(held, ()):
        raise bad(f"a tensor of data type {kind} with {held}", where, _EXPORT)
    else:
        has, unit = len(getattr(tensor, held)), f"values in {held}"
        needs = data_bytes(count, kind) if BITS.get(kind, 8) < 8 else count * (2 if kind in (14, 15) else 1)
    if has != needs:
        raise bad(f"shape {list(tensor.dims)} needs {needs:,} {unit}, the tensor has {has:,}", where, _EXPORT)


def data_bytes(count: int, kind: int) -> int:
    """Bytes of so many elements of a data type; elements of less than a byte are packed."""
    return (count * BITS[kind] + 7) // 8


def check_sparse(sparse: SparseTensorProto, limits: Limits, where: str) -> None:
    """A sparse tensor: its values, and indices of a shape that fits them. Nothing is made dense."""
    check_shape(sparse.dims, limits, where)
    for part in (sparse.values, sparse.indices):
        if part.data_location == 1:
            raise bad("a sparse tensor with external data", where, _EXPORT)
        check_tensor(part, limits, None, where)
    entries = list(sparse.values.dims)
    if len(entries) != 1 or sparse.indices.data_type != 7:
        raise bad("a sparse tensor whose values are no list, or indices no int64", where, _EXPORT)
    if list(sparse.indices.dims) not in (entries, [*entries, len(sparse.dims)]):
        raise bad(f"a sparse tensor of {entries[0]} values with indices {list(sparse.indices.dims)}", where, _EXPORT)


class Folder:
    """The folder of a model file, and which files in it external data may be."""

    def __init__(self, model: Path) -> None:
        self.model, self.root = model, Path(os.path.realpath(model.parent))
        self._sizes: dict[str, tuple[Path, int]] = {}

    def file(self, location: str, where: str) -> tuple[Path, int]:
        """The real path and size of an external file.

        Raises:
            InputError: Outside the folder (also by a symbolic link), the model itself, missing, or no regular file.
        """
        if location not in self._sizes:
            self._sizes[location] = self._find(location, where)
        return self._sizes[location]

    def _find(self, location: str, where: str) -> tuple[Path, int]:
        windows = PureWindowsPath(location)
        odd = not location or "\0" in location or "\\" in location or ":" in location or len(location) > 1024
        if odd or windows.drive or windows.root or os.path.isabs(location) or ".." in windows.parts:
            raise bad(f"external data at {shown(location)}, which is no plain relative path", where, _INSIDE)
        try:
            real = Path(os.path.realpath(self.root / location))
            found = real.stat()
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise bad(f"external data {shown(location)}: {reason}", where, "put the file beside the model") from None
        if not real.is_relative_to(self.root):
            raise bad(f"external data {shown(location)} is a link that leads out of the folder", where, _INSIDE)
        if not stat.S_ISREG(found.st_mode):
            raise bad(f"external data {shown(location)} is no regular file", where, _INSIDE)
        if os.path.exists(self.model) and os.path.samefile(real, self.model):
            raise bad(f"external data {shown(location)} is the model file itself", where, _EXPORT)
        return real, found.st_size


def locate(tensor: TensorProto, folder: Folder | None, where: str) -> tuple[Path, int, int]:
    """File, offset and length in bytes of a tensor's external data, all checked against the file's size."""
    entries: dict[str, str] = {}
    for entry in tensor.external_data:
        if entry.key in entries or entry.key not in _KEYS:
            raise bad(f"external data with a doubled or unknown key {shown(entry.key)}", where, _EXPORT)
        entries[entry.key] = entry.value
    if tensor.data_type == STRING:
        raise bad("external data of strings", where, _EXPORT)
    if folder is None:
        raise bad("external data, but the model has no folder", where, "read it from its file")
    needs = data_bytes(math.prod(tensor.dims), tensor.data_type)
    path, size = folder.file(entries.get("location", ""), where)
    offset, length = (_whole(entries.get(key), key, where) for key in ("offset", "length"))
    length = needs if length is None else length
    offset = offset or 0
    if length != needs:
        raise bad(f"shape {list(tensor.dims)} needs {needs:,} bytes, external data has {length:,}", where, _EXPORT)
    if offset + length > size:
        what = f"external data of bytes {offset:,} to {offset + length:,}, but {shown(path.name)} ends at {size:,}"
        raise bad(what, where, "the data file is cut short or belongs to another model: copy it again")
    return path, offset, length


def read_external(tensor: TensorProto, folder: Folder, where: str) -> bytes:
    """The bytes of a tensor's external data."""
    path, offset, length = locate(tensor, folder, where)
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
    try:
        with os.fdopen(os.open(path, flags), "rb") as file:
            file.seek(offset)
            data = file.read(length)
    except OSError as error:
        raise bad(f"external data {shown(path.name)}: {error.strerror}", where, "check the file") from None
    if len(data) != length:
        raise bad(f"external data {shown(path.name)} changed while it was read", where, "try again")
    return data


def _whole(text: str | None, key: str, where: str) -> int | None:
    if text is None or text == "":
        return None
    if not (text.isascii() and text.isdigit() and len(text) <= 18):
        raise bad(f"external data with {key} {shown(text)}", where, "a whole number")
    return int(text)


def tensors_of(attribute: Any) -> list[TensorProto]:
    """The dense tensors that an attribute holds."""
    return [*([attribute.t] if attribute.HasField("t") else []), *attribute.tensors]
