"""What a snapshot of an ONNX model sees, and what it does not: every edit gives a small, local, readable difference."""

from __future__ import annotations

import pytest

onnx = pytest.importorskip("onnx", reason="ONNX graphs need the onnx package")

import lamp_compile  # noqa: E402
from lamp_compile.diff import reporters  # noqa: E402
from lamp_compile.diff.snapshot import Snapshot  # noqa: E402
from lamp_compile.errors import InputError  # noqa: E402
from tests.diff import onnx_models as models  # noqa: E402

FUNCTION = "ai.lamp::LookAheadAttention"


@pytest.fixture(scope="module")
def base() -> Snapshot:
    return lamp_compile.snapshot(models.decoder())


def changes(base: Snapshot, edit) -> list[tuple[str, str, str]]:
    found = lamp_compile.compare(base, models.edited(edit))
    return [(c.tier, c.where, c.text) for c in found.changes]


@pytest.mark.parametrize("edit", [models.rename_all, models.shuffle, models.cosmetic], ids=lambda e: e.__name__)
def test_no_difference(base: Snapshot, edit) -> None:
    """Other names, another order, notes, and what a schema says anyway."""
    other = models.edited(edit)
    assert other.SerializeToString() != models.decoder().SerializeToString()
    assert lamp_compile.snapshot(other).text(header=False) == base.text(header=False)
    assert lamp_compile.compare(base, other).same


def test_operands_swapped_in_a_branch_of_a_function(base: Snapshot) -> None:
    (change,) = changes(base, models.swap_in_branch)
    assert change == ("structure", f"{FUNCTION}/then_branch/then_branch", "Where: its operands changed places")


def test_counters_are_shared_with_bodies(base: Snapshot) -> None:
    """An inner value gives way to an outer one of the same operator: names that start anew in a body would hide it."""
    found = changes(base, models.swap_inner_for_outer)
    assert found == [
        ("structure", f"{FUNCTION}/then_branch/else_branch", "Add: operand %softmax2 -> %softmax1"),
        ("structure", f"{FUNCTION}/then_branch/else_branch", "Softmax: used -> dead"),
    ]
    names = [
        o for block in base.blocks if block.name.startswith("function") for line in block.walk() for o in line.outputs
    ]
    assert len(names) == len(set(names))


def test_precision_of_the_look_ahead(base: Snapshot) -> None:
    assert changes(base, models.cast_to_fp16) == [("attributes", FUNCTION, "Cast: to bfloat16 -> float16")]


def test_guard_removed(base: Snapshot) -> None:
    found = changes(base, models.remove_guard)
    assert ("structure", FUNCTION, "If became Identity") in found
    assert {where for _, where, _ in found} == {FUNCTION}
    assert len(found) <= 6  # what only the guard used is dead now, and said to be


def test_tau_of_one_layer(base: Snapshot) -> None:
    (change,) = changes(base, models.change_tau)
    assert change == ("precision", "layers.1.attn", "layer 1 (layers.1.attn): tau 0.1 -> 0.3 (refines less)")


def test_an_early_node_shifts_nothing(base: Snapshot) -> None:
    """Numbers of later values change with it; the comparison sees through them."""
    found = changes(base, models.insert_early)
    assert found == [
        ("structure", "layers.0", "Add is new"),
        ("structure", "layers.0.mlp", "MatMul: operand %add1@layers.0 -> %add2@layers.0"),
        ("structure", "layers.0", "Add: operand %add1@layers.0 -> %add2@layers.0"),
    ]


def test_weights_only_when_asked(base: Snapshot) -> None:
    assert changes(base, models.change_weight) == []
    found = lamp_compile.compare(models.decoder(), models.edited(models.change_weight), weights=True)
    assert [(c.tier, c.subject) for c in found.changes] == [("weights", "parameter layers.0.attn.q.weight")]


def test_sizes_have_no_names() -> None:
    def rename(model) -> None:
        for value in (*model.graph.input, *model.graph.output):
            value.type.tensor_type.shape.dim[0].dim_param = "n"

    def tie(model) -> None:
        for value in (*model.graph.input, *model.graph.output):
            value.type.tensor_type.shape.dim[1].dim_param = "batch"

    assert lamp_compile.compare(models.decoder(), models.edited(rename)).same
    found = lamp_compile.compare(models.decoder(), models.edited(tie))
    assert [c.text for c in found.changes if c.tier == "interface"][:1] == [
        "input x: float32[d0,d1,16] -> float32[d0,d0,16]"
    ]


def test_types_where_both_sides_know_them() -> None:
    def typed(kind: int, sizes: list):
        def edit(model) -> None:
            name = models.find(model.graph.node, "Relu").output[0]
            model.graph.value_info.append(onnx.helper.make_tensor_value_info(name, kind, sizes))

        return models.edited(edit)

    float32, float16 = onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16
    known = typed(float32, ["batch", "seq", 16])
    assert lamp_compile.compare(known, models.decoder()).same
    for other, after in (
        (typed(float16, ["batch", "seq", 16]), "float16[d0,d1,16]"),
        (typed(float32, ["batch", 1, 16]), "float32[d0,1,16]"),
    ):
        (change,) = lamp_compile.compare(known, other).changes
        assert (change.tier, change.where) == ("types", "layers.0.mlp")
        assert change.text == f"Relu: float32[d0,d1,16] -> {after}"


