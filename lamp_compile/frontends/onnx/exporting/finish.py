"""From what torch's exporter gives to a file: names, inputs that may be left out, functions, metadata."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from lamp_compile.frontends.onnx import functions
from lamp_compile.frontends.onnx.exporting.translate import Translation
from lamp_compile.runtime import rotation

if TYPE_CHECKING:
    import onnx_ir as ir
    from onnx import ModelProto

KEPT_METADATA = "pkg.torch.onnx.name_scopes"
"""The only metadata of nodes that is kept: module paths. Stack traces hold the exporter's folders."""
PRODUCER = "lamp_compile"


def wire(model: ir.Model, translation: Translation) -> None:
    """Give the graph what its ``ai.lamp`` nodes need: rotations, the form of every ``Append``, settings and state as
    inputs that may be left out."""
    import onnx_ir as ir

    graph = model.graph
    for width, value in sorted(translation.rotations.items()):
        matrix = rotation.matrix(width, "hadamard", torch.empty(0))
        assert matrix is not None
        value.const_value = ir.tensor(matrix.numpy(), name=value.name)
        graph.initializers[str(value.name)] = value
    inputs = {str(value.name) for value in graph.inputs}
    for node in graph:
        if node.domain != functions.DOMAIN:
            continue
        site = node.attributes["site"].as_string()
        form = translation.sites[site]
        if node.op_type == "Append":
            node.overload = form.tag
            for name, item in functions.attributes_for("Append", form, site=site).items():
                node.attributes[name] = ir.convenience.convert_attributes({name: item})[0]
            continue
        for name, value in zip(functions.inputs_of(node.op_type, form), node.inputs, strict=True):
            if name not in (*functions.HOT, *functions.STATE) or value is None or not value.is_initializer():
                continue
            if value.name not in inputs:
                graph.inputs.append(value)
                inputs.add(str(value.name))
            if name in functions.STATE:
                graph.outputs.append(node.outputs[functions.outputs_of(node.op_type).index(f"{name}_new")])


def rename(model: ir.Model, translation: Translation, sites: Mapping[str, str], names: Mapping[str, str]) -> None:
    """Call settings ``lamp.<site>.tau`` and so on, new state ``lamp.<site>.state_new``, and other inputs and outputs as
    told.

    Args:
        model: After ``wire``.
        translation: Knows the form of every site.
        sites: Short name of every site (``"0"``, or its module path).
        names: New names of graph inputs and outputs by their old ones.
    """
    graph = model.graph
    for node in graph:
        if node.domain != functions.DOMAIN or node.op_type == "Append":
            continue
        site = node.attributes["site"].as_string()
        given = functions.inputs_of(node.op_type, translation.sites[site])
        for name, value in zip(given, node.inputs, strict=True):
            if name in (*functions.HOT, *functions.STATE) and value is not None and value.is_initializer():
                _rename(graph, value, f"lamp.{sites[site]}.{name}")
        for name, value in zip(functions.outputs_of(node.op_type), node.outputs, strict=True):
            if name.endswith("_new") and value.name not in names and value.is_graph_output():
                value.name = f"lamp.{sites[site]}.{name}"
    for value in (*graph.inputs, *graph.outputs):
        old = str(value.name)
        if old in names:
            _rename(graph, value, names[old])


def _rename(graph: Any, value: Any, name: str) -> None:
    old = value.name
    if old == name:
        return
    if old in graph.initializers:
        del graph.initializers[old]
        value.name = name
        if value.const_value is not None:
            value.const_value.name = name
        graph.initializers[name] = value
        return
    value.name = name


def name_dimensions(model: ir.Model, wanted: Mapping[str, tuple[str | None, ...]]) -> None:
    """Names of the dynamic dimensions of inputs and outputs, by the value's name; None leaves one as it is. The
    exporter's own (``s72``) are made plain: ``d0``, ``d1`` in order of appearance."""
    import onnx_ir as ir

    plain: dict[str, str] = {}
    for value in (*model.graph.inputs, *model.graph.outputs):
        if value.shape is None:
            continue
        dims: list[int | str] = []
        for index, dim in enumerate(value.shape):
            if isinstance(dim, int):
                dims.append(dim)
                continue
            given = wanted.get(str(value.name), ())
            named = given[index] if index < len(given) else None
            old = str(dim.value)
            dims.append(named or plain.setdefault(old, old if re.fullmatch(r"[a-z_]+", old) else f"d{len(plain)}"))
        value.shape = ir.Shape(dims)


def to_proto(model: ir.Model, translation: Translation, opset: int, metadata: Mapping[str, str]) -> ModelProto:
    """The checked model, with its functions and nothing in it that depends on where it was made.

    Args:
        model: After ``wire`` and ``rename``.
        translation: Knows the forms in use.
        opset: That of the model.
        metadata: Properties of the model.
    """
    import onnx
    import onnx_ir as ir

    strip(model)
    model.ir_version, model.producer_name, model.producer_version = functions.IR_VERSION, PRODUCER, None
    model.opset_imports[functions.DOMAIN] = functions.VERSION
    proto: ModelProto = ir.to_proto(model)
    proto.functions.extend(functions.functions_for(translation.sites.values(), opset))
    del proto.metadata_props[:]
    for name, value in sorted(metadata.items()):
        proto.metadata_props.add(key=name, value=value)
    for domain in [item for item in proto.opset_import if item.domain not in ("", functions.DOMAIN)]:
        proto.opset_import.remove(domain)
    if proto.ByteSize() < onnx.checker.MAXIMUM_PROTOBUF:
        onnx.checker.check_model(proto, full_check=True)
    return proto


def strip(model: ir.Model) -> None:
    """Drop the exporter's notes: stack traces and paths change from one folder to the next."""
    import onnx_ir as ir

    model.metadata_props.clear()
    model.doc_string = model.graph.doc_string = None
    model.graph.metadata_props.clear()
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        kept = node.metadata_props.get(KEPT_METADATA)
        node.metadata_props.clear()
        node.doc_string = None
        if kept is not None:
            node.metadata_props[KEPT_METADATA] = kept
        for value in node.outputs:
            value.metadata_props.clear()
            value.doc_string = None
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
        value.doc_string = None
