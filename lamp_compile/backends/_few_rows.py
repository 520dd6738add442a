"""Few rows through a linear layer on a CPU: plain loops for Inductor instead of a call.

One row times a matrix is bound by the bytes of the matrix. Inductor reads INT8 weights as they are, turns them into
floats in registers and fuses what comes after, at no cost of a call; ``lamp::linear_int8`` would write float weights to
memory first. A float layer of one row is no work for a matrix product either: the loop reads its weights faster.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Graph, GraphModule, Node

from lamp_compile.runtime.linear import LEVELS, SMALLEST

MOST_ROWS = 16
"""Each row reads the weights again, from a cache near the core; beyond this the operator is faster."""
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
NAMES = ("x", "weight", "scale", "bias")
aten, lamp = torch.ops.aten, torch.ops.lamp
PLAIN = (Tensor, torch.nn.Parameter, FakeTensor)
LINEAR = (torch.nn.functional.linear, aten.linear.default)


def spell_out(module: GraphModule) -> int:
    """Replace by loops that do the same, on a CPU: every ``lamp::linear_int8`` of few rows, and every linear layer of
    float weights and one row. Gives back how many.

    Each layer reads its rows where it stands: a graph of Dynamo's may change them in place between two layers.
    """
    done = 0
    for node in list(module.graph.nodes):
        if node.target in (lamp.linear_int8, lamp.linear_int8.default):
            out = _spell_int8(module.graph, node)
        elif node.target in LINEAR:
            out = _spell_float(module.graph, node)
        else:
            continue
        if out is None:
            continue
        out.meta = dict(node.meta)
        node.replace_all_uses_with(out)
        module.graph.erase_node(node)
        done += 1
    if done:
        _register()
        module.recompile()
    return done


def _given(node: Node, *names: str) -> list[Any]:
    return [node.args[i] if i < len(node.args) else node.kwargs.get(name) for i, name in enumerate(names)]


def _spell_int8(graph: Graph, node: Node) -> Node | None:
    given = _given(node, *NAMES)
    x, weight, scale = (_value(argument) for argument in given[:3])
    if x is None or weight is None or scale is None or not _few(x, weight, MOST_ROWS):
        return None
    with graph.inserting_before(node):
        emit = _Emit(graph)
        rows = emit.rows(given[0], x, bool(node.kwargs["dynamic"]))
        return emit.products(rows, given[1:], (x, weight, scale))


def _spell_float(graph: Graph, node: Node) -> Node | None:
    given = _given(node, "input", "weight", "bias")
    x, weight = (_value(argument) for argument in given[:2])
    if x is None or weight is None or weight.dim() != 2 or not _few(x, weight, 1):
        return None
    made = _value(node)  # under autocast a layer answers in another dtype than it is asked in
    if x.dtype != weight.dtype or x.dtype not in FLOATS or made is None or made.dtype != x.dtype:
        return None
    with graph.inserting_before(node):
        emit = _Emit(graph)
        row, _ = emit.rows(given[0], x, False)
        return emit.float_products(row, given[1:], x, weight.shape[0])


class _Emit:
    """Nodes of the loops, where the graph inserts."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph

    def call(self, target: Any, *args: Any) -> Node:
        return self.graph.call_function(target, args)

    def rows(self, x: Node, seen: Tensor, dynamic: bool) -> tuple[Node, Node | None]:
        """The rows as float32 ``[M, K]``, whole numbers where they are rounded, and then the scale of each."""
        shape = [seen.numel() // seen.shape[-1], seen.shape[-1]]
        floats = self.call(aten.to.dtype, self.call(aten.reshape.default, x, shape), torch.float32)
        if not dynamic:
            return self.call(lamp.in_memory.default, floats), None
        largest = self.call(aten.amax.default, self.call(aten.abs.default, floats), [-1], True)
        scale = self.call(lamp.in_memory.default, self.call(aten.div.Tensor, largest, float(LEVELS)))
        safe = self.call(aten.clamp_min.default, scale, SMALLEST)
        steps = self.call(aten.round.default, self.call(aten.div.Tensor, floats, safe))
        return self.call(lamp.in_memory.default, steps), scale

    def float_products(self, row: Node, tensors: Any, x: Tensor, outputs: int) -> Node:
        """sum over inputs of x w, in float32; the row is there already."""
        weight, bias = tensors
        out = self.call(aten.sum.dim_IntList, self.call(aten.mul.Tensor, row, self._float(weight)), [-1])
        if bias is not None:
            out = self.call(aten.add.Tensor, out, self._float(bias))
        return self.call(aten.reshape.default, self.call(aten.to.dtype, out, x.dtype), [*x.shape[:-1], outputs])

    def products(self, rows: tuple[Node, Node | None], tensors: Any, values: tuple[Tensor, Tensor, Tensor]) -> Node:
        """sum over groups and inputs of x (q s), in float32."""
        (floats, row_scale), (weight, scale, bias), (x, stored, scales) = rows, tensors, values
        (outputs, inputs), groups = stored.shape, scales.shape[1]
        size = inputs // groups
        grouped = self.call(aten.reshape.default, weight, [outputs, groups, size])
        factors = self.call(aten.reshape.default, scale, [outputs, groups, 1])
        floated = self.call(aten.mul.Tensor, self._float(grouped), self._float(factors))
        spread = self.call(aten.reshape.default, floats, [x.numel() // inputs, 1, groups, size])
        out = self.call(aten.sum.dim_IntList, self.call(aten.mul.Tensor, spread, floated), [-1, -2])
        if row_scale is not None:
            out = self.call(aten.mul.Tensor, out, row_scale)
        if bias is not None:
            out = self.call(aten.add.Tensor, out, bias)
        cast = self.call(aten.to.dtype, out, x.dtype)
        return self.call(aten.reshape.default, cast, [*x.shape[:-1], outputs])

    def _float(self, node: Node) -> Node:
        return self.call(aten.to.dtype, node, torch.float32)


def _value(node: Any) -> Tensor | None:
    value = node.meta.get("val", node.meta.get("example_value")) if isinstance(node, Node) else None
    # A subclass may have a linear layer of its own.
    return value if type(value) in PLAIN else None


def _few(x: Tensor, weight: Tensor, most: int) -> bool:
    """Whether shapes are known numbers, the device is a CPU and the rows are at most so many."""
    known = all(isinstance(size, int) for size in (*x.shape, *weight.shape))
    return known and x.device.type == "cpu" and 0 < x.numel() <= most * x.shape[-1]


def _register() -> None:
    """Tell Inductor that ``lamp::in_memory`` is a buffer; of our operator alone, and once."""
    from torch._inductor import lowering

    if lamp.in_memory.default in lowering.lowerings:
        return

    def in_memory(x: Any) -> Any:
        copied = lowering.clone(x)
        copied.realize()
        return copied

    lowering.register_lowering(lamp.in_memory.default, type_promotion_kind=None)(in_memory)
