"""Two decoder layers in ONNX with look-ahead attention as a model-local function, its guard an If, and edits of it."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

OPSETS = [helper.make_opsetid("", 20), helper.make_opsetid("ai.lamp", 1)]
F = TensorProto.FLOAT
SCOPES = "pkg.torch.onnx.name_scopes"


def node(op: str, inputs: list[str], outputs: list[str], scope: str = "", domain: str = "", **attributes):
    """A node that remembers its module as torch's exporter notes it."""
    made = helper.make_node(op, inputs, outputs, domain=domain, name=f"n_{outputs[0]}", **attributes)
    if scope:
        made.metadata_props.append(onnx.StringStringEntryProto(key=SCOPES, value=repr(["", scope, f"n_{outputs[0]}"])))
    return made


def function() -> onnx.FunctionProto:
    """Low-precision scores; where their largest weight exceeds tau the full ones are taken, in a nested If."""
    inner = helper.make_graph(
        [node("Softmax", ["full"], ["p_full"]), node("Where", ["keep", "p_full", "p_low"], ["picked"])],
        "refine", [], [helper.make_tensor_value_info("picked", F, None)],
    )  # fmt: skip
    plain = helper.make_graph(
        [
            node("Softmax", ["full"], ["p_all"]),
            node("Add", ["p_all", "p_low"], ["both"]),
            node("Mul", ["both", "half"], ["mean"]),
        ],
        "all", [], [helper.make_tensor_value_info("mean", F, None)],
    )  # fmt: skip
    then = helper.make_graph(
        [
            node("Greater", ["p_low", "level"], ["keep"]),
            node("If", ["few"], ["chosen"], then_branch=inner, else_branch=plain),
        ],
        "then", [], [helper.make_tensor_value_info("chosen", F, None)],
    )  # fmt: skip
    otherwise = helper.make_graph(
        [node("Identity", ["p_low"], ["as_is"])], "else", [], [helper.make_tensor_value_info("as_is", F, None)]
    )
    tau = helper.make_node("Constant", [], ["level"])
    reference = helper.make_attribute_ref("value_float", onnx.AttributeProto.FLOAT)
    reference.ref_attr_name = "tau"
    tau.attribute.append(reference)
    nodes = [
        tau,
        node("Transpose", ["k"], ["kt"], perm=[0, 2, 1]),
        node("MatMul", ["q", "kt"], ["full"]),
        node("Cast", ["full"], ["low16"], to=TensorProto.BFLOAT16),
        node("Cast", ["low16"], ["low"], to=F),
        node("Softmax", ["low"], ["p_low"], axis=-1),
        node("ReduceMax", ["p_low"], ["peak"], keepdims=0),
        node("Greater", ["peak", "level"], ["refine"]),
        helper.make_node("Constant", [], ["half"], value=numpy_helper.from_array(np.float32(0.5))),
        node("Less", ["peak", "half"], ["few"]),
        node("If", ["refine"], ["p"], then_branch=then, else_branch=otherwise),
        node("MatMul", ["p", "v"], ["o"]),
    ]
    default = helper.make_attribute("tau", 0.2)
    return helper.make_function(
        "ai.lamp", "LookAheadAttention", ["q", "k", "v"], ["o"], nodes, OPSETS, attribute_protos=[default]
    )


def decoder(layers: int = 2, width: int = 16, more: int = 0) -> onnx.ModelProto:
    """The model, with so many more operations in each layer. Weights are random but fixed."""
    rng, nodes, weights = np.random.default_rng(0), [], []

    def weight(name: str) -> str:
        weights.append(numpy_helper.from_array(rng.standard_normal((width, width), dtype=np.float32) / 4, name))
        return name

    x = "x"
    for index in range(layers):
        at, attn, mlp = f"h{index}_", f"layers.{index}.attn", f"layers.{index}.mlp"
        for letter in "qkv":
            nodes.append(node("MatMul", [x, weight(f"{attn}.{letter}.weight")], [at + letter], attn))
        nodes.append(
            node(
                "LookAheadAttention",
                [at + c for c in "qkv"],
                [at + "o"],
                attn,
                "ai.lamp",
                tau=0.1,
                site=f"layers.{index}.attn",
            )
        )
        nodes.append(node("MatMul", [at + "o", weight(f"{attn}.out.weight")], [at + "out"], attn))
        nodes.append(node("Add", [x, at + "out"], [at + "r"], f"layers.{index}"))
        nodes.append(node("MatMul", [at + "r", weight(f"{mlp}.up.weight")], [at + "up"], mlp))
        nodes.append(node("Relu", [at + "up"], [at + "act"], mlp))
        last = at + "act"
        for step in range(more):
            op = ("Add", "Mul", "Sub")[step % 3]
            nodes.append(node(op, [last, at + "act"], [f"{at}s{step}"], mlp))
            last = f"{at}s{step}"
        nodes.append(node("MatMul", [last, weight(f"{mlp}.down.weight")], [at + "down"], mlp))
        nodes.append(node("Add", [at + "r", at + "down"], [at + "y"], f"layers.{index}"))
        x = at + "y"
    nodes.append(node("Identity", [x], ["y"]))
    shape = ["batch", "seq", width]
    graph = helper.make_graph(
        nodes,
        "decoder",
        [helper.make_tensor_value_info("x", F, shape)],
        [helper.make_tensor_value_info("y", F, shape)],
        weights,
    )
    made = function()
    made.attribute.append("site")
    model = helper.make_model(graph, opset_imports=OPSETS, functions=[made], ir_version=10)
    onnx.checker.check_model(model)
    return model


