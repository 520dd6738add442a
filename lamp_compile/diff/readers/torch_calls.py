"""What the two readers of torch programs share: calls of operators to neutral nodes, writes in place, symbolic sizes.

Writes in place are kept in order by what is read: a value read after a write to its storage gets ``after=``, the write.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from lamp_compile.diff import literals
from lamp_compile.diff.graph import Graph, Node, Ref, Text, Type
from lamp_compile.diff.sites import from_call
from lamp_compile.errors import InputError

HOT = ("tau", "floor", "budget")
_OPERATORS = {"Add": "+", "Mul": "*"}
_BINARY = {ast.Add: "+", ast.Mult: "*", ast.Sub: "-", ast.FloorDiv: "FloorDiv", ast.Mod: "Mod", ast.Div: "/"}
_BODIES = {("higher_order.cond", 1): "then", ("higher_order.cond", 2): "else"}


@dataclass(frozen=True)
class Word:
    """A dtype, device, layout or memory format: printed without quotes."""

    text: str


@dataclass
class Call:
    """One call: arguments by name as Python data with ``Ref`` for values; ``Graph`` for bodies."""

    op: str
    arguments: list[tuple[str, Any]]
    outputs: list[str]
    types: list[Type | None]
    scope: str = ""


@cache
def overload(op: str) -> Any:
    """The operator of torch with that name (``aten.add.Tensor``), or None where none is registered."""
    import torch

    import lamp_compile.runtime.fused_ops  # noqa: F401  (registers the operators)

    parts = op.split(".")
    if len(parts) not in (2, 3) or not all(part.isidentifier() for part in parts) or parts[0].startswith("_"):
        return None
    packet = getattr(getattr(torch.ops, parts[0], None), parts[1], None)
    found = getattr(packet, parts[2] if len(parts) == 3 else "default", None)
    return found if isinstance(found, torch._ops.OpOverload) else None


def short(target: str) -> str:
    """``torch.ops.aten.linear.default`` -> ``aten.linear``."""
    return target.removeprefix("torch.ops.").removesuffix(".default").removeprefix("_")


def nodes(
    calls: Sequence[Call], labels: Mapping[str, str], values: Mapping[str, str], sites: dict[str, dict[str, Any]]
) -> list[Node]:
    """Neutral nodes of calls in the order in which they run.

    Args:
        calls: Of one graph.
        labels: Value id -> public name, of inputs and parameters.
        values: Value id -> literal, of small parameters that may be hot.
        sites: Gets what ``lamp`` operators say about their site.
    """
    writes = _Writes(labels)
    made = []
    for index, call in enumerate(calls):
        node = _node(call)
        if call.op.startswith("lamp."):
            _site(call, values, sites)
        writes.see(call, node, index)
        made.append(node)
    return made


def _node(call: Call) -> Node:
    found = overload(call.op)
    defaults = (
        {} if found is None else {a.name: a.default_value for a in found._schema.arguments if a.has_default_value()}
    )
    node = Node(call.op, [], {}, call.outputs, call.types, call.scope)
    for index, (name, value) in enumerate(call.arguments):
        if isinstance(value, Graph):
            node.bodies.append((name or _BODIES.get((call.op, index), f"body{index}"), value))
            continue
        if name in defaults and _same(defaults[name], value):
            continue
        text = render(value)
        if any(isinstance(part, Ref) for part in text):
            node.arguments.append(("" if not node.arguments and index == 0 else name, text))
        elif value is not None or not name:
            node.attributes[name or f"argument{index}"] = "".join(map(str, text))
    return node


def _same(default: Any, value: Any) -> bool:
    if isinstance(default, list) and isinstance(value, list):
        return len(default) == len(value) and all(map(_same, default, value))
    return (
        type(default) in (int, float, bool, str, type(None))
        and default == value
        and (isinstance(default, bool) == isinstance(value, bool))
    )


def render(value: Any) -> Text:
    """Python data as text with references."""
    if isinstance(value, Ref):
        return (value,)
    if isinstance(value, list | tuple):
        inner: list[str | Ref] = []
        for index, item in enumerate(value):
            inner += [", "] * bool(index) + list(render(item))
        return ("[", *inner, "]")
    if isinstance(value, dict):
        parts: list[str | Ref] = []
        for index, (key, item) in enumerate(sorted(value.items())):
            parts += [", "] * bool(index) + [json.dumps(str(key)), ": ", *render(item)]
        return ("{", *parts, "}")
    if isinstance(value, Word):
        return (value.text,)
    if value is None:
        return ("none",)
    return (json.dumps(value) if isinstance(value, str) else literals.number(value),)


def refs(value: Any) -> Iterator[str]:
    """Values in Python data."""
    if isinstance(value, Ref):
        yield value.id
    elif isinstance(value, list | tuple):
        for item in value:
            yield from refs(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from refs(item)


@dataclass
class _Writes:
    labels: Mapping[str, str]
    root: dict[str, str] = field(default_factory=dict)
    last: dict[str, str] = field(default_factory=dict)
    count: dict[str, int] = field(default_factory=dict)

    def see(self, call: Call, node: Node, index: int) -> None:
        """Note what a call writes, which of its outputs are views, and which writes it has to come after."""
        read = [ref for _, value in call.arguments for ref in refs(value)]
        after = [self.last[r] for ref in read if (r := self.root.get(ref, ref)) in self.last and self.last[r] != ref]
        if after:
            listed: list[str | Ref] = []
            for position, one in enumerate(dict.fromkeys(after)):
                listed += [", "] * bool(position) + [Ref(one)]
            node.arguments.append(("after", ("[", *listed, "]")))
        written, views = _aliases(call)
        if (written or not call.outputs) and not node.outputs:
            node.outputs = [f"{call.op}#{index}"]
            node.types = [None]
        for output, source in views.items():
            self.root[output] = self.root.get(source, source)
        for source in written:
            root = self.root.get(source, source)
            self.last[root] = node.outputs[0]
            self.count[root] = self.count.get(root, 0) + 1
            node.effect = node.effect or f"write {self.labels.get(root, '')} {self.count[root]:06d}"
        name = call.op.split(".")[1] if call.op.count(".") else call.op
        if (not call.outputs and not written) or name.startswith(("_assert", "sym_constrain", "_set_grad")):
            node.effect = node.effect or "check"


def _aliases(call: Call) -> tuple[list[str], dict[str, str]]:
    """Values a call writes to, and its outputs that are views of an input."""
    found = overload(call.op)
    given = dict(call.arguments)
    if found is None:
        name = call.op.split(".")[1] if call.op.count(".") else call.op
        first = [value for _, value in call.arguments if isinstance(value, Ref)][:1]
        in_place = name.endswith("_") and not name.endswith("__")
        return [ref.id for ref in first] if in_place else [], {}
    written: list[str] = []
    by_set: dict[str, str] = {}
    for argument in found._schema.arguments:
        if argument.alias_info is None:
            continue
        for ref in refs(given.get(argument.name)):
            if argument.alias_info.is_write:
                written.append(ref)
            by_set |= dict.fromkeys(argument.alias_info.before_set, ref)
    views: dict[str, str] = {}
    for output, result in zip(call.outputs, found._schema.returns, strict=False):
        if result.alias_info is not None:
            for letter in result.alias_info.before_set & by_set.keys():
                views[output] = by_set[letter]
    if len(found._schema.returns) == 1 and len(call.outputs) > 1 and found._schema.returns[0].alias_info is not None:
        for source in list(by_set.values())[:1]:
            views |= dict.fromkeys(call.outputs, source)
    return written, views


def _site(call: Call, values: Mapping[str, str], sites: dict[str, dict[str, Any]]) -> None:
    settings = {name: value for name, value in call.arguments if isinstance(value, str | int | float | bool)}
    hot = {name: values[v.id] for name, v in call.arguments if name in HOT and isinstance(v, Ref) and v.id in values}
    from_call(sites, str(settings.get("site", "")), call.op.removeprefix("lamp."), settings, hot)


@cache
def size(text: str) -> Any:
    """A size from sympy's ``srepr`` text, by parsing it: nothing of it is evaluated.

    Raises:
        InputError: It is not such a text.
    """
    try:
        return _size(ast.parse(text, mode="eval").body)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise InputError(
            f"cannot read the size {text[:60]!r}", where="symbolic sizes", fix="export the program again"
        ) from None


def _size(tree: ast.expr) -> Any:
    if isinstance(tree, ast.Constant) and isinstance(tree.value, int | str | float):
        return tree.value if isinstance(tree.value, int | str) else str(tree.value)
    if isinstance(tree, ast.Name):
        return tree.id
    if isinstance(tree, ast.UnaryOp) and isinstance(tree.op, ast.USub):
        inner = _size(tree.operand)
        return -inner if isinstance(inner, int) else ("-", inner)
    if isinstance(tree, ast.BinOp) and type(tree.op) in _BINARY:
        return (_BINARY[type(tree.op)], _size(tree.left), _size(tree.right))
    if isinstance(tree, ast.Call) and isinstance(tree.func, ast.Name):
        if tree.func.id in ("Symbol", "Integer", "Dummy") and tree.args:
            return _size(tree.args[0])
        return (_OPERATORS.get(tree.func.id, tree.func.id), *map(_size, tree.args))
    raise ValueError("no size")
