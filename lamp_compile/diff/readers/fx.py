"""FX graphs and exported programs in memory. An exported program reads as its ``.pt2`` archive does."""

from __future__ import annotations

import operator
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node
from torch.utils import _pytree

from lamp_compile.diff import literals
from lamp_compile.diff.graph import DEEPEST, Graph, Param, Program, Ref, Text, Type
from lamp_compile.diff.readers import torch_calls
from lamp_compile.diff.readers.pt2 import tree
from lamp_compile.diff.readers.torch_calls import Call, Word
from lamp_compile.errors import InputError

_SYM = (torch.SymInt, torch.SymFloat, torch.SymBool)
_UNKNOWN = object()


def read_exported(program: ExportedProgram, weights: bool = False) -> Program:
    """An exported program."""
    made = Program("torch", versions={"torch": torch.__version__})
    state = {**program.state_dict, **program.constants}
    signature = program.graph_signature
    holders = {n.name: n for n in program.graph.nodes if n.op == "placeholder"}
    values: dict[str, str] = {}
    for spec in signature.input_specs:
        kind, name = spec.kind.name.lower(), getattr(spec.arg, "name", "")
        type_ = _type(_meta(holders[name])) if name in holders else None
        tensor = state.get(spec.target) if spec.target else None
        if kind == "user_input":
            if type_ is not None:
                made.inputs.append((name, name, type_))
        elif kind in ("parameter", "buffer") and isinstance(tensor, Tensor):
            _param(made, name, str(spec.target), tensor, values, weights)
        elif kind == "constant_tensor" and isinstance(tensor, Tensor):
            made.constants[name] = _literal(tensor)
        else:
            made.inputs.append((name, f"{kind} {spec.target or name}", Type(kind)))
    _read(made, program.graph_module, values)
    assert made.graph is not None
    names, users = [], 0
    for out in signature.output_specs:
        kind = out.kind.name.lower()
        names.append(f"output.{users}" if kind == "user_output" else f"{kind}.{out.target or ''}")
        users += kind == "user_output"
    made.outputs = list(zip(names, _results(program.graph_module), strict=True))
    made.ranges = {str(s): (_limit(r.lower), _limit(r.upper)) for s, r in program.range_constraints.items()}
    spec_of = program.call_spec
    for name, found in (("in_spec", spec_of.in_spec), ("out_spec", spec_of.out_spec)):
        if found is not None:
            made.facts[name] = tree(_pytree.treespec_dumps(found, 1))
    return made


def read_graph_module(module: GraphModule, weights: bool = False) -> Program:
    """An FX graph: Dynamo's, or of any tracer."""
    made = Program("torch", versions={"torch": torch.__version__})
    for node in module.graph.nodes:
        if node.op == "placeholder":
            made.inputs.append((node.name, str(node.target), _type(_meta(node)) or Type("?")))
    values: dict[str, str] = {}
    for node in module.graph.nodes:
        held = _held(module, str(node.target)) if node.op == "get_attr" else None
        if isinstance(held, Tensor):
            _param(made, node.name, str(node.target), held, values, weights)
    _read(made, module, values)
    assert made.graph is not None
    made.outputs = [(f"output.{index}", t) for index, t in enumerate(_results(module))]
    return made


def _param(made: Program, id_: str, path: str, tensor: Tensor, values: dict[str, str], weights: bool) -> None:
    type_ = Type(_dtype(tensor.dtype), tuple(tensor.shape))
    made.params[id_] = Param(path, type_, literals.digest(_bytes(tensor)) if weights else "")
    if tensor.numel() <= literals.MOST_INLINE:
        values[id_] = _literal(tensor)


def _read(made: Program, module: GraphModule, values: Mapping[str, str]) -> None:
    calls, results = _calls(module, 0, made)
    labels = {id_: param.path for id_, param in made.params.items()} | {id_: name for id_, name, _ in made.inputs}
    made.graph = Graph([i for i, _, _ in made.inputs], torch_calls.nodes(calls, labels, values, made.sites), results)
    for call in calls:
        for name, value in call.arguments if call.op.startswith("lamp.") else ():
            if name in torch_calls.HOT and isinstance(value, Ref) and value.id in values and value.id in made.params:
                param, text = made.params[value.id], values[value.id]
                made.params[value.id] = Param(param.path, param.type, text[text.index("]") + 1 :])


def _calls(module: GraphModule, depth: int, made: Program) -> tuple[list[Call], list[Text]]:
    if depth > DEEPEST:
        raise InputError(f"more than {DEEPEST} graphs in graphs", where="graph", fix="flatten the program")
    calls: dict[str, Call] = {}
    names: dict[Node, str] = {}
    results: list[Text] = []
    for node in module.graph.nodes:
        names[node] = node.name
        if node.op == "output":
            results = [torch_calls.render(_value(x, names, module, depth, made)) for x in _flat(node.args[0])]
        elif node.op == "get_attr" and isinstance(_held(module, str(node.target)), GraphModule | Tensor):
            continue
        elif node.op != "placeholder":
            source = node.args[0] if node.target is operator.getitem else None
            if (
                isinstance(source, Node)
                and isinstance(node.args[1], int)
                and _several(source)
                and names[source] in calls
            ):
                owner = calls[names[source]]
                owner.outputs[node.args[1]] = names[node] = owner.outputs[node.args[1]] or node.name
                continue
            calls[node.name] = _call(node, names, module, depth, made)
    return list(calls.values()), results


