"""An ONNX model as a neutral program: functions and bodies in full, constants as text, metadata left out."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lamp_compile.diff.graph import DEEPEST, Function, Graph, Node, Param, Program, Ref, Text, Type
from lamp_compile.diff.readers import onnx_tensors as tensors
from lamp_compile.diff.sites import HOT, from_call
from lamp_compile.errors import InputError

if TYPE_CHECKING:
    from lamp_compile.frontends.onnx.files.reading import Folder

_PATH = re.compile(r"[A-Za-z_]\w*(\.\w+)+")
"""Initialisers with such a name are parameters, known by it; all others are constants, known by what they hold."""
_HOT = re.compile(r"(^|[._/])(tau|floor|budget)$")
_SCOPES = "pkg.torch.onnx.name_scopes"
LAMP = ("ai.lamp", "lamp")


def read_model(model: Any, folder: Folder | None = None, weights: bool = False) -> Program:
    """A ModelProto.

    Args:
        model: The model.
        folder: Where external data lies; None where it may not be read.
        weights: Hash the values of parameters too.

    Raises:
        InputError: The graph is broken (a value is used that nothing makes).
    """
    return _Reader(model, folder, weights).program()


@dataclass
class _Reader:
    model: Any
    folder: Folder | None
    weights: bool
    opsets: dict[str, int] = field(default_factory=dict)
    program_: Program = field(default_factory=lambda: Program("onnx"))
    functions: dict[tuple[str, str, str], Any] = field(default_factory=dict)
    constants: dict[str, str] = field(default_factory=dict)
    inside: bool = False
    """Whether a function's body is being read: calls in it belong to no site."""
    small: dict[str, str] = field(default_factory=dict)

    def program(self) -> Program:
        model, made = self.model, self.program_
        self.opsets = {o.domain or "": o.version for o in model.opset_import}
        self.functions = {(f.domain, f.name, _overload(f)): f for f in model.functions}
        made.facts = {"ir_version": str(model.ir_version)}
        made.facts |= {f"opset.{domain or 'ai.onnx'}": str(version) for domain, version in self.opsets.items()}
        made.versions = {model.producer_name or "producer": model.producer_version or "unknown"}
        graph = model.graph
        self.constants = made.constants
        values = {v.name: tensors.type_of(v) for v in (*graph.value_info, *graph.input, *graph.output)}
        self._initializers(graph, top=True)
        made.inputs = [(v.name, v.name, values[v.name]) for v in graph.input if v.name not in made.params]
        for name in sorted(
            {v.name for v in graph.input} & set(made.constants)
        ):  # an initialiser that can be fed: a default, and an input all the same
            made.facts[f"default.{name}"] = made.constants.pop(name)
        made.facts |= {f"override.{v.name}": "allowed" for v in graph.input if v.name in made.params}
        made.outputs = [(v.name, values[v.name]) for v in graph.output]
        made.graph = self._graph(graph, values, self.opsets, 0)
        for function in model.functions:
            made.functions.append(self._function(function))
        return made

    def _initializers(self, graph: Any, top: bool) -> None:
        for item in graph.initializer:
            text, small = tensors.literal(item, self.folder, values=True)
            type_ = Type(tensors.dtype(item.data_type), tuple(item.dims))
            if top and _PATH.fullmatch(item.name):
                hot = small and bool(_HOT.search(item.name))
                if self.weights:
                    text = tensors.literal(item, self.folder, values=True, always=True)[0]
                value = text[text.index("]") + 1 :] if hot or self.weights else ""
                self.program_.params[item.name] = Param(item.name, type_, value)
            else:
                self.constants[item.name] = text
            if small:
                self.small[item.name] = text
        for item in graph.sparse_initializer:
            self.constants[item.values.name] = f"sparse{tensors.literal(item.values, self.folder)[0]}"

    def _graph(self, graph: Any, values: Mapping[str, Any], opsets: Mapping[str, int], depth: int) -> Graph:
        """The graph (depth 0) or a body. A body has its own constants: branches may use one name for two."""
        if depth > DEEPEST:
            raise InputError(
                f"more than {DEEPEST} graphs in graphs", where=graph.name or "graph", fix="flatten the model"
            )
        values = {**values, **{v.name: tensors.type_of(v) for v in (*graph.value_info, *graph.input)}}
        if not depth:
            nodes = self._nodes(graph.node, values, opsets, 0)
            return Graph([v.name for v in graph.input], nodes, [_operand(v.name) for v in graph.output])
        outer, small = self.constants, self.small
        self.constants, self.small = {}, dict(small)
        self._initializers(graph, top=False)
        nodes = self._nodes(graph.node, values, opsets, depth)
        made = Graph([v.name for v in graph.input], nodes, [_operand(v.name) for v in graph.output])
        inline, self.constants, self.small = self.constants, outer, small
        return _inlined(made, inline)

    def _nodes(
        self, nodes: Iterable[Any], values: Mapping[str, Any], opsets: Mapping[str, int], depth: int
    ) -> list[Node]:
        made = []
        for node in nodes:
            if node.op_type == "Constant" and node.domain in ("", "ai.onnx") and len(node.output) == 1:
                text = self._constant(node)
                if text is not None:
                    self.constants[node.output[0]] = self.small[node.output[0]] = text
                    continue
            made.append(self._node(node, values, opsets, depth))
        return made

    def _node(self, node: Any, values: Mapping[str, Any], opsets: Mapping[str, int], depth: int) -> Node:
        domain = "" if node.domain == "ai.onnx" else node.domain
        op = f"{domain}::{node.op_type}" if domain else node.op_type
        formal = self._formal(node)
        hot = [name if name in HOT else "" for name in formal] + [""] * (len(node.input) - len(formal))
        arguments: list[tuple[str, Text]] = [(h, _operand(x)) for h, x in zip(hot, node.input, strict=False)]
        while arguments and arguments[-1][1] == ("_",):
            arguments.pop()
        defaults = self._defaults(node, domain, opsets)
        attributes, bodies = {"overload": json.dumps(_overload(node))} if _overload(node) else {}, []
        for item in sorted(node.attribute, key=lambda a: a.name):
            graphs = [item.g] if item.type == item.GRAPH else list(item.graphs)
            for index, graph in enumerate(graphs):
                name = item.name if len(graphs) == 1 else f"{item.name}.{index}"
                bodies.append((name, self._graph(graph, values, opsets, depth + 1)))
            if graphs:
                continue
            text = tensors.attribute(item, self.folder)
            if defaults.get(item.name) != text:
                attributes[item.name] = text
        outputs = list(node.output)
        while outputs and not outputs[-1]:
            outputs.pop()
        types = [values.get(name) for name in outputs]
        if domain in LAMP and not self.inside:
            self._site(node, defaults | attributes)
        return Node(op, arguments, attributes, outputs, types, _scope(node), bodies)

    def _constant(self, node: Any) -> str | None:
        """Its value as text; None where it refers to an attribute of a function."""
        (item,) = node.attribute if len(node.attribute) == 1 else (None,)
        if item is None or item.ref_attr_name:
            return None
        return tensors.constant(item, self.folder)

    def _function(self, function: Any) -> Function:
        opsets = {o.domain or "": o.version for o in function.opset_import} or self.opsets
        values = {v.name: tensors.type_of(v) for v in getattr(function, "value_info", ())}
        outer, small = self.constants, self.small
        self.constants, self.small, self.inside = {}, {}, True
        nodes = self._nodes(function.node, values, opsets, 0)
        self.inside = False
        graph = Graph(list(function.input), nodes, [_operand(name) for name in function.output])
        inline, self.constants, self.small = self.constants, outer, small
        attributes = dict.fromkeys(function.attribute, "required")
        attributes |= {a.name: tensors.attribute(a, self.folder) for a in function.attribute_proto}
        name = f"{function.domain}::{function.name}" + (f":{_overload(function)}" if _overload(function) else "")
        used = tuple(f"{domain or 'ai.onnx'}:{version}" for domain, version in opsets.items())
        return Function(name, _inlined(graph, inline), tuple(function.input), attributes, used)

    def _defaults(self, node: Any, domain: str, opsets: Mapping[str, int]) -> dict[str, str]:
        function = self.functions.get((node.domain, node.op_type, _overload(node)))
        if function is not None:
            return {a.name: tensors.attribute(a, self.folder) for a in function.attribute_proto}
        return tensors.schema_defaults(domain, node.op_type, opsets.get(domain, 1))

    def _formal(self, node: Any) -> tuple[str, ...]:
        """Names of the inputs of the function that a ``lamp`` node calls."""
        function = self.functions.get((node.domain, node.op_type, _overload(node))) if node.domain in LAMP else None
        return tuple(function.input) if function is not None else ()

    def _site(self, node: Any, attributes: Mapping[str, str]) -> None:
        formal = self._formal(node)
        hot = {name: self.small[x] for name, x in zip(formal, node.input, strict=False) if x in self.small}
        for x in node.input:
            if x in self.small and x in self.program_.params:
                param = self.program_.params[x]
                text = self.small[x]
                self.program_.params[x] = Param(param.path, param.type, text[text.index("]") + 1 :])
        settings = {name: json_value(text) for name, text in attributes.items()}
        site = settings.get("site") or _scope(node) or node.name
        from_call(self.program_.sites, str(site), node.op_type, settings, hot)


