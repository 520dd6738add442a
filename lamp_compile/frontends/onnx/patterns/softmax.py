"""MatMul, Softmax, MatMul, as exporters spell it: scale before or after, masks added or filled in, heads repeated."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from lamp_compile.frontends.onnx.graphs.emit import Emitter
from lamp_compile.frontends.onnx.graphs.graph import Graph, attribute
from lamp_compile.frontends.onnx.graphs.sites import BOOL, OnnxSite
from lamp_compile.frontends.onnx.graphs.walk import checked, sizes_of, training, transposed, true_kv, with_heads
from lamp_compile.frontends.onnx.patterns._base import NoMatch, OnnxPattern, Refuse
from lamp_compile.frontends.onnx.patterns._scores import NOT_ATTENTION, Scores, unscaled, walk_up

if TYPE_CHECKING:
    from onnx import NodeProto


def read_softmax(graph: Graph, root: NodeProto, emit: Emitter) -> OnnxSite:
    """See ``OnnxPattern.read``."""
    rank = graph.rank(root.input[0])
    axis = attribute(root, "axis", -1 if graph.opset >= 13 else 1)
    if axis != -1 and (rank is None or axis != rank - 1):
        raise NoMatch("it is not over the last axis")
    product, below, guarded = _product_with_values(graph, root)
    scores = Scores()
    q, k_t = walk_up(graph, root.input[0], scores)
    if not guarded <= set(scores.biases):
        raise Refuse("weights are set to zero by something else than the mask")
    _refuse_other_uses(graph, [root, *below, *scores.passed], product)
    k = unscaled(graph, transposed(graph, k_t, emit), scores)
    v = product.input[1]
    single = [true_kv(graph, k), true_kv(graph, v)]
    if _heads(graph, single[0]) == _heads(graph, single[1]):
        k, v = single
    q, k, v = with_heads(graph, [q, k, v], emit)
    flat = graph.rank(product.output[0]) == 3
    out = graph.fresh(f"{emit.prefix}/out") if flat else product.output[0]
    site = OnnxSite(
        pattern="softmax", root=product, out=out, q=q, k=k, v=v, scale=scores.scale, softcap=scores.softcap,
        mask=_mask(graph, scores, flat, emit), bias=_bias(graph, scores, flat, emit), replaced=[product],
        absorbed=[*reversed(scores.passed), root, *below, product],
        **sizes_of(graph, q, k, v),
    )  # fmt: skip
    if flat:
        emit.follow()
        emit.squeeze(out, 1, out=product.output[0])
    return checked(graph, site)


def _heads(graph: Graph, name: str) -> object:
    dims = graph.dims(name)
    return dims[1] if dims is not None and len(dims) == 4 else None


def _product_with_values(graph: Graph, root: NodeProto) -> tuple[NodeProto, list[NodeProto], set[str]]:
    """The MatMul that takes the weights, the nodes between, and the biases whose hidden rows are set to zero there."""
    between: list[NodeProto] = []
    guarded: set[str] = set()
    name = root.output[0]
    for _ in range(16):
        users = graph.users(name)
        products = [n for n in users if n.op_type == "MatMul" and n.input[0] == name and not n.domain]
        if products:
            return products[0], between, guarded
        onward = [n for n in users if n.op_type in ("Cast", "Identity", "Dropout", "Where") and not n.domain]
        if not onward:
            raise NoMatch(NOT_ATTENTION)
        node = onward[0]
        if node.op_type == "Dropout" and training(graph, node):
            raise Refuse("attention weights are dropped out: exported in training mode", "export it in eval mode")
        if node.op_type == "Where":
            guarded |= _empty_rows(graph, node, name, between)
        between.append(node)
        name = node.output[0]
    raise NoMatch(NOT_ATTENTION)


def _empty_rows(graph: Graph, where: NodeProto, name: str, between: list[NodeProto]) -> set[str]:
    """``Where(test, 0, w)`` with a test for rows that see no key, which have weights 0 here as there: ``IsNaN(w)``, or
    ``ReduceMax(bias) == -inf``, whose bias is given back."""
    if where.input[2] != name or graph.number(where.input[1]) != 0:
        raise NoMatch(NOT_ATTENTION)
    test = graph.maker(where.input[0], "IsNaN", "Equal")
    if test is not None and test.op_type == "IsNaN" and test.input[0] == name:
        between.append(test)
        return set()
    largest = graph.maker(test.input[0], "ReduceMax") if test is not None else None
    if test is None or largest is None or test.op_type != "Equal" or graph.number(test.input[1]) != -math.inf:
        raise NoMatch(NOT_ATTENTION)
    if graph.axes(largest) != [-1] or attribute(largest, "keepdims", 1) != 1:
        raise NoMatch(NOT_ATTENTION)
    return {largest.input[0]}


def _refuse_other_uses(graph: Graph, nodes: list[NodeProto], product: NodeProto) -> None:
    inside = {id(node) for node in (*nodes, product)}
    for name in (name for node in nodes for name in node.output):
        outside = [user.op_type for user in graph.users(name) if id(user) not in inside and not _type_only(user, name)]
        if outside or name in graph.outputs:
            who = f"by {outside[0]}" if outside else "as an output of the model"
            fix = "export the model without attention weights (output_attentions=False)"
            raise Refuse(f"scores or weights are used elsewhere, {who}", fix)


def _type_only(node: NodeProto, name: str) -> bool:
    """Whether a node reads a value's element type and nothing else of it."""
    return node.op_type == "CastLike" and not node.domain and node.input[0] != name


def _mask(graph: Graph, scores: Scores, flat: bool, emit: Emitter) -> str:
    masks = [*scores.masks, *(emit.call("Not", name) for name in scores.hidden)]
    joined = ""
    for name in masks:
        if graph.dtype(name) not in (BOOL, 0):
            raise Refuse("scores are masked by something that is not boolean")
        joined = emit.both(joined, _with_heads(graph, name, flat, emit))
    return joined


def _bias(graph: Graph, scores: Scores, flat: bool, emit: Emitter) -> str:
    joined = ""
    for name in scores.biases:
        bias = _with_heads(graph, name, flat, emit)
        joined = emit.call("Add", joined, bias) if joined else bias
    return joined


def _with_heads(graph: Graph, name: str, flat: bool, emit: Emitter) -> str:
    """``[B, S, N]`` of a product of three axes -> ``[B, 1, S, N]``."""
    return emit.unsqueeze(name, 1) if flat and graph.rank(name) == 3 else name


PATTERN = OnnxPattern("softmax", (("", "Softmax"),), read_softmax)
