"""Encoders and plain modules to an exported program whose attentions are one node each.

``torch.export``, then ``lamp_compile.rewrite``, then the five nodes of a site become ``lamp_onnx::uncached_attention``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx import Graph, Node

from lamp_compile.errors import InputError, ModelError
from lamp_compile.frontends.onnx.exporting import torch_ops as _torch_ops  # noqa: F401  (registers torch.ops.lamp_onnx)
from lamp_compile.frontends.onnx.form import check_row
from lamp_compile.passes._nodes import lamp_nodes, outcome, outputs, sweep
from lamp_compile.passes.patterns._dialect import bind
from lamp_compile.passes.patterns._values import Emitter, tensor
from lamp_compile.report import Report

PARTS = ("quantize", "look_ahead", "select", "attend", "guard")


def example(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and named example inputs, in batches of two at least: an exporter takes a size of one for a constant.

    Raises:
        InputError: They are no tuple or dict, or hold no tensor.
    """
    if isinstance(inputs, Tensor):
        inputs = (inputs,)
    if not isinstance(inputs, tuple | dict) or not inputs:
        raise InputError(
            f"example_inputs is a {type(inputs).__name__}",
            where="export_onnx",
            fix="a tuple or dict of the model's inputs",
        )
    args, kwargs = (inputs, {}) if isinstance(inputs, tuple) else ((), dict(inputs))
    tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
    if not tensors:
        raise InputError("example_inputs holds no tensor", where="export_onnx", fix="at least one tensor")
    if any(x.dim() == 0 or x.shape[0] != 1 for x in tensors):
        return args, kwargs
    return (
        tuple(_twice(x) for x in args),
        {name: _twice(x) for name, x in kwargs.items()},
    )


def _twice(x: Any) -> Any:
    return torch.cat((x, x)) if isinstance(x, Tensor) else x


def dynamic_of(x: Any) -> Any:
    """Dimensions of an input that may change: the first, and of token ids and masks ``[B, n]`` the second too."""
    if not isinstance(x, Tensor) or x.dim() == 0:
        return None
    tokens = x.dim() == 2 and not x.dtype.is_floating_point
    return {0: Dim.AUTO, **({1: Dim.AUTO} if tokens else {})}


def capture(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic_shapes: Any) -> ExportedProgram:
    """The module as an exported program.

    Raises:
        ModelError: torch cannot export it.
    """
    if dynamic_shapes is None:
        dynamic_shapes = (
            {name: dynamic_of(x) for name, x in kwargs.items()} if kwargs else tuple(dynamic_of(x) for x in args)
        )
    try:
        with torch.no_grad():
            return torch.export.export(model, args, kwargs, dynamic_shapes=dynamic_shapes, strict=False)
    except Exception as error:
        raise ModelError(
            f"torch.export does not take it: {type(error).__name__}: {str(error).splitlines()[0]}",
            where=type(model).__name__,
            fix="torch.export.export(model, inputs) must work first; example inputs of the usual sizes",
        ) from error


def join(program: ExportedProgram) -> Report:
    """Make one operator of each site's five nodes, in place; gives back what the rewrite reported.

    Raises:
        ModelError: A site has settings that ONNX functions do not have.
    """
    report: Report = program.graph_module.meta["lamp_report"]
    graph = program.graph_module.graph
    for name in report.rewritten:
        row = report.plan.site(name)
        check_row(row)
        _join_site(graph, name, row.tile)
    graph.lint()
    program.graph_module.recompile()
    return report


def _join_site(graph: Graph, site: str, tile: int) -> None:
    nodes = lamp_nodes(graph, site)
    quantize, look_ahead, select, attend, guard = (nodes[part] for part in PARTS)
    stored, looked, selected, guarded = (bind(node) for node in (quantize, look_ahead, select, guard))
    scale = looked["scale"]
    q = tensor(looked["q"])
    assert q is not None
    if isinstance(scale, Node):
        raise ModelError(
            "its scale is computed in the graph", where=site, fix="export with a fixed head size and a constant scale"
        )
    options: dict[str, Any] = {
        name: looked[name]
        for name in ("causal", "window", "softcap", "rotation", "rule", "query_bits", "subtile", "site")
    }
    emit = Emitter(guard.next)
    whole = emit.call(
        torch.ops.lamp_onnx.uncached_attention.default,
        looked["q"], stored["k"], stored["v"], selected["tau"], selected["floor"], guarded["budget"],
        guarded["state"], guarded["stats"], looked["balance"], four(looked["mask"], emit), four(looked["bias"], emit),
        looked["sinks"], **options, scale=float(q.shape[-1] ** -0.5 if scale is None else scale), tile=tile,
        guard_window=guarded["window"], guard_hold=guarded["hold"], hysteresis=guarded["hysteresis"],
    )  # fmt: skip
    out, state, stats = outputs(whole, 3, emit)
    leftover: list[Node] = [quantize, look_ahead, select, attend, guard]
    for node, index, new in ((attend, 0, out), (guard, 0, state), (guard, 1, stats)):
        for old in outcome(node, index):
            old.replace_all_uses_with(new)
            leftover.append(old)
    for node, count in ((quantize, 6), (attend, 3), (guard, 2)):
        leftover += [old for index in range(count) for old in outcome(node, index)]
    sweep(graph, leftover)


def four(x: Any, emit: Emitter) -> Any:
    """A mask or bias with four axes, as the functions want it."""
    found = tensor(x)
    while found is not None and found.dim() < 4:
        x = emit.call(torch.ops.aten.unsqueeze.default, x, 0)
        found = tensor(x)
    return x


def output_names(found: Any) -> list[str]:
    """Names of a module's tensors in the order that ``torch.export`` flattens them."""
    if isinstance(found, Tensor):
        return ["output"]
    named = list(found.items()) if isinstance(found, Mapping) else [(f"output_{i}", x) for i, x in enumerate(found)]
    names: list[str] = []
    for name, value in named:
        if isinstance(value, Tensor):
            names.append(str(name))
        elif isinstance(value, tuple | list):
            names += [f"{name}.{index}" for index, x in enumerate(value) if isinstance(x, Tensor)]
    return names
