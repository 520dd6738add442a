"""One site's part of a graph as short, stable text: for ``explain`` and golden tests."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.fx import Graph, Node

from lamp_compile.passes._nodes import lamp_nodes
from lamp_compile.passes.patterns._dialect import aten, read
from lamp_compile.passes.patterns._values import value


def print_site(graph: Graph, site: str) -> str:
    """The ``lamp::`` nodes of a site, with the changeable tensors they read and the copies they feed."""
    nodes = list(lamp_nodes(graph, site).values())
    writes = [u for node in nodes for result in node.users for u in result.users if u.target is aten.copy_.default]
    return print_nodes(graph, {*nodes, *writes})


def print_nodes(graph: Graph, chosen: Iterable[Node]) -> str:
    """These nodes in graph order, one per line: ``name: dtype[shape] = operator(inputs, attribute=...)``."""
    wanted = set(chosen)
    lines = [f"{_name(node)}: {_shape(value(node))} = {_call(node)}" for node in graph.nodes if node in wanted]
    return "\n".join(lines)


def _call(node: Node) -> str:
    call = read(node)
    target = str(node.target)
    op = target.replace(".default", "") if target.startswith("lamp.") or call is None else call.op
    op = (
        getattr(node.target, "__name__", op)
        if call is None and callable(node.target) and not target.startswith(("lamp.", "aten."))
        else op
    )
    arguments = [_text(argument) for argument in node.args]
    arguments += [f"{name}={_text(argument)}" for name, argument in node.kwargs.items()]
    return f"{op}({', '.join(arguments)})"


def _text(argument: Any) -> str:
    if isinstance(argument, Node):
        return _name(argument)
    if isinstance(argument, tuple | list):
        return "[" + ", ".join(map(_text, argument)) + "]"
    return repr(argument)


def _name(node: Node) -> str:
    if node.target is operator.getitem and isinstance(node.args[0], Node) and isinstance(node.args[1], int):
        return f"{_name(node.args[0])}.{node.args[1]}"
    return node.name


def _shape(found: Any) -> str:
    if isinstance(found, tuple | list):
        return "(" + ", ".join(map(_shape, found)) + ")"
    if isinstance(found, Tensor):
        return f"{str(found.dtype).removeprefix('torch.')}[{', '.join(map(str, found.shape))}]"
    return type(found).__name__
