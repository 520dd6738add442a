"""An encoder or plain module to an ONNX model."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lamp_compile.errors import ModelError
from lamp_compile.frontends.onnx.exporting import describe, finish, modules, trace
from lamp_compile.frontends.onnx.exporting import verify as verification
from lamp_compile.frontends.onnx.exporting.export import Artifact
from lamp_compile.frontends.onnx.exporting.targets import Target
from lamp_compile.frontends.onnx.exporting.translate import Translation
from lamp_compile.runtime.ort import artifact


def build(
    model: nn.Module, inputs: tuple[tuple[Any, ...], dict[str, Any]], program: Any, target: Target, guard: str
) -> Artifact:
    """The artifact of a module.

    Args:
        model: Without LAMP.
        inputs: Positional and named, of ``modules.example``.
        program: The rewritten program; it is changed.
        target: What it is to run on.
        guard: "if" or "select".

    Raises:
        ModelError: See ``modules.join``, or nothing in it is rewritten.
    """
    args, kwargs = inputs
    with torch.no_grad():
        names = modules.output_names(model(*args, **kwargs))
    runnable = program.module()  # the five nodes of each site: the comparison shares no code with what is written
    report = replace(modules.join(program), backend=f"ONNX, {target.name}", notes=())
    if not report.rewritten:
        reasons = "; ".join(f"{item.site}: {item.reason}" for item in (*report.refusals, *report.unclaimed))
        raise ModelError(
            f"no attention of it is rewritten{': ' + reasons if reasons else ''}",
            where=type(model).__name__,
            fix="torch.onnx.export, if it is meant to stay as it is",
        )
    translation = Translation(guard, target.arithmetic)
    traced = trace.to_onnx(program, translation, target.opset, type(model).__name__)
    made = traced.model
    renamed = {str(value.name): name for value, name in zip(made.graph.outputs, names, strict=True)}
    finish.wire(made, translation)
    finish.rename(made, translation, {name: name for name in report.rewritten}, renamed)
    finish.name_dimensions(made, {})
    trace.optimize(traced)
    metadata = trace.metadata("module", report, target, guard)
    metadata[artifact.KEY] = json.dumps(describe.MODULE, separators=(",", ":"))
    proto = finish.to_proto(made, translation, target.opset, metadata)

    def verify(run: Any, reduced: bool) -> verification.Verification:
        batches = [(args, kwargs), _other_batch(args, kwargs)]
        what = "the given inputs, and their first sequence three times"
        return verification.module(run, runnable, model, names, batches, reduced, what)

    return Artifact(proto, report, "module", verify)


def _other_batch(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Another batch size, so that one that was taken for a constant is noticed."""

    def three(x: Any) -> Any:
        return x[:1].repeat(3, *(1,) * (x.dim() - 1)) if isinstance(x, Tensor) and x.dim() else x

    return tuple(three(x) for x in args), {name: three(x) for name, x in kwargs.items()}