def _overload(of: Any) -> str:
    """Of a node or function; models before IR version 10 have none."""
    return str(getattr(of, "overload", ""))


def _operand(name: str) -> Text:
    return (Ref(name),) if name else ("_",)


def json_value(text: str) -> Any:
    """An attribute's text as data where it is JSON."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _inlined(graph: Graph, constants: Mapping[str, str]) -> Graph:
    """Constants of a function in the place of references: ids are private to each function."""

    def text(parts: Text) -> Text:
        return tuple(constants.get(p.id, p) if isinstance(p, Ref) else p for p in parts)

    for node in graph.nodes:
        node.arguments = [(key, text(parts)) for key, parts in node.arguments]
        node.bodies = [(name, _inlined(body, constants)) for name, body in node.bodies]
    graph.results = [text(parts) for parts in graph.results]
    return graph


def _scope(node: Any) -> str:
    """The module a node comes from, as torch's exporter noted it."""
    for item in node.metadata_props:
        if item.key == _SCOPES:
            try:
                names = ast.literal_eval(item.value)
            except (ValueError, SyntaxError, MemoryError, RecursionError):
                return ""
            found = [n for n in names if isinstance(n, str) and n and not n.startswith("_empty")] if names else []
            return found[-2] if len(found) > 1 else ""
    return ""
