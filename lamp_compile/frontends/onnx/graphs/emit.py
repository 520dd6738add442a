"""New nodes of the standard's operators for one site, made before the rewrite decides to keep them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from lamp_compile.frontends.onnx.graphs.graph import Dims, Graph
from lamp_compile.frontends.onnx.graphs.sites import BOOL, INT64
from lamp_compile.passes.patterns._base import Refuse

if TYPE_CHECKING:
    from onnx import NodeProto


class Emitter:
    """Makes nodes that will go before a site's root. They are known to the graph's index at once.

    Args:
        graph: The graph they will be part of.
        prefix: What names of new values and nodes start with.
    """

    def __init__(self, graph: Graph, prefix: str) -> None:
        self.graph, self.prefix = graph, prefix
        self.made: list[NodeProto] = []
        self.following: list[NodeProto] = []
        self._list = self.made

    def follow(self) -> None:
        """Put what is made from now on behind the site's own node."""
        self._list = self.following

    def call(self, operator: str, *inputs: str, domain: str = "", out: str = "", **attributes: Any) -> str:
        """A node with one output, whose name is given back (``out`` names it)."""
        from onnx import helper

        name = out or self.graph.fresh(f"{self.prefix}/{operator.lower()}")
        label = self.graph.fresh(f"{self.prefix}/{operator.lower()}") if out else name
        node = helper.make_node(operator, list(inputs), [name], name=label, domain=domain, **attributes)
        self._list.append(node)
        if not out:
            self.graph.makers[name] = node
        return name

    def constant(self, value: Any, element: int = INT64) -> str:
        """A Constant node; a list becomes one axis, a number none."""
        from onnx import helper, numpy_helper

        array = np.asarray(value, helper.tensor_dtype_to_np_dtype(element))
        return self.call("Constant", value=numpy_helper.from_array(array))

    def unsqueeze(self, x: str, *axes: int) -> str:
        """New axes of size 1."""
        if self.graph.opset < 13:
            return self.call("Unsqueeze", x, axes=list(axes))
        return self.call("Unsqueeze", x, self.constant(list(axes)))

    def cast(self, x: str, element: int) -> str:
        """The value in another element type."""
        return x if self.graph.dtype(x) == element else self.call("Cast", x, to=element)

    def transpose(self, x: str, *order: int) -> str:
        """Axes in another order."""
        return x if list(order) == sorted(order) else self.call("Transpose", x, perm=list(order))

    def size(self, x: str, axis: int) -> str:
        """One size of a value, as a list of one int64: a constant where it is known."""
        dims: Dims | None = self.graph.dims(x)
        if dims is not None and not -len(dims) <= axis < len(dims):
            raise Refuse(f"a value has {len(dims)} axes where more are needed")
        if dims is not None and isinstance(dims[axis], int):
            return self.constant([dims[axis]])
        return self.call("Gather", self.call("Shape", x), self.constant([axis]), axis=0)

    def squeeze(self, x: str, axis: int, out: str = "") -> str:
        """The value without an axis of size 1."""
        if self.graph.opset < 13:
            return self.call("Squeeze", x, out=out, axes=[axis])
        return self.call("Squeeze", x, self.constant([axis]), out=out)

    def count(self, size: str) -> str:
        """0, 1, ... up to a size, which is a list of one."""
        return self.call("Range", self.constant(0), self.squeeze(size, 0), self.constant(1))

    def both(self, left: str, right: str) -> str:
        """Two masks, either of which may be missing."""
        return self.call("And", left, right) if left and right else left or right

    def join_heads(self, x: str, out: str) -> str:
        """``[B, H, S, D]`` -> ``[B, S, H * D]``, named ``out``."""
        return self.call("Reshape", self.transpose(x, 0, 2, 1, 3), self.constant([0, 0, -1]), out=out)

    def concat_past(self, past: str, x: str, present: str) -> str:
        """Keys or values behind those of earlier calls, under the name of the operator's output where it has one."""
        name = self.call("Concat", past, x, axis=2, out=present)
        self.graph.makers.setdefault(name, self.made[-1])
        return name

    def split_heads(self, x: str, heads: int) -> str:
        """``[B, S, H * D]`` -> ``[B, H, S, D]``."""
        if self.graph.rank(x) != 3:
            raise Refuse("its queries, keys or values have not three axes each")
        width = (self.graph.dims(x) or [""])[-1]
        last = width // heads if isinstance(width, int) else -1
        return self.transpose(self.call("Reshape", x, self.constant([0, 0, heads, last])), 0, 2, 1, 3)

    def visible(self, first: str, second: str, shift: str, left: int = -1, right: int = 0) -> str:
        """A boolean mask: query i sees key j iff ``i + shift - left <= j <= i + shift + right``; -1 is no bound.

        Args:
            first: Number of queries, a list of one.
            second: Number of keys, a list of one.
            shift: Position of the first query, ``[]`` or ``[B, 1, 1, 1]``; "" is 0.
            left: Keys that are seen before the query's own position.
            right: And behind it.
        """
        position = self.unsqueeze(self.count(first), 1)
        if shift:
            position = self.call("Add", position, shift)
        key = self.unsqueeze(self.count(second), 0)
        mask = ""
        if right >= 0:
            latest = self.call("Add", position, self.constant(right)) if right else position
            mask = self.call("LessOrEqual", key, latest)
        if left >= 0:
            earliest = self.call("Sub", position, self.constant(left)) if left else position
            mask = self.both(mask, self.call("GreaterOrEqual", key, earliest))
        return mask or self.constant(True, BOOL)

    def undo(self) -> None:
        """Forget all nodes made."""
        for node in (*self.made, *self.following):
            for name in node.output:
                if self.graph.makers.get(name) is node:
                    del self.graph.makers[name]
        self.made.clear()
        self.following.clear()
