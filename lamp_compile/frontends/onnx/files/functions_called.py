"""Model-local functions as a whole: none calls itself, and replacing calls by bodies does not explode."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from lamp_compile.frontends.onnx.files.limits import Limits, bad, shown

Key = tuple[str, str, str]


def check_calls(model: Any, limits: Limits, where: str) -> None:
    """Hold the functions of a model against recursion and against growth by inlining.

    Raises:
        InputError: Two functions of one name, a function that calls itself through others, or too many nodes in all.
    """
    calls: dict[Key, tuple[int, Counter[Key]]] = {}
    for function in model.functions:
        key = (function.domain, function.name, function.overload)
        if key in calls:
            raise bad(f"two functions {shown('.'.join(key[:2]))}", where, "give each its own name or overload")
        calls[key] = _count(function.node)
    sizes: dict[Key, int] = {}
    for key in calls:
        _size(key, calls, sizes, where)
    own, called = _count(model.graph.node)
    total = own + sum(sizes[key] * times for key, times in called.items() if key in sizes)
    if total > limits.inlined_nodes:
        raise bad(
            f"{total:.3g} nodes once function calls are replaced by their bodies",
            where,
            f"at most {limits.inlined_nodes:,} are read; read it with larger Limits(inlined_nodes=...) if you trust it",
        )


def _size(root: Key, calls: dict[Key, tuple[int, Counter[Key]]], sizes: dict[Key, int], where: str) -> None:
    """Nodes of a function with all calls inlined, without recursion of our own."""
    path: list[Key] = [root]
    while path:
        key = path[-1]
        missing = next((k for k in calls[key][1] if k in calls and k not in sizes), None)
        if missing is None:
            own, called = calls[key]
            sizes.setdefault(key, own + sum(sizes[k] * times for k, times in called.items() if k in sizes))
            path.pop()
        elif missing in path:
            names = " -> ".join(".".join(k[:2]) for k in [*path[path.index(missing) :], missing][:6])
            raise bad(f"functions call each other in a circle: {names}", where, "a function must not call itself")
        else:
            path.append(missing)


def _count(nodes: Iterable[Any]) -> tuple[int, Counter[Key]]:
    total, called = 0, Counter[Key]()
    waiting = [nodes]
    while waiting:
        for node in waiting.pop():
            total += 1
            called[(node.domain, node.op_type, node.overload)] += 1
            for attribute in node.attribute:
                if attribute.HasField("g"):
                    waiting.append(attribute.g.node)
                waiting.extend(graph.node for graph in attribute.graphs)
    return total, called
