"""One site's part of a graph as short, stable text: for ``explain`` and golden tests."""

from __future__ import annotations

import operator
import re
import textwrap
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.fx import Graph, Node

from lamp_compile.passes._nodes import OPS, lamp_nodes
from lamp_compile.passes.patterns._dialect import aten, bind, read, schema_of, settings_of
from lamp_compile.passes.patterns._values import value

_READABLE = re.compile(r"^l_(self_|kwargs_|args_)?|(?<=_)(modules_|parameters_|buffers_)")
WRITES = (aten.copy_.default, "copy_")


def print_site(graph: Graph, site: str) -> str:
    """The ``lamp::`` nodes of a site, with the changeable tensors they read and the copies they feed."""
    nodes = list(lamp_nodes(graph, site).values())
    writes = [u for node in nodes for result in node.users for u in result.users if u.target in WRITES]
    return print_nodes(graph, {*nodes, *writes})


def print_nodes(graph: Graph, chosen: Iterable[Node]) -> str:
    """These nodes in graph order: ``name: dtype[shape] = operator(inputs)``, attributes on a line of their own.

    A ``lamp::`` node is called after what it computes.
    """
    wanted = set(chosen)
    return "\n".join(_line(node) for node in graph.nodes if node in wanted)


def _line(node: Node) -> str:
    inputs, attributes = _arguments(node)
    call = textwrap.fill(
        f"{_operator(node)}({', '.join(inputs)})", WIDTH, subsequent_indent="        ", break_long_words=False
    )
    shape = textwrap.fill(
        f"{_name(node)}: {_shape(value(node))}", WIDTH, subsequent_indent="    ", break_long_words=False
    )
    lines = [f"{shape} =", f"    {call}", *([f"    {' '.join(attributes)}"] if attributes else [])]
    return "\n".join(lines) if len(lines) > 2 or len(lines[0] + call) > WIDTH else f"{shape} = {call}"


def _operator(node: Node) -> str:
    if node.target in _SHORT:
        return f"lamp.{_SHORT[node.target]}"
    call = read(node)
    if call is not None:
        return call.op
    return str(getattr(node.target, "__name__", node.target)).split(".")[0]


def _arguments(node: Node) -> tuple[list[str], list[str]]:
    """Inputs by name where the operator has named ones, without those left out; attributes apart."""
    if node.target not in _SHORT:
        named = [f"{name}={_text(argument)}" for name, argument in node.kwargs.items() if argument is not None]
        return [*map(_text, node.args), *named], []
    given = {name: x for name, x in bind(node).items() if x is not None and name != "site"}
    attributes = settings_of(schema_of(node))
    inputs = [f"{name}={_text(x)}" for name, x in given.items() if name not in attributes]
    return inputs, [f"{name}={_text(x)}" for name, x in given.items() if name in attributes and x not in ("", 0, 0.0)]


def _text(argument: Any) -> str:
    if isinstance(argument, Node):
        return _name(argument)
    if isinstance(argument, tuple | list):
        return "[" + ", ".join(map(_text, argument)) + "]"
    return str(argument)


def _name(node: Node) -> str:
    if node.target in _SHORT:
        return _VALUES.get(_SHORT[node.target], "attention")
    if node.target is operator.getitem and isinstance(node.args[0], Node) and isinstance(node.args[1], int):
        return f"{_name(node.args[0])}.{node.args[1]}"
    return _READABLE.sub("", node.name).rstrip("_") if node.op == "placeholder" else node.name


def _shape(found: Any) -> str:
    if isinstance(found, tuple | list):
        return "(" + ", ".join(map(_shape, found)) + ")"
    if isinstance(found, Tensor):
        return f"{str(found.dtype).removeprefix('torch.')}[{', '.join(map(str, found.shape))}]"
    return type(found).__name__


WIDTH = 108
_VALUES = {
    "quantize": "planes",
    "predict": "predicted",
    "look_ahead": "importance",
    "arbitrate": "arbitrated",
    "select": "levels",
    "attend": "attended",
    "guard": "guarded",
    "audit": "audited",
    "fused_predicted": "attended",
    "fused_attention": "attended",
}
_SHORT: dict[Any, str] = {target: name for name, target in OPS.items()}