def test_interface() -> None:
    def edit(model) -> None:
        model.opset_import[0].version = 21
        model.graph.output[0].name = "z"
        model.graph.node[-1].output[0] = "z"

    texts = [
        c.text for c in lamp_compile.compare(models.decoder(), models.edited(edit)).changes if c.tier == "interface"
    ]
    assert texts == [
        "opset.ai.onnx: 20 -> 21",
        "output y is gone: float32[d0,d1,16]",
        "output z is new: float32[d0,d1,16]",
    ]


def test_dead_nodes_are_said_and_sorted() -> None:
    def dead(first: str, second: str):
        def edit(model) -> None:
            model.graph.node.extend(
                [models.node(first, ["x"], [f"d_{first}"]), models.node(second, ["x"], [f"d_{second}"])]
            )

        return models.edited(edit)

    a, b = dead("Sin", "Cos"), dead("Cos", "Sin")
    assert lamp_compile.compare(a, b).same
    found = lamp_compile.compare(models.decoder(), a)
    assert [c.text for c in found.changes] == ["Cos is new", "Sin is new"]
    assert "!dead" in found.changes[0].after


@pytest.mark.parametrize("edit", [models.cosmetic, models.remove_guard, models.insert_early], ids=lambda e: e.__name__)
def test_text_is_read_back(edit) -> None:
    found = lamp_compile.snapshot(models.edited(edit), weights=True)
    again = Snapshot.parse(found.text())
    assert again == found
    assert again.text(header=False) == found.text(header=False)


def test_no_trace_of_the_file(base: Snapshot) -> None:
    """Neither names of values, nor metadata, nor the order of weights."""
    text = base.text()
    assert "n_h0_q" not in text
    assert "pkg.torch" not in text
    assert list(base.params) == sorted(base.params)


def test_same_names_in_two_branches() -> None:
    """Siblings may use one name for two constants."""

    def branches(low: float, high: float):
        def edit(model) -> None:
            If = models.find(model.functions[0].node, "If")
            for name, number in (("then_branch", low), ("else_branch", high)):
                graph = models.branch(If, name)
                constant = onnx.helper.make_node("Constant", [], ["c"], value_float=number)
                add = models.node("Add", [graph.output[0].name, "c"], [f"plus_{name}"])
                graph.node.extend([constant, add])
                graph.output[0].name = f"plus_{name}"

        return models.edited(edit)

    assert lamp_compile.compare(branches(1.0, 2.0), branches(1.0, 2.0)).same
    found = lamp_compile.compare(branches(1.0, 2.0), branches(2.0, 1.0))
    assert sorted(c.where for c in found.changes) == [f"{FUNCTION}/else_branch", f"{FUNCTION}/then_branch"]


def test_a_constant_may_be_a_node_or_an_initialiser() -> None:
    def as_node(model) -> None:
        model.graph.node.insert(0, onnx.helper.make_node("Constant", [], ["one"], value_float=1.0))
        model.graph.node[-1].CopyFrom(models.node("Add", [model.graph.node[-1].input[0], "one"], ["y"]))

    def as_initialiser(model) -> None:
        model.graph.initializer.append(onnx.helper.make_tensor("k", 1, [], [1.0]))
        model.graph.node[-1].CopyFrom(models.node("Add", [model.graph.node[-1].input[0], "k"], ["y"]))

    assert lamp_compile.compare(models.edited(as_node), models.edited(as_initialiser)).same


def test_an_initialiser_that_callers_may_override_is_part_of_the_interface() -> None:
    def edit(model) -> None:
        model.graph.input.append(onnx.helper.make_tensor_value_info("layers.0.attn.q.weight", 1, [16, 16]))

    (change,) = lamp_compile.compare(models.decoder(), models.edited(edit)).changes
    assert (change.tier, change.text) == ("interface", "override.layers.0.attn.q.weight is new: allowed")


def test_an_undefined_value_is_an_error() -> None:
    def edit(model) -> None:
        model.graph.node[0].input[0] = "nothing"

    with pytest.raises(InputError, match="'nothing'"):
        lamp_compile.snapshot(models.edited(edit))


def test_a_circle_is_an_error() -> None:
    def edit(model) -> None:
        model.graph.node[0].input[0] = model.graph.node[-1].input[0]

    with pytest.raises(InputError, match="cycle"):
        lamp_compile.snapshot(models.edited(edit))


def test_text_report_of_an_edit(base: Snapshot) -> None:
    """As a reviewer reads it."""
    text = reporters.render(lamp_compile.compare(base, models.edited(models.cast_to_fp16)), "text", 20)
    assert text == (
        "- A\n+ B\nattributes: 1 difference\n"
        "  ai.lamp::LookAheadAttention: Cast: to bfloat16 -> float16\n"
        "    - %cast1 = Cast(%matmul1) {to=bfloat16}\n"
        "    + %cast1 = Cast(%matmul1) {to=float16}\n"
        "1 difference\n"
    )
