"""What a model must be before any other code sees it: no cycles, no value undefined or doubled, shapes that hold."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from typing import Any

from lamp_compile.frontends.onnx.files.functions_called import check_calls
from lamp_compile.frontends.onnx.files.limits import KNOWN_DOMAINS, Limits, bad, shown
from lamp_compile.frontends.onnx.files.operators import check_operator
from lamp_compile.frontends.onnx.files.tensors import Folder, check_shape, check_sparse, check_tensor, tensors_of

_EXPORT = "export the model again"
_KINDS = {
    1: "f", 2: "i", 3: "s", 4: "t", 5: "g", 6: "floats", 7: "ints", 8: "strings", 9: "tensors", 10: "graphs",
    11: "sparse_tensor", 12: "sparse_tensors", 13: "tp", 14: "type_protos",
}  # fmt: skip
_SINGLE = ("f", "i", "s", "t", "g", "sparse_tensor", "tp")


def check_model(model: Any, where: str, limits: Limits, domains: Collection[str], folder: Folder | None) -> None:
    """Check a parsed ``ModelProto``.

    Raises:
        InputError: The first thing found wrong, with where it is.
    """
    if model.training_info:
        raise bad("a model with training information", where, "export it for inference")
    if not model.HasField("graph"):
        raise bad("no graph in it", where, "is this an ONNX model? Weights alone have another format")
    _check_ir(model.ir_version, where)
    opsets = check_opsets(model.opset_import, domains, where, _own_domains(model))
    keys = {(f.domain, f.name, f.overload) for f in model.functions}
    check = _Check(limits, folder, opsets, keys)
    for function in model.functions:
        check.function(function, f"{where}, function {shown(function.domain + '.' + function.name)}", domains)
    check.graph(model.graph, (), f"{where}, graph {shown(model.graph.name)}")
    check_calls(model, limits, where)


def check_opsets(imports: Iterable[Any], domains: Collection[str], where: str, own: Collection[str]) -> dict[str, int]:
    """Versions by domain; "ai.onnx" is spelled ""."""
    from onnx import defs

    opsets: dict[str, int] = {}
    for entry in imports:
        domain = "" if entry.domain == "ai.onnx" else entry.domain
        if opsets.setdefault(domain, entry.version) != entry.version:
            raise bad(f"domain {shown(domain)} is imported in two versions", where, _EXPORT)
        if domain == "" and not 1 <= entry.version <= defs.onnx_opset_version():
            most = defs.onnx_opset_version()
            raise bad(f"opset {entry.version}", where, f"the installed onnx knows 1 to {most}: upgrade onnx")
        if not 0 <= entry.version < 2**31:
            raise bad(f"version {entry.version} of domain {shown(domain)}", where, _EXPORT)
        if "*" not in domains and domain not in (*KNOWN_DOMAINS, *domains, *own):
            raise bad(f"domain {shown(domain)} is unknown", where, "name it among the allowed domains if you trust it")
    return opsets


def _check_ir(version: int, where: str) -> None:
    import onnx

    if not 3 <= version <= onnx.IR_VERSION:
        fix = f"the installed onnx reads 3 to {onnx.IR_VERSION}: upgrade onnx, or export the model again"
        raise bad(f"IR version {version}", where, fix)


def _own_domains(model: Any) -> set[str]:
    return {function.domain for function in model.functions}


class _Scope:
    """Names that may be read, from here outwards."""

    def __init__(self, outer: tuple[set[str], ...]) -> None:
        self.names: set[str] = set()
        self.chain = (self.names, *outer)

    def define(self, name: str, what: str, where: str) -> None:
        if any(name in names for names in self.chain):
            raise bad(f"{what} {shown(name)} is defined twice", where, "give every value its own name")
        self.names.add(name)

    def knows(self, name: str) -> bool:
        return any(name in names for names in self.chain)


class _Check:
    def __init__(
        self, limits: Limits, folder: Folder | None, opsets: dict[str, int], functions: set[tuple[str, str, str]]
    ) -> None:
        self.limits, self.folder, self.opsets, self.functions = limits, folder, opsets, functions
        self.parameters: frozenset[str] | None = None  # attributes of the function around, if any

    def graph(self, graph: Any, outer: tuple[set[str], ...], where: str) -> None:
        """A graph or subgraph. Nesting was bounded when the bytes were walked."""
        scope = _Scope(outer)
        shapes = {}
        for given in graph.input:
            if not given.name:
                raise bad("a graph input without a name", where, _EXPORT)
            scope.define(given.name, "input", where)
            shapes[given.name] = self.value_type(given, where)
        self.initializers(graph, scope, shapes, where)
        self.nodes(graph.node, scope, where)
        for given in [*graph.output, *graph.value_info]:
            self.value_type(given, where)
        seen: set[str] = set()
        for given in graph.output:
            if not scope.knows(given.name):
                raise bad(f"output {shown(given.name)} is never computed", where, _EXPORT)
            if given.name in seen:
                raise bad(f"output {shown(given.name)} is listed twice", where, _EXPORT)
            seen.add(given.name)

    def initializers(self, graph: Any, scope: _Scope, shapes: dict[str, Any], where: str) -> None:
        seen: set[str] = set()
        sparse = [(s.values.name, s, True) for s in graph.sparse_initializer]
        for name, tensor, is_sparse in [*((t.name, t, False) for t in graph.initializer), *sparse]:
            here = f"{where}, initializer {shown(name)}"
            if not name or name in seen:
                raise bad("an initializer that has no name, or the name of another", here, _EXPORT)
            seen.add(name)
            if name not in shapes:  # the default value of an input shares its name
                scope.define(name, "initializer", where)
            if is_sparse:
                check_sparse(tensor, self.limits, here)
                continue
            check_tensor(tensor, self.limits, self.folder, here)
            declared = shapes.get(name)
            if declared is not None and not _agree(declared, list(tensor.dims)):
                raise bad(f"shape {list(tensor.dims)} under an input of shape {declared}", here, _EXPORT)

    def nodes(self, nodes: Any, scope: _Scope, where: str) -> None:
        for index, node in enumerate(nodes):
            here = f"{where}, node {index} ({shown(node.op_type)}{f' {shown(node.name)}' if node.name else ''})"
            check_operator(node, self.opsets, self.functions, here)
            for name in node.input:
                if name and not scope.knows(name):
                    raise _undefined(nodes, index, name, here)
            self.attributes(node, scope, here)
            for name in node.output:
                if name:
                    scope.define(name, "value", here)

    def attributes(self, node: Any, scope: _Scope, where: str) -> None:
        seen: set[str] = set()
        for attribute in node.attribute:
            here = f"{where}, attribute {shown(attribute.name)}"
            if not attribute.name or attribute.name in seen:
                raise bad("an attribute that has no name, or the name of another", here, _EXPORT)
            seen.add(attribute.name)
            self.attribute(attribute, here)
            for graph in _graphs(attribute):
                self.graph(graph, scope.chain, f"{here}, graph {shown(graph.name)}")

    def attribute(self, attribute: Any, where: str) -> None:
        if attribute.ref_attr_name:
            if self.parameters is None or attribute.ref_attr_name not in self.parameters:
                what = f"it stands for the attribute {shown(attribute.ref_attr_name)} of a function that has none such"
                raise bad(what, where, _EXPORT)
            return
        if attribute.type not in _KINDS:
            raise bad(f"attribute type {attribute.type}", where, _EXPORT)
        held = _KINDS[attribute.type]
        filled = [name for name in _KINDS.values() if name != held and _filled(attribute, name)]
        if filled:
            raise bad(f"its type says {held}, it holds {filled[0]}", where, _EXPORT)
        if held in ("t", "g", "sparse_tensor", "tp") and not attribute.HasField(held):
            raise bad(f"its type says {held}, it holds none", where, _EXPORT)
        for tensor in tensors_of(attribute):
            check_tensor(tensor, self.limits, self.folder, where)
        for sparse in [*([attribute.sparse_tensor] if held == "sparse_tensor" else []), *attribute.sparse_tensors]:
            check_sparse(sparse, self.limits, where)
        for kind in [*([attribute.tp] if held == "tp" else []), *attribute.type_protos]:
            self.type_proto(kind, where)

    def function(self, function: Any, where: str, domains: Collection[str]) -> None:
        """A model-local function: its body sees its inputs and nothing else."""
        outer = self.opsets, self.parameters
        own = {domain for domain, _, _ in self.functions}
        self.opsets = check_opsets(function.opset_import, domains, where, own)
        self.parameters = frozenset([*function.attribute, *(a.name for a in function.attribute_proto)])
        scope = _Scope(())
        for name in function.input:
            scope.define(name, "input", where)
        for default in function.attribute_proto:
            if default.ref_attr_name:
                raise bad("a default that stands for another attribute", where, _EXPORT)
            if default.HasField("g") or default.graphs:
                raise bad("a graph as default of an attribute", where, "no runtime reads that: " + _EXPORT)
            self.attribute(default, where)
        self.nodes(function.node, scope, where)
        for name in function.output:
            if not scope.knows(name):
                raise bad(f"output {shown(name)} is never computed", where, _EXPORT)
        for given in function.value_info:
            self.value_type(given, where)
        self.opsets, self.parameters = outer

    def value_type(self, given: Any, where: str) -> list[int | None] | None:
        """Checks a declared type; gives back the shape of a tensor, None for a dimension that is not a number."""
        here = f"{where}, value {shown(given.name)}"
        return self.type_proto(given.type, here) if given.HasField("type") else None

    def type_proto(self, kind: Any, where: str) -> list[int | None] | None:
        for name in ("tensor_type", "sparse_tensor_type"):
            if kind.HasField(name):
                return self.tensor_type(getattr(kind, name), where)
        for name in ("sequence_type", "optional_type"):
            if kind.HasField(name):
                self.type_proto(getattr(kind, name).elem_type, where)
        if kind.HasField("map_type"):
            self.type_proto(kind.map_type.value_type, where)
        return None

    def tensor_type(self, tensor: Any, where: str) -> list[int | None] | None:
        if not 0 <= tensor.elem_type <= 28:
            raise bad(f"element type {tensor.elem_type}, which is none", where, _EXPORT)
        if not tensor.HasField("shape"):
            return None
        dims = [d.dim_value if d.HasField("dim_value") else None for d in tensor.shape.dim]
        check_shape([size for size in dims if size is not None], self.limits, where)
        return dims


def _agree(declared: list[int | None], dims: list[int]) -> bool:
    return len(declared) == len(dims) and all(a is None or a == b for a, b in zip(declared, dims, strict=True))


def _filled(attribute: Any, name: str) -> bool:
    return bool(attribute.HasField(name) if name in _SINGLE else len(getattr(attribute, name)))


def _graphs(attribute: Any) -> list[Any]:
    return [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]


def read_by(node: Any) -> Iterator[str]:
    """Every name that a node reads, those that its subgraphs read included."""
    yield from (name for name in node.input if name)
    for attribute in node.attribute:
        for graph in _graphs(attribute):
            for inner in graph.node:
                yield from read_by(inner)
            yield from (given.name for given in graph.output)


def _undefined(nodes: Any, index: int, name: str, where: str) -> Exception:
    """Which of three mistakes it is: a cycle, an order that is none, or a value from nowhere."""
    maker = {out: i for i, node in enumerate(nodes) for out in node.output if out}
    if name not in maker:
        return bad(f"input {shown(name)} is not defined", where, "export the model again: a part of it is missing")
    target, seen, waiting = {out for out in nodes[index].output if out}, {maker[name]}, [maker[name]]
    while waiting:
        for read in read_by(nodes[waiting.pop()]):
            if read in target:
                return bad(f"the graph has a cycle through {shown(name)}", where, _EXPORT)
            if read in maker and maker[read] not in seen:
                seen.add(maker[read])
                waiting.append(maker[read])
    return bad(f"input {shown(name)} is used before it is defined", where, "sort the nodes: onnx wants them in order")
