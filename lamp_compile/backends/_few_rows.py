"""Few rows through INT8 weights on a CPU: plain loops for Inductor instead of a call of ``lamp::linear_int8``.

One row times a matrix is bound by the bytes of the matrix. Inductor reads them as they are, turns them into floats in
registers and fuses what comes after, at no cost of a call; the operator would write float weights to memory first.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from lamp_compile.runtime.linear import LEVELS, SMALLEST

MOST_ROWS = 16
"""Each row reads the weights again, from a cache near the core; beyond this the operator is faster."""
aten = torch.ops.aten


def spell_out(module: GraphModule) -> int:
    """Replace every ``lamp::linear_int8`` of few rows on a CPU by loops that do the same; gives back how many."""
    graph, done = module.graph, 0
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target not in _TARGETS:
            continue
        x, weight, scale, bias = (_argument(node, index, name) for index, name in enumerate(_NAMES))
        seen, stored, scales = (_value(given) for given in (x, weight, scale))
        if not _few(seen, stored):
            continue
        with graph.inserting_before(node):
            out = _loops(graph, x, seen, stored, scales, (weight, scale, bias), bool(node.kwargs["dynamic"]))
        out.meta = dict(node.meta)
        node.replace_all_uses_with(out)
        graph.erase_node(node)
        done += 1
    if done:
        module.recompile()
    return done


_TARGETS = (torch.ops.lamp.linear_int8, torch.ops.lamp.linear_int8.default)
_NAMES = ("x", "weight", "scale", "bias")


def _argument(node: Node, index: int, name: str) -> Any:
    return node.args[index] if index < len(node.args) else node.kwargs.get(name)


def _value(node: Any) -> Tensor | None:
    if not isinstance(node, Node):
        return None
    value = node.meta.get("val", node.meta.get("example_value"))
    return value if isinstance(value, Tensor) else None


def _few(x: Tensor | None, weight: Tensor | None) -> bool:
    """Whether shapes are known numbers, the device is a CPU and the rows are few."""
    if x is None or weight is None or x.device.type != "cpu":
        return False
    if not all(isinstance(size, int) for size in (*x.shape, *weight.shape)):
        return False
    return 0 < x.numel() <= MOST_ROWS * x.shape[-1]


def _loops(
    graph: Any, x: Node, seen: Any, stored: Any, scales: Any, tensors: tuple[Node, Node, Node | None], dynamic: bool
) -> Node:
    """sum over groups and inputs of x (q s), in float32."""

    def call(target: Any, *args: Any) -> Any:
        return graph.call_function(target.default if target in (aten.reshape, aten.abs) else target, args)

    weight, scale, bias = tensors
    (outputs, inputs), groups, rows = stored.shape, scales.shape[1], seen.numel() // seen.shape[-1]
    floats = call(aten.to.dtype, call(aten.reshape, x, [rows, inputs]), torch.float32)
    row_scale = None
    if dynamic:
        largest = call(aten.amax.default, call(aten.abs, floats), [-1], True)
        row_scale = call(aten.div.Tensor, largest, float(LEVELS))
        safe = call(aten.clamp_min.default, row_scale, SMALLEST)
        floats = call(aten.round.default, call(aten.div.Tensor, floats, safe))
    floats = call(aten.reshape, floats, [rows, 1, groups, inputs // groups])
    grouped = call(aten.to.dtype, call(aten.reshape, weight, [outputs, groups, inputs // groups]), torch.float32)
    factors = call(aten.to.dtype, call(aten.reshape, scale, [outputs, groups, 1]), torch.float32)
    products = call(aten.mul.Tensor, floats, call(aten.mul.Tensor, grouped, factors))
    out = call(aten.sum.dim_IntList, products, [-1, -2])
    out = out if row_scale is None else call(aten.mul.Tensor, out, row_scale)
    out = out if bias is None else call(aten.add.Tensor, out, bias)
    return call(aten.reshape, call(aten.to.dtype, out, seen.dtype), [*seen.shape[:-1], outputs])  # type: ignore[no-any-return]
