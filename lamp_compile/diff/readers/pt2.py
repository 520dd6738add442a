"""A ``torch.export`` archive (``.pt2``), read without loading it.

``torch.export.load`` unpickles sample inputs and custom objects and evaluates guards; here only the archive's JSON is
parsed,
and the raw bytes of tensors where a value is wanted.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from lamp_compile.diff.graph import DEEPEST, Graph, Param, Program, Ref, Text, Type
from lamp_compile.diff.readers import torch_calls
from lamp_compile.diff.readers.pt2_archive import SCALARS, Archive
from lamp_compile.diff.readers.torch_calls import Call, Word
from lamp_compile.errors import InputError

SCHEMA = 8
"""Major version of the archive's schema that this release reads."""
_LAYOUTS = ("unknown", "sparse_coo", "sparse_csr", "sparse_csc", "sparse_bsr", "sparse_bsc", "_mkldnn", "strided")
_FORMATS = ("unknown", "contiguous_format", "channels_last", "channels_last_3d", "preserve_format")


def read_pt2(path: Path, weights: bool = False) -> Program:
    """The program in an archive.

    Raises:
        InputError: It is no archive of an exported program, of another version, or broken.
    """
    try:
        with zipfile.ZipFile(path) as opened:
            archive = Archive(opened, str(path))
            return _program(archive.model(), archive, weights)
    except (zipfile.BadZipFile, KeyError, TypeError, AttributeError, ValueError, IndexError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"broken archive: {type(error).__name__}: {error}",
            where=str(path),
            fix="save it again with torch.export.save",
        ) from None


def calls(data: Mapping[str, Any]) -> tuple[list[Call], list[Any], dict[str, tuple[str, Any]]]:
    """For running: calls, results as Python data, and what each value given from outside is: (kind, name or
    constant)."""
    module, scratch = data["graph_module"], Program("torch")
    graph = module["graph"]
    made, _ = _calls(graph, {}, 0, scratch)
    kinds: dict[str, tuple[str, Any]] = {}
    for spec in module["signature"]["input_specs"]:
        ((kind, item),) = spec.items()
        if kind in ("parameter", "buffer", "tensor_constant"):
            kinds[item["arg"]["name"]] = (kind, item[f"{kind}_name"])
        elif kind == "constant_input":
            kinds[item["name"]] = ("constant", _constant(item["value"]))
    users = [s["user_output"] for s in module["signature"]["output_specs"] if "user_output" in s]
    return made, [_value(item["arg"], 0, scratch) for item in users], kinds


def _program(data: Mapping[str, Any], archive: Archive, weights: bool) -> Program:
    version = data.get("schema_version", {}).get("major")
    if version != SCHEMA:
        raise InputError(
            f"the archive's schema is {version}, this release reads {SCHEMA}", where=archive.where,
            fix="save the program again with a newer torch",
        )  # fmt: skip
    made = Program("torch", versions={"torch": str(data.get("torch_version"))})
    module = data["graph_module"]
    graph, signature = module["graph"], module["signature"]
    types = _types(graph)
    labels, values = {}, {}
    for spec in signature["input_specs"]:
        ((kind, item),) = spec.items()
        _input(made, kind, item, archive, types, weights)
    for id_, param in made.params.items():
        labels[id_] = param.path
        text = archive.small(param.path)
        if text is not None:
            values[id_] = text
    labels |= {id_: name for id_, name, _ in made.inputs}
    listed, results = _calls(graph, types, 0, made)
    made.graph = Graph(
        [id_ for id_, _, _ in made.inputs], torch_calls.nodes(listed, labels, values, made.sites), results
    )
    made.outputs = list(zip(_output_names(signature["output_specs"]), _result_types(graph, types), strict=True))
    _keep_hot(made, listed, values)
    made.ranges = {
        name: (limits.get("min_val"), limits.get("max_val"))
        for name, limits in data.get("range_constraints", {}).items()
    }
    specs = [
        entry["signature"] for entry in module.get("module_call_graph", []) if entry["fqn"] == "" and entry["signature"]
    ]
    made.facts = {name: tree(specs[0][name]) for name in ("in_spec", "out_spec") if specs}
    return made