def _call(node: Node, names: dict[Node, str], module: GraphModule, depth: int, made: Program) -> Call:
    op, found = _operator(node, module)
    given = list(node.args)
    keys: list[str]
    if found is not None:
        keys = [argument.name for argument in found._schema.arguments]
    elif "operator" in op and len(given) == 2:
        keys = ["a", "b"]
    else:
        keys = []
    arguments = [(keys[i] if i < len(keys) else "", _value(x, names, module, depth, made)) for i, x in enumerate(given)]
    arguments += [(key, _value(x, names, module, depth, made)) for key, x in node.kwargs.items()]
    if node.op == "call_module":
        arguments.append(("module", str(node.target)))
    meta = _meta(node)
    if _several(node):
        return Call(op, arguments, [""] * len(meta), [_type(x) for x in meta], _scope(node))
    empty = meta is None or (isinstance(meta, tuple | list) and not meta)
    nothing = empty and found is not None and not found._schema.returns
    outputs = [] if nothing else [node.name]
    return Call(op, arguments, outputs, [_type(meta)] * len(outputs), _scope(node))


def _operator(node: Node, module: GraphModule) -> tuple[str, Any]:
    target = node.target
    if isinstance(target, torch._ops.OpOverloadPacket):
        target = getattr(target, "default", target)
    if isinstance(target, torch._ops.OpOverload):
        return torch_calls.short(str(target)), target
    if isinstance(target, torch._ops.HigherOrderOperator):
        return f"higher_order.{target._name}", None
    if node.op == "call_method":
        return f"method.{target}", None
    if node.op == "call_module":
        return f"module.{type(module.get_submodule(str(target))).__name__}", None
    if node.op == "get_attr":
        return f"attribute.{target}", None
    where = (getattr(target, "__module__", None) or "torch").removeprefix("_")
    return f"{where}.{getattr(target, '__name__', type(target).__name__)}", None


def _value(x: Any, names: dict[Node, str], module: GraphModule, depth: int, made: Program) -> Any:
    if isinstance(x, Node):
        held = _held(module, str(x.target)) if x.op == "get_attr" else None
        if isinstance(held, GraphModule):
            calls, results = _calls(held, depth + 1, made)
            inputs = [n.name for n in held.graph.nodes if n.op == "placeholder"]
            return Graph(inputs, torch_calls.nodes(calls, {}, {}, made.sites), results)
        return Ref(names[x])
    if isinstance(x, list | tuple):
        return [_value(item, names, module, depth, made) for item in x]
    if isinstance(x, dict):
        return {str(key): _value(item, names, module, depth, made) for key, item in x.items()}
    if isinstance(x, slice):
        return [Word("slice"), *(_value(item, names, module, depth, made) for item in (x.start, x.stop, x.step))]
    if isinstance(x, torch.dtype):
        return Word(_dtype(x))
    if isinstance(x, torch.device | torch.layout | torch.memory_format):
        return Word(str(x).removeprefix("torch."))
    if x is None or isinstance(x, bool | int | float | str):
        return x
    return Word("...") if x is Ellipsis else Word(type(x).__name__)


def _flat(x: Any) -> list[Any]:
    if isinstance(x, list | tuple):
        return [leaf for item in x for leaf in _flat(item)]
    if isinstance(x, dict):
        return [leaf for item in x.values() for leaf in _flat(item)]
    return [x]


def _results(module: GraphModule) -> list[Type | None]:
    (out,) = (node for node in module.graph.nodes if node.op == "output")
    return [_type(_meta(x)) if isinstance(x, Node) else None for x in _flat(out.args[0])]


def _held(module: GraphModule, target: str) -> Any:
    found: Any = module
    for part in target.split("."):
        found = getattr(found, part, None)
    return found


def _meta(node: Node) -> Any:
    return node.meta.get("val", node.meta.get("example_value"))


def _several(node: Node) -> bool:
    """It returns a tuple or list of values, taken apart by getitem."""
    meta = _meta(node)
    return isinstance(meta, tuple | list) and len(meta) > 0


def _type(x: Any) -> Type | None:
    if isinstance(x, Tensor):
        return Type(_dtype(x.dtype), tuple(map(_size, x.shape)))
    if isinstance(x, _SYM):
        return Type("sym", (_size(x),))
    return None


def _size(x: Any) -> Any:
    if not isinstance(x, _SYM):
        return x
    import sympy

    return torch_calls.size(sympy.srepr(x.node.expr))


def _limit(x: Any) -> int | None:
    number = int(x) if isinstance(x, int) or getattr(x, "is_Integer", False) else None
    return number if number is None or abs(number) < 2**62 else None


def _scope(node: Node) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    last = list(stack.values())[-1:] if isinstance(stack, dict) else []
    path = last[0][0] if last and isinstance(last[0], tuple) else ""
    return "" if str(path).startswith("_empty") else re.sub(r"^L\['(?:self'\]|args'\]\[0\])\.", "", str(path))


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _literal(tensor: Tensor) -> str:
    sizes, dtype = tuple(tensor.shape), _dtype(tensor.dtype)
    if tensor.numel() > literals.MOST_INLINE or tensor.is_complex() or tensor.is_quantized or tensor.is_meta:
        return literals.tensor(dtype, sizes, None, None if tensor.is_meta else _bytes(tensor))
    flat = tensor.detach().cpu().reshape(-1)
    if dtype == "float32":
        return literals.tensor(dtype, sizes, [float(str(x)) for x in flat.numpy()], None)
    if tensor.dtype.is_floating_point and tensor.dtype not in (torch.float64, torch.float16):
        return literals.tensor(dtype, sizes, None, _bytes(tensor))
    values = [float(str(x)) if tensor.dtype == torch.float16 else x.item() for x in flat.numpy()]
    return literals.tensor(dtype, sizes, values, None)
