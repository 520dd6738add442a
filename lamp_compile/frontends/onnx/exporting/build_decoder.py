"""A transformers decoder to an ONNX model."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import torch
from torch.export import Dim

from lamp_compile.errors import ModelError
from lamp_compile.frontends.onnx.exporting import describe, finish, kept_logits, trace
from lamp_compile.frontends.onnx.exporting import verify as verification
from lamp_compile.frontends.onnx.exporting.decoder import DecoderGraph
from lamp_compile.frontends.onnx.exporting.export import Artifact, token_ids
from lamp_compile.frontends.onnx.exporting.targets import Target
from lamp_compile.frontends.onnx.exporting.translate import Translation
from lamp_compile.runtime.ort import artifact

TRACED = {"batch": 2, "tokens": 5, "capacity": 96, "kept": 3}
"""Sizes of the example that is recorded; none of them ends up in the graph."""


def build(fast: Any, example_inputs: Any, target: Target, guard: str) -> Artifact:
    """The artifact of a compiled decoder.

    Raises:
        ModelError: See ``DecoderGraph``; or the plan replaces linear layers.
        InputError: See ``token_ids``.
    """
    lamp = fast.lamp
    if any(row.apply for row in lamp.plan.linears):
        raise ModelError(
            "linear layers in INT8 have no ONNX form yet", where="plan.linears", fix="compile(model) without linears"
        )
    text = lamp.original.config.get_text_config(decoder=True)
    longest = int(getattr(text, "max_position_embeddings", None) or 96)
    ids, what = token_ids(example_inputs, int(text.vocab_size), longest)
    if ids.shape[1] > longest:
        raise ModelError(f"windows of {ids.shape[1]} tokens", where="example_inputs", fix=f"at most {longest}")
    graph = DecoderGraph(fast).eval()
    translation = Translation(guard, target.arithmetic)
    program = _program(graph)
    traced = trace.to_onnx(program, translation, target.opset, type(lamp.original).__name__)
    model, names = traced.model, graph.cache_names()
    given = list(model.graph.inputs)[2:]
    kept = given.pop(0) if graph.chooses_logits else None
    renamed = dict(
        zip(
            [str(value.name) for value in (*given, *model.graph.outputs)],
            [*(f"past.{name}" for name in names), "logits", *(f"present.{name}" for name in names)],
            strict=True,
        )
    )
    finish.wire(model, translation)
    sites = {layer.name: str(index) for index, layer in enumerate(graph.layers)}
    finish.rename(model, translation, sites, renamed)
    finish.name_dimensions(model, _dimensions(names, "tokens" if kept is None else "kept"))
    trace.optimize(traced)
    if kept is not None:
        kept_logits.choose(model, kept)
    report = replace(lamp.report(), backend=f"ONNX, {target.name}", notes=())
    metadata = trace.metadata("decoder", report, target, guard)
    metadata[artifact.KEY] = json.dumps(describe.decoder(graph, lamp.original), separators=(",", ":"))
    metadata["lamp.sites"] = json.dumps(list(sites), separators=(",", ":"))
    proto = finish.to_proto(model, translation, target.opset, metadata)

    def verify(run: Any, reduced: bool) -> verification.Verification:
        tensors = graph.empty_cache(ids.shape[0], ids.shape[1])
        empty = {f"past.{name}": tensor.numpy() for name, tensor in zip(names, tensors, strict=True)}
        return verification.decoder(run, fast, empty, ids, reduced, what)

    return Artifact(proto, report, "decoder", verify)


def _program(graph: DecoderGraph) -> Any:
    batch, tokens = Dim("batch"), Dim("tokens")
    ids = torch.zeros(TRACED["batch"], TRACED["tokens"], dtype=torch.long)
    positions = torch.zeros(TRACED["batch"], dtype=torch.long)
    cache = graph.empty_cache(TRACED["batch"], TRACED["capacity"])
    shapes: tuple[dict[int, Any], ...] = tuple(_dynamic(name, batch) for name in graph.cache_names())
    if graph.chooses_logits:
        cache, shapes = [torch.arange(TRACED["kept"]), *cache], ({0: Dim("kept")}, *shapes)
    return trace.program(graph, (ids, positions, *cache), ({0: batch, 1: tokens}, {0: batch}, shapes))


def _dynamic(name: str, batch: Any) -> dict[int, Any]:
    grows = not name.endswith(("state", "stats"))
    return {0: batch, **({2: Dim.DYNAMIC} if grows else {})}


def _dimensions(names: list[str], rows: str) -> dict[str, tuple[str | None, ...]]:
    wanted: dict[str, tuple[str | None, ...]] = {
        "input_ids": ("batch", "tokens"),
        "positions": ("batch",),
        "logits": ("batch", rows),
    }
    for name in names:
        stored = name.endswith(("high", "residual"))
        second = "tiles" if stored else None if name.endswith(("state", "stats")) else "capacity"
        for side in ("past", "present"):
            wanted[f"{side}.{name}"] = ("batch", None, second)
    return wanted