def _input(made: Program, kind: str, item: Any, archive: Archive, types: Mapping[str, Type], weights: bool) -> None:
    if kind == "user_input":
        (key, value), *_ = item["arg"].items()
        if key in ("as_tensor", "as_sym_int", "as_sym_float", "as_sym_bool"):
            name = value.get("name", value.get("as_name", ""))
            made.inputs.append((name, name, types.get(name)))
        return
    if kind in ("parameter", "buffer"):
        id_, path = item["arg"]["name"], item[f"{kind}_name"]
        made.params[id_] = Param(path, types[id_], archive.digest(path) if weights else "")
    elif kind == "tensor_constant":
        id_ = item["arg"]["name"]
        made.constants[id_] = archive.literal(item["tensor_constant_name"])
    elif kind == "constant_input":
        made.constants[item["name"]] = "".join(map(str, torch_calls.render(_constant(item["value"]))))
    else:
        id_ = item["arg"]["name"]
        made.inputs.append((id_, f"{kind} {item.get('custom_obj_name', id_)}", Type(kind)))


def _constant(value: Mapping[str, Any]) -> Any:
    ((key, held),) = value.items()
    return None if key == "as_none" else held


def _output_names(specs: Sequence[Mapping[str, Any]]) -> list[str]:
    names, users = [], 0
    for spec in specs:
        ((kind, item),) = spec.items()
        if kind == "user_output":
            names.append(f"output.{users}")
            users += 1
        else:
            names.append(
                f"{kind}.{item.get('buffer_name', item.get('parameter_name', item.get('user_input_name', '')))}"
            )
    return names


def _types(graph: Mapping[str, Any]) -> dict[str, Type]:
    found = {}
    for name, meta in graph["tensor_values"].items():
        found[name] = Type(SCALARS.get(meta["dtype"], "?"), tuple(map(_size, meta["sizes"])))
    for table in ("sym_int_values", "sym_bool_values", "sym_float_values"):
        for name, value in (graph.get(table) or {}).items():
            found[name] = Type("sym", (_size(value),))
    return found


def _size(item: Mapping[str, Any]) -> Any:
    if "as_expr" in item:
        return torch_calls.size(item["as_expr"]["expr_str"])
    ((_, value),) = item.items()
    return value


def _result_types(graph: Mapping[str, Any], types: Mapping[str, Type]) -> list[Type | None]:
    return [
        types.get(value.id) if isinstance(value := _value(x, 0, Program("torch")), Ref) else None
        for x in graph["outputs"]
    ]


def _calls(
    graph: Mapping[str, Any], types: Mapping[str, Type], depth: int, made: Program
) -> tuple[list[Call], list[Text]]:  # fmt: skip
    if depth > DEEPEST:
        raise InputError(f"more than {DEEPEST} graphs in graphs", where="graph", fix="no such program is exported")
    listed = []
    for node in graph["nodes"]:
        arguments = [(item["name"], _value(item["arg"], depth, made)) for item in node["inputs"]]
        outputs = [name for item in node["outputs"] for name in _names(item)]
        scope = _scope(node["metadata"].get("nn_module_stack", ""))
        listed.append(
            Call(torch_calls.short(node["target"]), arguments, outputs, [types.get(o) for o in outputs], scope)
        )
    return listed, [torch_calls.render(_value(item, depth, made)) for item in graph["outputs"]]


