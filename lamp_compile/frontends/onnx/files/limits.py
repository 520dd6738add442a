"""What a file may hold before it is refused, and the error that says so. Imports no onnx."""

from __future__ import annotations

from dataclasses import dataclass

from lamp_compile.errors import InputError

KNOWN_DOMAINS = (
    "",
    "ai.onnx",
    "ai.onnx.ml",
    "ai.onnx.preview",
    "ai.onnx.preview.training",
    "ai.onnx.training",
    "ai.lamp",
    "com.microsoft",
    "com.microsoft.nchwc",
    "com.microsoft.extensions",
    "com.ms.internal.nhwc",
    "pkg.onnxscript.torch_lib",
    "pkg.onnxscript.torch_lib.common",
)
"""Domains whose operators somebody documents; a domain of the file's own functions is known besides."""


@dataclass(frozen=True)
class Limits:
    """Bounds on what a file may make its reader allocate or walk. Real models stay far below the defaults."""

    file_bytes: int = 2**31 - 1
    """Of the model file; protobuf ends there, larger weights are external."""
    messages: int = 4_000_000
    """Protobuf messages: each costs some hundred bytes once parsed, whatever it took in the file."""
    message_depth: int = 64
    """Messages inside messages; a subgraph is three of them."""
    inlined_nodes: int = 20_000_000
    """Nodes once every function call is replaced by its body."""
    dimension: int = 2**40
    """One declared dimension."""
    elements: int = 2**48
    """Elements that one shape declares."""


def bad(what: str, where: str, fix: str) -> InputError:
    """An error about a file's content."""
    return InputError(what, where=where, fix=fix)


def shown(name: str, most: int = 80) -> str:
    """A name from the file, quoted, escaped and cut, fit for a message."""
    return repr(name if len(name) <= most else name[: most - 3] + "...")
