"""Shapes and dtypes of nodes, and new nodes that carry theirs.

Dynamo keeps a node's fake value in ``meta["example_value"]``, torch.export in ``meta["val"]``.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.fx.node import map_arg

from lamp_compile.errors import PassError

KEYS = ("val", "example_value")
_KEPT = ("nn_module_stack", "stack_trace", "source_fn_stack", "torch_fn")


def value(node: Any) -> Any:
    """The fake value of a node; anything else stands for itself."""
    if not isinstance(node, Node):
        return node
    for key in KEYS:
        if key in node.meta:
            return node.meta[key]
    return None


def tensor(node: Any) -> Tensor | None:
    """The fake tensor of a node, or None when it is not one."""
    found = value(node)
    return found if isinstance(found, Tensor) and isinstance(node, Node) else None


def same(a: Any, b: Any) -> bool:
    """Whether two sizes are known to be equal, without adding a guard."""
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    return bool(statically_known_true(a == b))


def same_shape(a: Tensor, b: Tensor) -> bool:
    """Whether two shapes are known to be equal."""
    return a.dim() == b.dim() and all(same(x, y) for x, y in zip(a.shape, b.shape, strict=True))


def fake_mode(graph: Graph) -> FakeTensorMode | None:
    """The fake mode of the graph's own values (the tracing context's mode can be another object)."""
    for node in graph.nodes:
        for key in KEYS:
            if isinstance(node.meta.get(key), FakeTensor):
                return node.meta[key].fake_mode  # type: ignore[no-any-return]
    return None


def value_key(graph: Graph) -> str:
    """Where this graph's nodes keep their values."""
    return next((key for key in KEYS for node in graph.nodes if key in node.meta), "val")


class Emitter:
    """Adds nodes just before ``anchor``, each with its value; they can be taken back.

    Args:
        anchor: New nodes go before it and inherit its module path and stack trace.
    """

    def __init__(self, anchor: Node) -> None:
        self.anchor = anchor
        self.made: list[Node] = []
        self._place = anchor
        self._mode = fake_mode(anchor.graph)
        self._key = value_key(anchor.graph)

    def call(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        """A ``call_function`` node of ``target`` (an operator overload), with its value filled in.

        Raises:
            PassError: The operator refuses these shapes or dtypes.
        """
        with self.anchor.graph.inserting_before(self.anchor):
            node = self.anchor.graph.call_function(target, args, kwargs)
        self.made.append(node)
        for key in _KEPT:
            if key in self._place.meta:
                node.meta[key] = self._place.meta[key]
        try:
            node.meta[self._key] = self._evaluate(node)
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            raise PassError(
                f"{target} cannot take these arguments: {error}",
                where=str(self.anchor),
                fix="please report it with this program",
            ) from error
        return node

    @property
    def specialises(self) -> bool:
        """Whether asking a symbolic size for its number adds a guard (Dynamo), or breaks a promise (export)."""
        return self._key == "example_value"

    def before(self, anchor: Node) -> None:
        """Put the following nodes before another anchor."""
        self.anchor = self._place = anchor

    def inherit(self, place: Node) -> None:
        """Take module path and stack trace from another node than the anchor."""
        self._place = place

    def undo(self) -> None:
        """Remove the nodes made so far that nobody uses."""
        for node in reversed(self.made):
            if not node.users:
                node.graph.erase_node(node)
        self.made.clear()

    def _evaluate(self, node: Node) -> Any:
        def concrete(argument: Node) -> Any:
            found = value(argument)
            if isinstance(found, Tensor) and not isinstance(found, FakeTensor) and self._mode is not None:
                return self._mode.from_tensor(found)
            return found

        args, kwargs = map_arg(node.args, concrete), map_arg(node.kwargs, concrete)
        assert callable(node.target)
        with self._mode or contextlib.nullcontext(), torch.no_grad():
            return node.target(*args, **kwargs)