def _names(item: Mapping[str, Any]) -> list[str]:
    ((key, value),) = item.items()
    if key in ("as_tensor", "as_sym_int", "as_sym_bool", "as_sym_float", "as_custom_obj"):
        return [value.get("name", value.get("as_name", ""))]
    if key == "as_optional_tensor":
        return _names(value)
    if key in ("as_tensors", "as_optional_tensors", "as_sym_ints"):
        return [x.get("name", x.get("as_name", x.get("as_tensor", {}).get("name", ""))) for x in value]
    return [""]


def _value(argument: Mapping[str, Any], depth: int, made: Program) -> Any:
    """One argument as Python data. ``made`` gets the sites of bodies."""
    ((key, value),) = argument.items()
    if key == "as_none":
        return None
    if key in ("as_tensor", "as_custom_obj"):
        return Ref(value["name"])
    if key == "as_tensors":
        return [Ref(x["name"]) for x in value]
    if key == "as_nested_tensors":
        return [[Ref(x["name"]) for x in row] for row in value]
    if key in ("as_optional_tensor", "as_sym_int", "as_sym_bool", "as_sym_float"):
        return Ref(value["as_name"]) if "as_name" in value else _value(value, depth, made)
    if key in ("as_optional_tensors", "as_sym_ints", "as_sym_bools", "as_sym_floats"):
        return [Ref(x["as_name"]) if "as_name" in x else _value(x, depth, made) for x in value]
    if key == "as_scalar_type":
        return Word(SCALARS.get(value, "?"))
    if key in ("as_layout", "as_memory_format"):
        table = _LAYOUTS if key == "as_layout" else _FORMATS
        return Word(table[value] if 0 <= value < len(table) else "?")
    if key == "as_device":
        return Word(value["type"] + ("" if value.get("index") is None else f":{value['index']}"))
    if key == "as_graph":
        graph = value["graph"]
        types = _types(graph)
        listed, results = _calls(graph, types, depth + 1, made)
        inputs = [name for item in graph["inputs"] for name in _names(item)]
        return Graph(inputs, torch_calls.nodes(listed, {}, {}, made.sites), results)
    if key == "as_string_to_argument":
        return {name: _value(item, depth, made) for name, item in value.items()}
    if key == "as_complex":
        return Word(f"{value['real']}+{value['imag']}j")
    if key == "as_float" and isinstance(value, str):
        return float(value)
    return Word(value) if key == "as_operator" else value


def _scope(stack: str) -> str:
    """Module path: the last entry of ``key,path,type;...``."""
    last = stack.rpartition(";")[2].split(",")
    return last[1] if len(last) == 3 and not last[1].startswith("_empty") else ""


def _keep_hot(made: Program, calls: Sequence[Call], values: Mapping[str, str]) -> None:
    """Values of tensors that the precision plan changes between steps are part of a snapshot."""
    for call in calls:
        for name, value in call.arguments if call.op.startswith("lamp.") else ():
            if name in torch_calls.HOT and isinstance(value, Ref) and value.id in values and value.id in made.params:
                param = made.params[value.id]
                text = values[value.id]
                made.params[value.id] = Param(param.path, param.type, text[text.index("]") + 1 :])


def tree(text: str) -> str:
    """A pytree's JSON as ``{"o": *, "w": [*, *]}``."""
    return _tree(cast(Any, json.loads(text)[1]), 0)


def _tree(spec: Mapping[str, Any], depth: int) -> str:
    if depth > DEEPEST:
        raise InputError("containers are nested too deeply", where="in_spec, out_spec", fix="export the program again")
    kind = spec["type"]
    if kind is None:
        return "*"
    children = [_tree(child, depth + 1) for child in spec["children_spec"]]
    name = str(kind).rpartition(".")[2]
    if name in ("dict", "OrderedDict"):
        keys = json.loads(spec["context"])
        keys = keys if isinstance(keys, list) else [keys]
        return "{" + ", ".join(f"{json.dumps(k)}: {c}" for k, c in zip(keys, children, strict=False)) + "}"
    inner = f"({', '.join(children)})"
    return inner if name in ("tuple", "list") else f"{name}{inner}"
