"""The walk from a Softmax up to the product of queries and keys, gathering what is done to the scores on the way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from lamp_compile.frontends.onnx.graphs.graph import Graph, attribute, operand
from lamp_compile.frontends.onnx.graphs.sites import BOOL
from lamp_compile.frontends.onnx.graphs.walk import through
from lamp_compile.frontends.onnx.patterns._base import NoMatch, Refuse

if TYPE_CHECKING:
    from onnx import NodeProto

NOT_ATTENTION = "it does not lie between a product of queries and keys and a product with values"
_STEPS_AT_MOST = 40


@dataclass
class Scores:
    """What the walk has met."""

    scale: float = 1.0
    softcap: float = 0.0
    biases: list[str] = field(default_factory=list)
    masks: list[str] = field(default_factory=list)
    hidden: list[str] = field(default_factory=list)
    """Boolean fills, where True hides a key."""
    passed: list[NodeProto] = field(default_factory=list)
    """Nodes from the product of queries and keys to the Softmax."""


def walk_up(graph: Graph, name: str, scores: Scores) -> tuple[str, str]:
    """From the Softmax's input to (q, k transposed), the scale of each gathered."""
    for _ in range(_STEPS_AT_MOST):
        name = through(graph, name, scores.passed)
        node = graph.maker(name, "MatMul", *_STEPS)
        if node is None:
            raise NoMatch(NOT_ATTENTION)
        scores.passed.append(node)
        if node.op_type == "MatMul":
            return unscaled(graph, node.input[0], scores), unscaled(graph, node.input[1], scores)
        name = _STEPS[node.op_type](graph, node, scores)
    raise NoMatch(NOT_ATTENTION)


def unscaled(graph: Graph, name: str, scores: Scores) -> str:
    """Queries or keys before a number multiplied or divided them; the number goes into the scale."""
    while True:
        name = through(graph, name, [])
        node = graph.maker(name, "Mul", "Div")
        if node is None:
            return name
        for given, other in ((0, 1), (1, 0)):
            factor = graph.number(node.input[other])
            if factor and (node.op_type == "Mul" or other == 1) and graph.rank(node.input[given]) == graph.rank(name):
                scores.scale *= factor if node.op_type == "Mul" else 1 / factor
                name = node.input[given]
                break
        else:
            return name


def _leads_to_product(graph: Graph, name: str) -> bool:
    """Whether walking up from here meets a product: tells scores from the bias that is added to them."""
    key = "leads to product", name
    if key not in graph.memory:
        try:
            walk_up(graph, name, Scores())
            graph.memory[key] = True
        except (NoMatch, Refuse) as outcome:
            graph.memory[key] = isinstance(outcome, Refuse)
    return bool(graph.memory[key])


def _add(graph: Graph, node: NodeProto, scores: Scores) -> str:
    left, right = node.input
    if not _leads_to_product(graph, left):
        left, right = right, left
    if scores.scale != 1.0 or scores.softcap:
        raise Refuse("a bias is added before scaling or soft-capping", "add it after")
    _bias(graph, right, scores)
    return str(left)


def _bias(graph: Graph, name: str, scores: Scores) -> None:
    """A bias of zeros and minus infinity is a mask; others stay what they are."""
    node = graph.maker(name, "Where")
    if node is not None and graph.dtype(node.input[0]) == BOOL:
        kept, other = graph.number(node.input[1]), graph.number(node.input[2])
        if kept == 0 and other == -np.inf:
            scores.masks.append(node.input[0])
            return
        if other == 0 and kept == -np.inf:
            scores.hidden.append(node.input[0])
            return
    scores.biases.append(name)


def _mul(graph: Graph, node: NodeProto, scores: Scores) -> str:
    for given, other in ((0, 1), (1, 0)):
        factor = graph.number(node.input[other])
        if factor is None:
            continue
        inner = through(graph, node.input[given], [])
        tanh = graph.maker(inner, "Tanh")
        return _softcap(graph, tanh, factor, scores) if tanh is not None else _scaled(node.input[given], factor, scores)
    if any(_leads_to_product(graph, name) for name in node.input):
        raise Refuse("scores are scaled by a computed value", "make the scale a constant")
    raise NoMatch(NOT_ATTENTION)


