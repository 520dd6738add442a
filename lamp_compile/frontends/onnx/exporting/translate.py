"""From ``lamp_onnx::`` operators to ``ai.lamp`` nodes, for torch's ONNX exporter.

The exporter inlines every function it is given, so each operator becomes one node of a domain that it does not know;
the functions are attached afterwards (``finish``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from lamp_compile.frontends.onnx import functions
from lamp_compile.frontends.onnx.form import Form

_CALLED = {"append": "Append", "fused_attention": "FusedAttention", "uncached_attention": "UncachedAttention"}
_TENSORS = {
    "append": ("k", "v", *functions.PLANES, "positions", "balance"),
    "fused_attention": ("q", *functions.PLANES, *functions.HOT, *functions.STATE, "lengths", "balance", "sinks"),
    "uncached_attention": (
        "q", "k", "v", *functions.HOT, *functions.STATE, "balance", "mask", "bias", "sinks",
    ),
}  # fmt: skip
"""Names of the operators' tensors, in order."""


@dataclass
class Translation:
    """One export: what its nodes are, and what they need of the model around them.

    Attributes:
        guard: "if" or "select".
        arithmetic: "integer" or "float".
        sites: Form of every attention, by site.
        rotations: Values that stand for the rotation matrices, by size.
    """

    guard: str
    arithmetic: str
    sites: dict[str, Form] = field(default_factory=dict)
    rotations: dict[int, Any] = field(default_factory=dict)

    def table(self) -> dict[Callable[..., Any], Callable[..., Any]]:
        """The custom translation table for ``torch.onnx.export``."""
        import torch

        from lamp_compile.frontends.onnx.exporting import torch_ops as _torch_ops  # noqa: F401  (registers the operators)

        ops = torch.ops.lamp_onnx
        return {getattr(ops, name).default: self._translator(name) for name in _CALLED}

    def _translator(self, name: str) -> Callable[..., Any]:
        # A function of its own for each: the exporter hangs its reading of the signature on it.
        def translated(*tensors: Any, **options: Any) -> Any:
            return self._node(name, tensors, options)

        return translated

    def _node(self, name: str, tensors: tuple[Any, ...], options: dict[str, Any]) -> Any:
        import onnx_ir as ir
        from onnxscript import evaluator

        op, given = _CALLED[name], dict(zip(_TENSORS[name], tensors, strict=True))
        site = options["site"]
        form = self._form(name, given, options)
        if name == "append":
            widths = (given["k"].shape[3], given["v"].shape[3])
        else:
            self.sites[site] = form
            value = given["v"].shape[3] if "v" in given else 2 * given["v_high"].shape[3]
            widths = (given["q"].shape[3], value)
        if form.rotation:
            given["rotate_k"], given["rotate_v"] = (self._rotation(int(width)) for width in widths)
        attributes = functions.attributes_for(op, form, **_numbers(name, form, options))
        node = ir.Node(
            functions.DOMAIN, op, [given[item] for item in functions.inputs_of(op, form)],
            ir.convenience.convert_attributes(attributes), overload=form.tag, version=functions.VERSION,
            num_outputs=len(functions.outputs_of(op)),
        )  # fmt: skip
        evaluator.default().nodes.append(node)  # type: ignore[attr-defined]
        return list(node.outputs)

    def _form(self, name: str, given: dict[str, Any], options: dict[str, Any]) -> Form:
        has = {item: given.get(item) is not None for item in ("balance", "bias", "sinks")}
        rotation = options["rotation"] != "none"
        if name == "append":
            # Of a form only the storage matters here; whatever attends over it decides about the rest.
            same = int(given["k"].shape[3]) == int(given["v"].shape[3])
            return Form(self.guard, self.arithmetic, rotation=rotation, balance=has["balance"], paired=same)
        mask, cache = given.get("mask"), name == "fused_attention"
        paired = cache and int(given["k_high"].shape[4]) == int(given["v_high"].shape[3])
        return Form(
            self.guard, self.arithmetic, options["rule"], options["query_bits"], options["subtile"],
            tile=options.get("tile", 32), rotation=rotation, causal=options["causal"], window=options["window"] > 0,
            softcap=options["softcap"] != 0, mask="" if mask is None else "column" if mask.shape[3] == 1 else "keys",
            paired=paired, cache=cache, **has,
        )  # fmt: skip

    def _rotation(self, width: int) -> Any:
        import onnx_ir as ir

        if width not in self.rotations:
            self.rotations[width] = ir.Value(
                name=f"lamp.rotation.{width}", shape=ir.Shape((width, width)), type=ir.TensorType(ir.DataType.FLOAT)
            )
        return self.rotations[width]


def _numbers(name: str, form: Form, options: dict[str, Any]) -> dict[str, Any]:
    taken = {"site": options["site"]}
    if name == "append":
        return taken
    for item in ("scale", "guard_window", "guard_hold", "hysteresis"):
        taken[item] = options[item]
    for item in ("window", "softcap"):
        if getattr(form, item):
            taken[item] = options[item]
    return taken
