"""The neutral form that every reader produces: nodes with operands, attributes and bodies; types with symbolic sizes.

Ids of values are the reader's own (names in the file); nothing of them is left in a snapshot. Imports no torch, no
onnx.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

DEEPEST = 64
"""Bodies in bodies; deeper files are refused."""


@dataclass(frozen=True)
class Ref:
    """A value by its reader's id, inside the text of an argument."""

    id: str


Text = tuple["str | Ref", ...]
"""Literal text and values: ``("[", Ref("s"), ", 16]")``."""
Size = "int | str | tuple[Any, ...]"
"""A number, a symbol, or (operator, operand, ...)."""


@dataclass(frozen=True)
class Type:
    """Element type and sizes. ``sizes`` None = unknown rank; an unknown size is ``"?"``."""

    dtype: str
    sizes: tuple[Any, ...] | None = None


@dataclass
class Node:
    """One operation.

    ``arguments`` hold values (and text between them) in the order of the operator's signature, ``attributes`` text
    only.
    ``effect`` is set where the operation does something besides its outputs (writes in place, asserts): such nodes stay
    without a user, in the order of these words.
    """

    op: str
    arguments: list[tuple[str, Text]]
    attributes: dict[str, str]
    outputs: list[str]
    types: list[Type | None]
    scope: str = ""
    bodies: list[tuple[str, Graph]] = field(default_factory=list)
    effect: str = ""


@dataclass
class Graph:
    """A list of nodes in any valid order; ``results`` are its outputs."""

    inputs: list[str]
    nodes: list[Node]
    results: list[Text]


@dataclass(frozen=True)
class Function:
    """A model-local function. ``names`` of its inputs are a comment: they are passed by position."""

    name: str
    graph: Graph
    names: tuple[str, ...]
    attributes: Mapping[str, str]
    opsets: tuple[str, ...]


@dataclass(frozen=True)
class Param:
    """A weight or buffer by its path. ``value`` is a literal, a hash, or empty where values are not compared."""

    path: str
    type: Type
    value: str = ""


@dataclass
class Program:
    """One graph with what belongs to it.

    ``kind`` is "onnx", "torch" or "plan". ``params`` by value id; ``constants`` by value id, as literal text.
    ``ranges`` are
    limits of symbols. ``sites`` maps the name of an attention site to its precision settings. ``notes`` say what was
    not
    read; ``versions`` are not compared.
    """

    kind: str
    graph: Graph | None = None
    inputs: list[tuple[str, str, Type | None]] = field(default_factory=list)
    """(value id, public name, type)."""
    outputs: list[tuple[str, Type | None]] = field(default_factory=list)
    """(public name, type), as ``graph.results``."""
    params: dict[str, Param] = field(default_factory=dict)
    constants: dict[str, str] = field(default_factory=dict)
    functions: list[Function] = field(default_factory=list)
    ranges: dict[str, tuple[int | None, int | None]] = field(default_factory=dict)
    facts: dict[str, str] = field(default_factory=dict)
    sites: dict[str, dict[str, Any]] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
