"""Which tokens' logits a decoder's artifact computes: an input of the graph that may be left out."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import onnx_ir as ir

NAME = "logits_from"
"""int64 ``[1]``: the first of the new tokens whose logits are computed, counted from the end where it is negative. 0,
the default: all; -1: the last."""
_NO_END = np.iinfo(np.int64).max


def choose(model: ir.Model, kept: ir.Value) -> None:
    """Make ``kept`` the numbers of the tokens from ``logits_from`` on; it was an input of the graph.

    Args:
        model: Its first input are token ids ``[B, n]``. After optimisation, because optimisers may take the default of
            an input for a constant.
        kept: int64 ``[kept]``.
    """
    import onnx_ir as ir

    graph = model.graph
    first, end, zero, one = (
        ir.Value(name=name, const_value=ir.tensor(np.array(value, np.int64), name=name))
        for name, value in ((NAME, [0]), (f"{NAME}.end", [_NO_END]), (f"{NAME}.zero", 0), (f"{NAME}.one", 1))
    )
    first.shape, first.type = ir.Shape((1,)), ir.TensorType(ir.DataType.INT64)
    made: list[ir.Node] = []

    def call(operator: str, *inputs: ir.Value, **attributes: int) -> ir.Value:
        found = [ir.AttrInt64(name, value) for name, value in attributes.items()]
        node = ir.Node("", operator, inputs, found, num_outputs=1, name=f"{NAME}.{operator.lower()}")
        node.outputs[0].name = f"{NAME}.{operator.lower()}"
        made.append(node)
        return node.outputs[0]

    count = call("Squeeze", call("Shape", graph.inputs[0], start=1, end=2))
    rows = call("Slice", call("Range", zero, count, one), first, end)
    ir.convenience.replace_all_uses_with(kept, rows)
    graph.inputs.remove(kept)
    for value in (first, end, zero, one):
        graph.initializers[str(value.name)] = value
    graph.inputs.append(first)
    graph.insert_before(graph[0], made)
