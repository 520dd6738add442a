"""Nothing is missed and nothing made up, on random graphs: no difference is reported exactly when the texts are
equal."""

from __future__ import annotations

import random
from dataclasses import replace

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lamp_compile.diff.canonical import canonical
from lamp_compile.diff.compare import compare_snapshots
from lamp_compile.diff.graph import Graph, Node, Program, Ref, Type
from lamp_compile.diff.snapshot import Snapshot

QUIET = settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
F = Type("float32", ("n", 4))


@st.composite
def graphs(draw, most: int = 6, depth: int = 1, outside: tuple[str, ...] = ("x", "w")) -> Graph:
    """A few nodes of few operators, so that different graphs look alike; bodies use values from outside."""
    stem = "abc"[depth]
    values, nodes = list(outside), []
    for index in range(draw(st.integers(1, most))):
        operands = draw(st.lists(st.sampled_from(values), min_size=1, max_size=2))
        bodies = []
        if depth and draw(st.integers(0, 2)) == 0:
            bodies = [(name, draw(graphs(3, depth - 1, tuple(values)))) for name in ("else", "then")]
        attributes = {"k": draw(st.sampled_from(["1", "2"]))} if draw(st.booleans()) else {}
        op = "If" if bodies else draw(st.sampled_from(["Add", "Mul"]))
        names = [f"{stem}{len(values)}_{index}"]
        nodes.append(Node(op, [("", (Ref(o),)) for o in operands], attributes, names, [None], bodies=bodies))
        values += names
    results = draw(st.lists(st.sampled_from([n for n in values if n not in outside]), min_size=1, max_size=2))
    return Graph([], nodes, [(Ref(r),) for r in results])


def snapshot(graph: Graph) -> Snapshot:
    outputs = [(f"y{index}", F) for index in range(len(graph.results))]
    return canonical(Program("onnx", graph=graph, inputs=[("x", "x", F), ("w", "w", F)], outputs=outputs))


def other_names_and_order(graph: Graph, rng: random.Random, outer: dict[str, str]) -> Graph:
    """The same graph: nodes in any order (a list of them needs none), values under other names."""
    table = {**outer, **{o: f"v{rng.random()}" for node in graph.nodes for o in node.outputs}}

    def text(parts):
        return tuple(Ref(table[p.id]) if isinstance(p, Ref) else p for p in parts)

    nodes = [
        replace(
            node,
            arguments=[(key, text(parts)) for key, parts in node.arguments],
            outputs=[table[o] for o in node.outputs],
            bodies=[(name, other_names_and_order(body, rng, table)) for name, body in node.bodies],
        )
        for node in graph.nodes
    ]
    rng.shuffle(nodes)
    return Graph([], nodes, [text(parts) for parts in graph.results])


def test_a_lost_value_is_not_taken_for_its_namesake() -> None:
    """`%sin1` is another operation on each side; who used the one that is gone has another operand now."""

    def node(op: str, operand: str, output: str, **attributes: str) -> Node:
        return Node(op, [("", (Ref(operand),))], attributes, [output], [None])

    before = [node("Sin", "x", "a", k="1"), node("Cos", "a", "c"), node("Sin", "x", "b", k="2"), node("Exp", "b", "d")]
    after = [node("Sin", "x", "b", k="2"), node("Cos", "b", "c"), node("Exp", "b", "d")]
    results = [(Ref("c"),), (Ref("d"),)]
    found = compare_snapshots(snapshot(Graph([], before, results)), snapshot(Graph([], after, results)))
    assert [c.text for c in found.changes] == ["Sin is gone", "Cos: operand %sin1 (gone) -> %sin1"]


@QUIET
@given(graphs(), graphs())
def test_different_texts_are_different_graphs(a: Graph, b: Graph) -> None:
    first, second = snapshot(a), snapshot(b)
    found = compare_snapshots(first, second)
    assert found.same == (first.text(header=False) == second.text(header=False))


@QUIET
@given(graphs(12), st.data())
def test_one_edit_is_found(graph: Graph, data) -> None:
    """Another attribute, operand or operator of a node that is used."""
    before = snapshot(graph)
    node = data.draw(st.sampled_from(graph.nodes))
    kind = data.draw(st.sampled_from(["attribute", "operand"]))
    if kind == "attribute":
        node.attributes = {"k": "3"}
    else:
        node.arguments = [*node.arguments, ("", (Ref("w"),))]
    found = compare_snapshots(before, snapshot(graph))
    assert not found.same


@QUIET
@given(graphs(12), st.integers(0, 2**32))
def test_names_and_order_are_nothing(graph: Graph, seed: int) -> None:
    """Dead nodes that look alike keep the file's order; live ones do not depend on it."""
    first = snapshot(graph)
    if any(line.mark for block in first.blocks for line in block.walk()):
        return
    second = snapshot(other_names_and_order(graph, random.Random(seed), {"x": "x", "w": "w"}))
    assert second.text(header=False) == first.text(header=False)


@QUIET
@given(graphs(12), st.data())
def test_module_paths_are_names(graph: Graph, data) -> None:
    """They help to find a partner, and are no difference themselves."""
    first = snapshot(graph)
    for node in graph.nodes:
        node.scope = data.draw(st.sampled_from(["", "layers.0", "layers.1"]))
    if any(line.mark for block in first.blocks for line in block.walk()):
        return
    assert compare_snapshots(first, snapshot(graph)).same


@QUIET
@given(graphs(8))
def test_read_back(graph: Graph) -> None:
    found = snapshot(graph)
    assert Snapshot.parse(found.text()) == found
