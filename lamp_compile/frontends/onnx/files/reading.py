"""Read ONNX files from anywhere: walked as bytes, parsed, and checked before other code sees them.

onnx's own checker and shape inference are C++ that trusts its input more than a file deserves; nothing reaches them
before it has passed here. Memory stays within a small multiple of the file's size, time within a linear walk of it.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lamp_compile.errors import InputError, LampError
from lamp_compile.frontends.onnx.files.limits import Limits, bad
from lamp_compile.frontends.onnx.files.tensors import Folder, read_external, tensors_of
from lamp_compile.frontends.onnx.files.validate import check_model
from lamp_compile.frontends.onnx.files.wire import scan

if TYPE_CHECKING:
    from onnx import ModelProto, TensorProto

__all__ = ["Folder", "Limits", "all_tensors", "check", "internalise", "load", "parse", "read_external", "read_file"]
_INSTALL = "pip install 'lamp_compile[onnx-cpu]'"


def load(
    path: str | os.PathLike[str],
    *,
    external_data: bool = False,
    domains: Collection[str] = (),
    limits: Limits | None = None,
) -> ModelProto:
    """Read a model file that may be damaged or hostile.

    Args:
        path: A binary ONNX file.
        external_data: Read external tensors into the model. Left out, they stay references, checked against the size
        of their file; ``read_external`` reads one of them.
        domains: Operator domains to accept besides those that are known and the file's own functions; ``"*"`` is any.
        limits: Bounds on size, depth and number.

    Raises:
        InputError: Missing, truncated, malformed or too large; external data outside the model's folder (absolute,
            ``..``, a link), in the model itself or of another size than declared; a cycle, a function that calls
            itself, values undefined or defined twice, shapes that do not match data, unknown operators or opsets.
        LampError: The onnx package is not installed.
    """
    file = Path(path)
    limits = limits or Limits()
    folder = Folder(file)
    model = parse(read_file(file, limits.file_bytes), str(file), domains=domains, limits=limits, folder=folder)
    if external_data:
        for tensor in all_tensors(model):
            if tensor.data_location == 1:
                internalise(tensor, folder, str(file))
    return model


def internalise(tensor: TensorProto, folder: Folder, where: str) -> None:
    """Read external data into its tensor.

    Raises:
        InputError: As ``load``.
    """
    tensor.raw_data = read_external(tensor, folder, where)
    tensor.ClearField("data_location")
    tensor.ClearField("external_data")


def parse(
    data: bytes,
    where: str = "model",
    *,
    domains: Collection[str] = (),
    limits: Limits | None = None,
    folder: Folder | None = None,
) -> ModelProto:
    """The same from bytes. Without a folder, external data is refused.

    Raises:
        InputError, LampError: As ``load``.
    """
    onnx = _onnx()
    from google.protobuf.message import DecodeError

    limits = limits or Limits()
    if not data:
        raise bad("an empty file", where, "copy or export it again")
    scan(data, onnx.ModelProto.DESCRIPTOR, limits, where)
    model = onnx.ModelProto()
    try:
        model.ParseFromString(data)
    except DecodeError as error:
        raise bad(f"no ONNX model: {error}", where, "the file is damaged or of another format") from None
    check_model(model, where, limits, domains, folder)
    return model  # type: ignore[no-any-return]


def check(
    model: ModelProto,
    where: str = "model",
    *,
    domains: Collection[str] = (),
    limits: Limits | None = None,
    folder: Folder | None = None,
) -> None:
    """Hold a model that is in memory already to what ``load`` demands of a file.

    Raises:
        InputError: As ``load``.
    """
    check_model(model, where, limits or Limits(), domains, folder)


def read_file(path: Path, most: int) -> bytes:
    """The bytes of a regular file of at most so many.

    Raises:
        InputError: Missing, unreadable, a folder or device, too large.
    """
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        with os.fdopen(os.open(path, flags), "rb") as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode):
                raise bad("no regular file", str(path), "name a model file")
            if found.st_size > most:
                raise bad(f"{found.st_size:,} bytes, more than {most:,}", str(path), "keep weights as external data")
            return file.read(most + 1)[: most + 1]
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        reason = getattr(error, "strerror", None) or str(error)
        raise bad(f"cannot be read: {reason}", str(path), "name a model file") from None


def all_tensors(model: ModelProto) -> Iterator[TensorProto]:
    """Every dense tensor of a model: initializers and attributes, of subgraphs and functions too."""
    nodes: list[Any] = [model.graph.node, *(function.node for function in model.functions)]
    yield from model.graph.initializer
    while nodes:
        for node in nodes.pop():
            for attribute in node.attribute:
                yield from tensors_of(attribute)
                for graph in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                    yield from graph.initializer
                    nodes.append(graph.node)


def _onnx() -> Any:
    try:
        import onnx
    except ModuleNotFoundError:
        raise LampError("the package onnx is not installed", where="reading an ONNX file", fix=_INSTALL) from None
    return onnx
