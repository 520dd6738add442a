"""A private, rewritable copy of a program: Dynamo's graph, an ExportedProgram, or an FX graph."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import ExportedProgram
from torch.fx import Graph, GraphModule
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from lamp_compile.errors import CaptureError, InputError
from lamp_compile.passes.patterns._values import KEYS

Kind = Literal["dynamo", "graph_module", "exported"]


@dataclass(frozen=True)
class Program:
    """A captured program.

    Attributes:
        module: Our copy; the graph is rewritten in place, weights are shared with the original.
        kind: Where it comes from, which decides how changeable tensors enter it.
        original: The object that was handed in.
    """

    module: GraphModule
    kind: Kind
    original: Any

    @property
    def graph(self) -> Graph:
        """The graph that the passes rewrite."""
        return self.module.graph


def capture(program: ExportedProgram | GraphModule, example_inputs: Sequence[Any] | None = None) -> Program:
    """Copy a program; every node of the copy knows its shape, dtype, module path and stack trace.

    Raises:
        InputError: The program is of no known kind, or a graph without shapes comes without example inputs.
        CaptureError: Running the graph on fake tensors failed.
    """
    if isinstance(program, ExportedProgram):
        return Program(_copied(program.graph_module), "exported", program)
    if not isinstance(program, GraphModule):
        raise InputError(
            f"cannot rewrite a {type(program).__name__}",
            where="program",
            fix="a torch.export.ExportedProgram or torch.fx.GraphModule; for an nn.Module use lamp_compile.compile",
        )
    module = _copied(program)
    if any(hasattr(node, "_dynamo_source") for node in program.graph.nodes if node.op == "placeholder"):
        _drop_grad_modes(module.graph)
        return Program(module, "dynamo", program)
    if not _knows_shapes(module.graph):
        _propagate(module, example_inputs)
    return Program(module, "graph_module", program)


def _copied(module: GraphModule) -> GraphModule:
    graph = copy.deepcopy(module.graph)
    made = GraphModule(module, graph, type(module).__name__)
    made.meta = dict(module.meta)
    made.train(module.training)
    # Private names of Dynamo that AOTAutograd reads; without them parameters stop being static inputs (CUDA graphs).
    if hasattr(module, "_param_name_to_source"):
        made._param_name_to_source = dict(cast(Any, module._param_name_to_source))  # type: ignore[assignment]
    for old, new in zip(module.graph.nodes, graph.nodes, strict=True):
        # fx renames what is called like a builtin (`input`); an ExportedProgram's signature knows the old names.
        new.name = old.name
        if hasattr(old, "_dynamo_source"):
            new._dynamo_source = old._dynamo_source
        if isinstance(new.target, torch._ops.OpOverloadPacket) and new.target._qualified_op_name.startswith("lamp::"):
            new.target = new.target.default
    return made


def _drop_grad_modes(graph: Graph) -> None:
    """The whole graph runs without gradients; a ``with torch.no_grad()`` in the model would turn them on at its end."""
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target is torch._C._set_grad_enabled and not node.users:
            graph.erase_node(node)


def _knows_shapes(graph: Graph) -> bool:
    return all(any(key in node.meta for key in KEYS) for node in graph.nodes if node.op not in ("output", "get_attr"))


def _propagate(module: GraphModule, example_inputs: Sequence[Any] | None) -> None:
    if example_inputs is None:
        raise InputError(
            "this graph does not know its tensors' shapes",
            where="program",
            fix="pass example_inputs=(...), or capture it with torch.export",
        )
    wanted = sum(node.op == "placeholder" for node in module.graph.nodes)
    if len(example_inputs) != wanted:
        raise InputError(
            f"{len(example_inputs)} example inputs for {wanted} inputs", where="example_inputs", fix="one for each"
        )
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    inputs = [mode.from_tensor(x, static_shapes=True) if isinstance(x, Tensor) else x for x in example_inputs]
    try:
        with torch.no_grad():
            FakeTensorProp(module, mode).propagate_dont_convert_inputs(*inputs)
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise CaptureError(
            f"the graph does not run on these example inputs: {error}",
            where="example_inputs",
            fix="check their shapes and dtypes",
        ) from error
