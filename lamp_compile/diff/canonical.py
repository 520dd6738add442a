"""From a neutral program to its snapshot: order and names that follow from structure alone.

Nodes are visited depth first from the outputs, operands in their order, so that the order in the file does not
matter. A
value is named by its operator, a number, and the module it belongs to. Numbers are counted per operator and module, and
bodies share the counters of what is around them: started anew, an inner ``%add1`` would hide an outer one, and an
operand
swapped between the two would go unseen.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lamp_compile.diff import _syntax
from lamp_compile.diff.graph import DEEPEST, Graph, Node, Program, Ref, Text, Type
from lamp_compile.diff.lines import Block, Line
from lamp_compile.diff.snapshot import Snapshot
from lamp_compile.errors import InputError

COMMUTATIVE = ("+", "*")


def canonical(program: Program) -> Snapshot:
    """The snapshot of a program.

    Raises:
        InputError: Bodies are nested too deeply, or nodes depend on each other in a circle.
    """
    names = _Names(program.ranges)
    env = {id_: f"&{_syntax.identifier(name)}" for id_, name, _ in program.inputs}
    env |= {id_: f"${_syntax.identifier(param.path)}" for id_, param in program.params.items()}
    env |= program.constants
    inputs = {name: names.type(type_) or "?" for _, name, type_ in program.inputs}
    blocks = []
    results: tuple[str, ...] = ()
    if program.graph is not None:
        graph = names.block("graph", program.graph, env, tuple(env[id_] for id_, _, _ in program.inputs), {}, 0)
        results = graph.results
        blocks.append(graph)
    for function in sorted(program.functions, key=lambda f: f.name):
        formal = tuple(f"&in{index}" for index in range(len(function.graph.inputs)))
        own = dict(zip(function.graph.inputs, formal, strict=True))
        made = names.block(f"function {function.name}", function.graph, own, formal, {}, 0)
        attributes = [*sorted(function.attributes.items()), ("opsets", f"[{', '.join(sorted(function.opsets))}]")]
        comment = f"inputs {', '.join(function.names)}" if function.names else ""
        blocks.append(Block(made.name, made.inputs, made.lines, made.results, tuple(attributes), comment))
    outputs = [
        (name, f"{result}" + (f" : {text}" if (text := names.type(type_)) else ""))
        for (name, type_), result in zip(program.outputs, results, strict=True)
    ]
    params = {param.path: _param(names.type(param.type), param.value) for param in program.params.values()}
    return Snapshot(
        kind=program.kind,
        facts=dict(sorted(program.facts.items())),
        inputs=inputs,
        outputs=tuple(outputs),
        ranges=names.limits(),
        params=dict(sorted(params.items())),
        sites={name: dict(sorted(row.items())) for name, row in program.sites.items()},
        blocks=tuple(blocks),
        versions=program.versions,
        notes=tuple(program.notes),
    )


def _param(type_: str, value: str) -> str:
    return f"{type_} = {value}" if value else type_


def size_text(size: Any, symbols: Mapping[str, str]) -> str:
    """A size as text: operands of sums and products sorted, so that no symbol's name decides their order."""
    if isinstance(size, tuple):
        op, *operands = size
        texts = [size_text(x, symbols) for x in operands]
        if op in COMMUTATIVE:
            return f"({str(op).join(sorted(texts))})"
        return f"{op}({', '.join(texts)})"
    return str(size) if isinstance(size, int) else str(symbols.get(size, size))


@dataclass
class _Names:
    """Names given so far: symbols in the order in which they are met, values by operator and module."""

    ranges: Mapping[str, tuple[int | None, int | None]]
    symbols: dict[str, str] = field(default_factory=dict)

    def type(self, type_: Type | None) -> str:
        """``float32[d0,64]``; empty where unknown."""
        if type_ is None:
            return ""
        if type_.sizes is None:
            return type_.dtype
        for size in type_.sizes:
            self._meet(size)
        return f"{type_.dtype}[{','.join(size_text(size, self.symbols) for size in type_.sizes)}]"

    def _meet(self, size: Any) -> None:
        if isinstance(size, tuple):
            for operand in size[1:]:
                self._meet(operand)
        elif isinstance(size, str) and size != "?" and size not in self.symbols:
            self.symbols[size] = f"d{len(self.symbols)}"

    def limits(self) -> dict[str, str]:
        """Limits of the symbols that occur."""
        found = {}
        for symbol, name in self.symbols.items():
            low, high = self.ranges.get(symbol, (None, None))
            if low is not None or high is not None:
                found[name] = f"{'' if low is None else low}..{'' if high is None else high}"
        return found

    def block(
        self, name: str, graph: Graph, env: dict[str, str], inputs: tuple[str, ...], counters: dict[str, int],
        depth: int,
    ) -> Block:  # fmt: skip
        """A graph whose outer values are in ``env``, with its nodes in canonical order."""
        if depth > DEEPEST:
            raise InputError(f"more than {DEEPEST} bodies in bodies", where=name, fix="flatten the graph")
        lines = []
        for node, mark in _ordered(graph, env):
            made = self._named(node, counters)
            env |= {output: text for output, text in zip(node.outputs, made, strict=True) if output}
            bodies = []
            for body_name, body in node.bodies:
                counters[body_name] = counters.get(body_name, 0) + 1
                formal = tuple(f"&{body_name}{counters[body_name]}.{i}" for i in range(len(body.inputs)))
                inner = {**env, **dict(zip(body.inputs, formal, strict=True))}
                bodies.append(self.block(body_name, body, inner, formal, counters, depth + 1))
            types = tuple(self.type(t) for t in node.types)
            arguments = tuple((key, _render(text, env)) for key, text in node.arguments)
            attributes = tuple(sorted(node.attributes.items()))
            lines.append(Line(made, node.op, arguments, attributes, types if any(types) else (), mark, tuple(bodies)))
        return Block(name, inputs, tuple(lines), tuple(_render(text, env) for text in graph.results))

    def _named(self, node: Node, counters: dict[str, int]) -> tuple[str, ...]:
        short = _syntax.identifier(_short(node.op))
        scope = f"@{_syntax.identifier(node.scope)}" if node.scope else ""
        key = short + scope
        counters[key] = counters.get(key, 0) + 1
        stem = f"%{short}{counters[key]}"
        if len(node.outputs) == 1:
            return (stem + scope,)
        return tuple(f"{stem}.{index}{scope}" for index in range(len(node.outputs)))


