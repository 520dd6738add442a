"""The main graph of a model with an index of who reads which value, and the changes that keep it true."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from lamp_compile.frontends.onnx.files.validate import read_by
from lamp_compile.frontends.onnx.graphs.values import Dims, Values, attribute, operand, result

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto

__all__ = ["Dims", "Graph", "attribute", "nodes_within", "operand", "result"]


class Graph(Values):
    """The main graph of a model and its index, which follows ``add`` and ``bury`` alone.

    Args:
        model: A checked model (``reading.load``).
        typed: The same model after shape inference.
    """

    def __init__(self, model: ModelProto, typed: ModelProto) -> None:
        super().__init__(model, typed)
        self.model = model
        self.proto: GraphProto = model.graph
        self.outputs = {given.name for given in self.proto.output}
        self.names = {*self.inputs, *self.initializers, *(t.name for t in self.proto.initializer)}
        self.readers: dict[str, dict[int, NodeProto]] = {}
        for node in self.proto.node:
            self._index(node)

    def _index(self, node: NodeProto) -> None:
        for name in node.output:
            if name:
                self.makers[name] = node
                self.names.add(name)
        for name in set(read_by(node)):
            self.readers.setdefault(name, {})[id(node)] = node
            self.names.add(name)

    def users(self, name: str) -> list[NodeProto]:
        """The nodes that read a value, in subgraphs too (then the node that holds the subgraph)."""
        return list(self.readers.get(name, {}).values())

    def fresh(self, hint: str) -> str:
        """A name that no value has yet."""
        name, count = hint, 1
        while name in self.names:
            count += 1
            name = f"{hint}_{count}"
        self.names.add(name)
        return name

    def add(self, nodes: Sequence[NodeProto]) -> None:
        """Take nodes into the index."""
        for node in nodes:
            self._index(node)

    def bury(self, roots: Sequence[NodeProto], keep: Collection[int] = ()) -> set[int]:
        """Take nodes out of the index, and with them whatever only they used; gives back the ids of all these. Nodes
        whose ids are in ``keep`` stay."""
        dead: set[int] = set()
        waiting = list(roots)
        while waiting:
            node = waiting.pop()
            if id(node) in dead or id(node) in keep:
                continue
            dead.add(id(node))
            for name in set(read_by(node)):
                self.readers.get(name, {}).pop(id(node), None)
                maker = self.makers.get(name)
                if maker is not None and self.is_unused(maker):
                    waiting.append(maker)
        return dead

    def is_unused(self, node: NodeProto) -> bool:
        """Whether nobody reads what a node makes."""
        return not any(self.readers.get(name) or name in self.outputs for name in node.output)


def nodes_within(nodes: Any) -> Iterator[tuple[NodeProto, bool]]:
    """Every node of a graph or function, subgraphs included; True for those inside a subgraph."""
    waiting: list[tuple[Any, bool]] = [(nodes, False)]
    while waiting:
        current, nested = waiting.pop()
        for node in current:
            yield node, nested
            for given in node.attribute:
                if given.HasField("g"):
                    waiting.append((given.g.node, True))
                waiting.extend((graph.node, True) for graph in given.graphs)