def _softcap(graph: Graph, tanh: NodeProto, cap: float, scores: Scores) -> str:
    if scores.softcap or scores.scale != 1.0:
        raise Refuse("scores are scaled after their soft-cap")
    inner = through(graph, tanh.input[0], scores.passed)
    node = graph.maker(inner, "Div", "Mul")
    for given, other in ((0, 1), (1, 0)) if node is not None else ():
        assert node is not None
        factor = graph.number(node.input[other])
        if factor and (node.op_type == "Mul" or other == 1):
            divisor = factor if node.op_type == "Div" else 1 / factor
            if abs(divisor - cap) > 1e-5 * abs(cap):
                raise Refuse("the soft-cap divides and multiplies by different numbers")
            scores.softcap = cap
            scores.passed.extend([tanh, node])
            return str(node.input[given])
    raise Refuse("the soft-cap is not tanh(x / c) * c")


def _div(graph: Graph, node: NodeProto, scores: Scores) -> str:
    factor = graph.number(node.input[1])
    if factor:
        return _scaled(node.input[0], 1 / factor, scores)
    if _leads_to_product(graph, node.input[0]):
        raise Refuse("scores are divided by a computed value", "make the scale a constant")
    raise NoMatch(NOT_ATTENTION)


def _scaled(name: str, factor: float, scores: Scores) -> str:
    if factor == 0 or not np.isfinite(factor):
        raise Refuse(f"scores are multiplied by {factor}")
    scores.scale *= factor
    return name


def _where(graph: Graph, node: NodeProto, scores: Scores) -> str:
    for kept, other, found in ((1, 2, scores.masks), (2, 1, scores.hidden)):
        value = graph.number(node.input[other])
        if value is None or not _leads_to_product(graph, node.input[kept]):
            continue
        if value > -1e4:
            raise Refuse(f"scores are filled with {value:g}, which does not hide a key")
        if scores.softcap:
            raise Refuse("keys are hidden before soft-capping, which lets them back in", "hide them after it")
        found.append(node.input[0])
        return str(node.input[kept])
    raise NoMatch(NOT_ATTENTION)


def _sub(graph: Graph, node: NodeProto, scores: Scores) -> str:
    """``x - max(x)``: changes nothing in a softmax."""
    largest = graph.maker(node.input[1], "ReduceMax")
    if largest is None or largest.input[0] != node.input[0]:
        raise NoMatch(NOT_ATTENTION)
    rank = graph.rank(node.input[0])
    if graph.axes(largest) not in ([-1], [(rank or 0) - 1]) or attribute(largest, "keepdims", 1) != 1:
        raise NoMatch(NOT_ATTENTION)
    scores.passed.append(largest)
    return str(node.input[0])


def _concat(graph: Graph, node: NodeProto, scores: Scores) -> str:
    if _leads_to_product(graph, operand(node, 0)):
        raise Refuse("something is joined to the scores (a sink?)", "there is no reader for it yet")
    raise NoMatch(NOT_ATTENTION)


def _reshape(graph: Graph, node: NodeProto, scores: Scores) -> str:
    if graph.dims(node.input[0]) is not None and graph.dims(node.input[0]) == graph.dims(node.output[0]):
        return str(node.input[0])
    if _leads_to_product(graph, node.input[0]):
        raise Refuse("scores are reshaped on the way to their softmax", "export it with four axes throughout")
    raise NoMatch(NOT_ATTENTION)


_STEPS: dict[str, Callable[[Graph, NodeProto, Scores], str]] = {
    "Add": _add, "Mul": _mul, "Div": _div, "Where": _where, "Sub": _sub, "Concat": _concat, "Reshape": _reshape,
}  # fmt: skip