def edited(edit: Callable[[onnx.ModelProto], None]) -> onnx.ModelProto:
    """A copy of the model after an edit."""
    model = onnx.ModelProto.FromString(decoder().SerializeToString())
    edit(model)
    return model


def find(nodes, op: str, count: int = 0) -> onnx.NodeProto:
    """A node by its operator."""
    return [n for n in nodes if n.op_type == op][count]


def branch(if_node: onnx.NodeProto, name: str) -> onnx.GraphProto:
    """A branch of an If."""
    return next(a.g for a in if_node.attribute if a.name == name)


def setting(of: onnx.NodeProto, name: str) -> onnx.AttributeProto:
    """An attribute."""
    return next(a for a in of.attribute if a.name == name)


def rename_all(model: onnx.ModelProto) -> None:
    """Every value inside the graph and every node gets another name."""
    public = {v.name for v in (*model.graph.input, *model.graph.output)} | {w.name for w in model.graph.initializer}
    table: dict[str, str] = {}

    def walk(nodes, keep: set[str]) -> None:
        for n in nodes:
            n.name = f"other_{n.name}"
            for names in (n.input, n.output):
                for index, name in enumerate(names):
                    names[index] = (
                        name if name in keep or not name else table.setdefault(name, f"v{len(table)}_{name[::-1]}")
                    )
            for a in n.attribute:
                if a.type == a.GRAPH:
                    walk(a.g.node, keep)
                    for out in a.g.output:
                        out.name = table[out.name]

    walk(model.graph.node, public)
    table.clear()
    made = model.functions[0]
    walk(made.node, set())
    for names in (made.input, made.output):
        for index, name in enumerate(names):
            names[index] = table[name]


def shuffle(model: onnx.ModelProto) -> None:
    """Another valid order of the nodes, in the graph and the function; initialisers and functions too."""
    rng = random.Random(1)

    def free(n: onnx.NodeProto) -> set[str]:
        found = set(n.input)
        for a in n.attribute:
            if a.type == a.GRAPH:
                inside = {o for m in a.g.node for o in m.output}
                found |= {x for m in a.g.node for x in free(m)} - inside
        return found

    def reorder(nodes, ready: set[str]) -> None:
        waiting, made = list(nodes), []
        while waiting:
            possible = [n for n in waiting if free(n) - {""} <= ready]
            chosen = rng.choice(possible)
            waiting.remove(chosen)
            made.append(chosen)
            ready |= set(chosen.output)
        copies = [onnx.NodeProto.FromString(n.SerializeToString()) for n in made]
        del nodes[:]
        nodes.extend(copies)

    reorder(model.graph.node, {"x"} | {w.name for w in model.graph.initializer})
    reorder(model.functions[0].node, set(model.functions[0].input))
    weights = [onnx.TensorProto.FromString(w.SerializeToString()) for w in reversed(model.graph.initializer)]
    del model.graph.initializer[:]
    model.graph.initializer.extend(weights)


def swap_in_branch(model: onnx.ModelProto) -> None:
    """Operands of the Where in the nested If of the function."""
    nested = find(branch(find(model.functions[0].node, "If"), "then_branch").node, "If")
    where = find(branch(nested, "then_branch").node, "Where")
    where.input[1:] = ["p_low", "p_full"]


def swap_inner_for_outer(model: onnx.ModelProto) -> None:
    """The nested branch's own Softmax gives way to the one outside: with counters of its own it would have the same
    name."""
    nested = find(branch(find(model.functions[0].node, "If"), "then_branch").node, "If")
    add = find(branch(nested, "else_branch").node, "Add")
    add.input[0] = "p_low"


def cast_to_fp16(model: onnx.ModelProto) -> None:
    """The look-ahead's precision."""
    setting(find(model.functions[0].node, "Cast"), "to").i = TensorProto.FLOAT16


def remove_guard(model: onnx.ModelProto) -> None:
    """The If gives way to what its else branch gave."""
    find(model.functions[0].node, "If").CopyFrom(node("Identity", ["p_low"], ["p"]))


def change_tau(model: onnx.ModelProto) -> None:
    """Of the second layer."""
    setting(find(model.graph.node, "LookAheadAttention", 1), "tau").f = 0.3


def insert_early(model: onnx.ModelProto) -> None:
    """An Add after the first MatMul of the first MLP: its module has one, so numbers shift."""
    old = find(model.graph.node, "Add")
    out = old.output[0]
    for n in model.graph.node:
        for index, name in enumerate(n.input):
            if name == out:
                n.input[index] = "inserted"
    at = list(model.graph.node).index(old) + 1
    model.graph.node.insert(at, node("Add", [out, out], ["inserted"], "layers.0"))


def change_weight(model: onnx.ModelProto) -> None:
    """One value of one weight."""
    tensor = model.graph.initializer[0]
    values = numpy_helper.to_array(tensor).copy()
    values[0, 0] += 1
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))


def cosmetic(model: onnx.ModelProto) -> None:
    """Leaves the schema's default out, leaves a note, and lists an unused opset: nothing that matters."""
    del find(model.functions[0].node, "Softmax").attribute[:]
    model.graph.node[0].metadata_props.append(
        onnx.StringStringEntryProto(key="pkg.torch.onnx.stack_trace", value="line 1")
    )
    model.graph.node[0].doc_string = "words"
    model.producer_version = "other"