def _short(op: str) -> str:
    """``lamp.fused_attention.default`` -> ``fused_attention``; ``ai.lamp::Attend`` -> ``attend``."""
    if "::" in op:
        return op.rpartition("::")[2].lower()
    parts = op.split(".")
    return (parts[1] if len(parts) in (2, 3) else parts[-1]).lower()


def _render(text: Text, env: Mapping[str, str]) -> str:
    for ref in _refs(text):
        if ref not in env:
            raise InputError(f"a value is used that nothing makes: {ref!r}", where="graph", fix="check the model")
    return "".join(env[part.id] if isinstance(part, Ref) else part for part in text)


def _refs(text: Text) -> list[str]:
    return [part.id for part in text if isinstance(part, Ref)]


def _free(node: Node, known: dict[int, list[str]]) -> list[str]:
    """Values a node needs, those that its bodies take from outside included, in order."""
    if id(node) not in known:
        found = [ref for _, text in node.arguments for ref in _refs(text)]
        for _, body in node.bodies:
            inside = {*body.inputs, *(o for n in body.nodes for o in n.outputs)}
            wanted = [ref for n in body.nodes for ref in _free(n, known)]
            wanted += [ref for text in body.results for ref in _refs(text)]
            found += [ref for ref in wanted if ref not in inside]
        known[id(node)] = list(dict.fromkeys(found))
    return known[id(node)]


def _ordered(graph: Graph, env: Mapping[str, str]) -> list[tuple[Node, str]]:
    """Nodes depth first from the results, then those that nobody uses: effects in their order, dead ones sorted."""
    known: dict[int, list[str]] = {}
    producer = {output: node for node in graph.nodes for output in node.outputs if output}
    order: list[tuple[Node, str]] = []
    state: dict[int, int] = {}

    def visit(root: Node, mark: str) -> None:
        if id(root) in state:
            return
        state[id(root)] = 1
        stack = [(root, iter(_free(root, known)), mark)]
        while stack:
            node, needed, node_mark = stack[-1]
            for ref in needed:
                below = producer.get(ref)
                if below is None:
                    continue
                if state.get(id(below)) == 1:
                    raise InputError(
                        "nodes depend on each other in a circle", where=f"{node.op}", fix="no such graph runs"
                    )
                if id(below) not in state:
                    state[id(below)] = 1
                    stack.append((below, iter(_free(below, known)), mark if mark == "dead" else ""))
                    break
            else:
                state[id(node)] = 2
                order.append((node, "effect" if node.effect else node_mark))
                stack.pop()

    for text in graph.results:
        for ref in _refs(text):
            if ref in producer:
                visit(producer[ref], "")
    for node in sorted((n for n in graph.nodes if n.effect), key=lambda n: (n.effect, _skeleton(n, env))):
        visit(node, "effect")
    used = {ref for node in graph.nodes for ref in _free(node, known)}
    rest = [node for node in graph.nodes if id(node) not in state]
    for node in sorted(rest, key=lambda n: (any(o in used for o in n.outputs), _skeleton(n, env))):
        visit(node, "dead")
    return order


def _skeleton(node: Node, env: Mapping[str, str]) -> tuple[Any, ...]:
    """What a node looks like without the names of computed values."""
    texts = [
        (key, "".join(env.get(p.id, "%") if isinstance(p, Ref) else p for p in text)) for key, text in node.arguments
    ]
    return (node.op, node.scope, sorted(node.attributes.items()), texts)
