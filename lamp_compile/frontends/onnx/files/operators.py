"""Whether a node names an operator that exists, with inputs, outputs and attributes as that takes them."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, cast

from lamp_compile.frontends.onnx.files.limits import bad, shown

_CHECKED = ("", "ai.onnx.ml")
_OF_ONNX_RUNTIME = ("SimplifiedLayerNormalization", "LayerNormalization")
"""Operators that ONNX Runtime's own tools write into the standard's domain, where it lacks them."""


def check_operator(node: Any, opsets: dict[str, int], functions: set[tuple[str, str, str]], where: str) -> None:
    """Domains must be imported; operators of the standard's domains must exist. Others are left to who runs them.

    Raises:
        InputError: The domain is not imported, the operator unknown, or its number of inputs or outputs or the type of
            an attribute impossible.
    """
    domain = "" if node.domain == "ai.onnx" else node.domain
    if not node.op_type:
        raise bad("a node without an operator", where, "export the model again")
    if domain not in opsets:
        raise bad(f"domain {shown(domain)} is not imported", where, "list it in opset_import")
    if (node.domain, node.op_type, node.overload) in functions or domain not in _CHECKED:
        return
    bounds = _bounds(node.op_type, opsets[domain], domain)
    if bounds is None and node.op_type in _OF_ONNX_RUNTIME:
        return
    if bounds is None:
        raise bad(
            f"operator {shown(node.op_type)} does not exist in opset {opsets[domain]} of domain {shown(domain)}",
            where,
            "export the model for an opset that has it",
        )
    for what, count, (least, most) in (
        ("inputs", len(node.input), bounds[0]),
        ("outputs", len(node.output), bounds[1]),
    ):
        if not least <= count <= most:
            raise bad(f"{count} {what}, {node.op_type} takes {least} to {most}", where, "export the model again")
    for given in node.attribute:
        kind = bounds[2].get(given.name)
        if kind is None:
            raise bad(f"{node.op_type} has no attribute {shown(given.name)}", where, "export the model again")
        if given.type != kind:
            what = f"attribute {shown(given.name)} is of type {given.type}, {node.op_type} takes {kind}"
            raise bad(what, where, "export the model again")


_Bounds = tuple[tuple[int, int], tuple[int, int], dict[str, int]]


@lru_cache(maxsize=4096)
def _bounds(operator: str, version: int, domain: str) -> _Bounds | None:
    from onnx import defs

    try:
        schema = defs.get_schema(operator, version, domain)
    except defs.SchemaError:
        return None
    if schema.deprecated:
        return None
    kinds = {name: int(cast(Any, attribute.type)) for name, attribute in schema.attributes.items()}
    return (schema.min_input, schema.max_input), (schema.min_output, schema.max_output), kinds
