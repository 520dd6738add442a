"""The same model through each kind of capture."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from lamp_compile.ir import Found
from lamp_compile.passes.capture import Program, capture
from lamp_compile.passes.find_sites import find_sites

KINDS = ("dynamo", "export")


def dynamo_graph(model: nn.Module, *args: Any, dynamic: bool = False, **kwargs: Any) -> GraphModule:
    """The graph that Dynamo hands to a backend."""
    torch._dynamo.reset()
    graphs: list[GraphModule] = []

    def keep(gm: GraphModule, example_inputs: list[Tensor]) -> Any:
        graphs.append(gm)
        return gm.forward

    with torch.no_grad():
        torch.compile(model, backend=keep, fullgraph=True, dynamic=dynamic)(*args, **kwargs)
    (graph,) = graphs
    return graph


def program(kind: str, model: nn.Module, *args: Any) -> Program:
    """A captured program of this kind."""
    if kind == "dynamo":
        return capture(dynamo_graph(model, *args))
    return capture(torch.export.export(model, args, strict=True))


def found(kind: str, model: nn.Module, *args: Any) -> Found:
    """What the readers see."""
    return find_sites(program(kind, model, *args))


def lamp_counts(graph: torch.fx.Graph) -> dict[str, int]:
    """How often each ``lamp::`` operator occurs."""
    counts: dict[str, int] = {}
    for node in graph.nodes:
        if node.op == "call_function" and str(node.target).startswith("lamp."):
            name = str(node.target).removeprefix("lamp.").removesuffix(".default")
            counts[name] = counts.get(name, 0) + 1
    return counts
