"""MatMul, Softmax, MatMul in the spellings that exporters use; what is no attention, and what has to stay."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from lamp_compile.errors import ModelError, OptionError
from lamp_compile.frontends.onnx.rewriting.rewrite import rewrite_onnx
from tests.onnx import sessions

HEAD = """<ir_version: 8, opset_import: ["" : {opset}]>
g (float[B,4,S,16] q, float[B,{kv},N,16] k, float[B,{kv},N,16] v, float[S,N] bias, bool[S,N] seen) => ({outputs}) {{
"""
KT = "kt = Transpose<perm = [0, 1, 3, 2]>(k)\n"
CONSTANTS = {
    "quarter": np.float32(0.3), "root": np.float32(0.3**0.5), "over": np.float32(1 / 0.3), "zero": np.float32(0),
    "lowest": np.float32(-3.4028235e38), "never": np.float32(-np.inf), "cap": np.float32(2), "some": np.float32(-5),
    "two": np.int64([2]), "last": np.int64([-1]), "first": np.int64([0]), "one": np.int64([1]), "four": np.int64([4]),
    "group": np.int64([1, 1, 2, 1, 1]), "flat": np.int64([0, 4, -1, 16]), "minus_two": np.int64([-2]),
    "begin": np.int64([-(2**63)]), "end": np.int64([2**63 - 1]), "sixteen": np.int64([16]), "half": np.float32(0.5),
    "yes": np.bool_(True), "merged": np.int64([-1, 9, 16]), "merged_q": np.int64([-1, 5, 16]),
}  # fmt: skip


def model(body: str, kv: int = 4, outputs: str = "float[B,4,S,16] out", opset: int = 20) -> onnx.ModelProto:
    """A model around a body; it may use every constant."""
    made = onnx.parser.parse_model(HEAD.format(kv=kv, outputs=outputs, opset=opset) + body + "\n}")
    used = {name for node in made.graph.node for name in node.input}
    for name, value in CONSTANTS.items():
        if name in used:
            made.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
    return made


def feeds(kv: int = 4) -> dict[str, Any]:
    rng = np.random.default_rng(3)
    shapes = {"q": (2, 4, 5, 16), "k": (2, kv, 9, 16), "v": (2, kv, 9, 16), "bias": (5, 9)}
    made: dict[str, Any] = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    made["seen"] = np.tri(5, 9, 4, dtype=bool)
    return made


def given(made: onnx.ModelProto, kv: int = 4) -> dict[str, Any]:
    """Feeds without the inputs that nothing reads (they stay inputs, and have to be fed)."""
    return {name: value for name, value in feeds(kv).items() if name in {i.name for i in made.graph.input}}


PLAIN = "y = Mul(s, quarter)\np = Softmax<axis = -1>(y)\nout = MatMul(p, v)"
SPELLINGS = {
    "scale after": KT + "s = MatMul(q, kt)\n" + PLAIN,
    "divided": KT + "s = MatMul(q, kt)\ny = Div(s, over)\np = Softmax(y)\nout = MatMul(p, v)",
    "scale before": KT + "a = Mul(q, quarter)\ny = MatMul(a, kt)\np = Softmax(y)\nout = MatMul(p, v)",
    "scale on both": KT
    + "r = Sqrt(quarter)\na = Mul(q, r)\nb = Mul(kt, root)\ny = MatMul(a, b)\np = Softmax(y)\nout = MatMul(p, v)",
    "keys scaled first": "b = Mul(quarter, k)\nkt = Transpose<perm = [0, 1, 3, 2]>(b)\n"
    "y = MatMul(q, kt)\np = Softmax(y)\nout = MatMul(p, v)",
    "bias": KT + "s = MatMul(q, kt)\nz = Mul(s, quarter)\ny = Add(bias, z)\np = Softmax(y)\nout = MatMul(p, v)",
    "mask filled": KT + "s = MatMul(q, kt)\nz = Mul(s, quarter)\ny = Where(seen, z, lowest)\n"
    "p = Softmax(y)\nout = MatMul(p, v)",
    "hidden filled": KT + "s = MatMul(q, kt)\nz = Mul(s, quarter)\nhidden = Not(seen)\ny = Where(hidden, never, z)\n"
    "p = Softmax(y)\nout = MatMul(p, v)",
    "mask added": KT + "s = MatMul(q, kt)\nz = Mul(s, quarter)\nm = Where(seen, zero, never)\ny = Add(z, m)\n"
    "p = Softmax(y)\nout = MatMul(p, v)",
    "finite mask added, empty rows cleared": KT
    + "s = MatMul(q, kt)\nz = Mul(s, quarter)\nm = Where(seen, zero, lowest)"
    "\ny = Add(z, m)\np = Softmax(y)\nn = IsNaN(p)\nw = Where(n, zero, p)\nout = MatMul(w, v)",
    "soft-cap": KT + "s = MatMul(q, kt)\nz = Mul(s, quarter)\nd = Div(z, cap)\nt = Tanh(d)\nc = Mul(t, cap)\n"
    "y = Add(c, bias)\np = Softmax(y)\nout = MatMul(p, v)",
    "largest taken off": KT + "s = MatMul(q, kt)\nz = Mul(s, quarter)\nm = ReduceMax(z, last)\ny = Sub(z, m)\n"
    "p = Softmax(y)\nout = MatMul(p, v)",
    "copies and inactive dropout": KT + "s = MatMul(q, kt)\nz = Mul(s, quarter)\ny = Cast<to = 1>(z)\np = Softmax(y)\n"
    "d, drop_mask = Dropout(p)\nw = Identity(d)\nout = MatMul(w, v)",
    "transposed with a rank that may vary": "shape = Shape(k)\nlead = Slice(shape, begin, minus_two)\n"
    "d = Slice(shape, last, end)\nn = Slice(shape, minus_two, last)\na = Concat<axis = 0>(last, n, d)\n"
    "k3 = Reshape(k, a)\nt3 = Transpose<perm = [0, 2, 1]>(k3)\nb = Concat<axis = 0>(lead, d, n)\nkt = Reshape(t3, b)\n"
    "s = MatMul(q, kt)\n" + PLAIN,
}  # fmt: skip


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_spelling_is_read(spelling: str) -> None:
    made = model(SPELLINGS[spelling])
    done = sessions.compared(made, given(made))
    assert not [node for node in done.model.graph.node if node.op_type in ("Softmax", "MatMul", "Tanh")]


REPEAT = "{x}x = Unsqueeze({x}, two)\n{x}e = Expand({x}x, group)\n{x}r = Reshape({x}e, flat)\n"
REPEATED = {
    "expanded by a constant": (2, REPEAT.format(x="k") + REPEAT.format(x="v")),
    "expanded by a computed shape": (
        2,
        "b = Shape<start = 0, end = 1>(k)\nn = Shape<start = 2, end = 3>(k)\n"
        "e = Concat<axis = 0>(b, two, two, n, sixteen)\nf = Concat<axis = 0>(b, four, n, sixteen)\n"
        "kx = Unsqueeze(k, two)\nke = Expand(kx, e)\nkr = Reshape(ke, f)\n"
        "vx = Unsqueeze(v, two)\nve = Expand(vx, e)\nvr = Reshape(ve, f)\n",
    ),
    "broadcast by the product": (1, "kr = Identity(k)\nvr = Identity(v)\n"),
}


@pytest.mark.parametrize("how", REPEATED)
def test_repeated_heads_are_seen_through(how: str) -> None:
    kv, prologue = REPEATED[how]
    body = (
        prologue + "kt = Transpose<perm = [0, 1, 3, 2]>(kr)\ns = MatMul(q, kt)\n" + PLAIN.replace("(p, v)", "(p, vr)")
    )
    done = sessions.compared(model(body, kv), feeds(kv))
    assert done.report.sites[0].kv_heads == kv
    assert not [node for node in done.model.graph.node if node.op_type == "Expand"]


def test_products_of_three_axes() -> None:
    body = """
    q3 = Reshape(q, merged_q) k3 = Reshape(k, merged) v3 = Reshape(v, merged)
    kt = Transpose<perm = [0, 2, 1]>(k3) s = MatMul(q3, kt) z = Mul(s, quarter) y = Add(z, bias)
    p = Softmax(y) o = MatMul(p, v3) shape = Shape(q) out = Reshape(o, shape)"""
    made = model(body)
    done = sessions.compared(made, given(made))
    assert done.report.sites[0].heads == 1


def test_a_row_that_sees_no_key_is_zero() -> None:
    made = model(SPELLINGS["mask added"])
    fed = given(made)
    fed["seen"][3] = False
    assert np.isnan(sessions.run(made, fed)[0]).any()
    out = sessions.run(rewrite_onnx(made, tau=0.0).model, fed)[0]
    assert not out[:, :, 3].any()
    assert np.isfinite(out).all()


REFUSED = {
    "scores or weights are used elsewhere, as an output": (
        KT + "s = MatMul(q, kt)\n" + PLAIN, "float[B,4,S,16] out, float[B,4,S,N] p"),
    "scores or weights are used elsewhere, by Neg": (
        KT + "s = MatMul(q, kt)\n" + PLAIN + "\nw = Neg(y)",
        "float[B,4,S,16] out, float[B,4,S,N] w"),
    "a bias is added before scaling": (KT + "z = MatMul(q, kt)\ns = Add(z, bias)\n" + PLAIN, ""),
    "scores are scaled by a computed value": (
        KT + "s = MatMul(q, kt)\nf = ReduceMax<keepdims = 0>(bias)\ny = Mul(s, f)\n"
        "p = Softmax(y)\nout = MatMul(p, v)", ""),
    "which does not hide a key": (
        KT + "s = MatMul(q, kt)\ny = Where(seen, s, some)\np = Softmax(y)\nout = MatMul(p, v)", ""),
    "hidden before soft-capping": (
        KT + "s = MatMul(q, kt)\nm = Where(seen, s, lowest)\nd = Div(m, cap)\nt = Tanh(d)\ny = Mul(t, cap)\n"
        "p = Softmax(y)\nout = MatMul(p, v)", ""),
    "divides and multiplies by different numbers": (
        KT + "s = MatMul(q, kt)\nd = Div(s, cap)\nt = Tanh(d)\ny = Mul(t, quarter)\n"
        "p = Softmax(y)\nout = MatMul(p, v)", ""),
    "training mode": (
        KT + "s = MatMul(q, kt)\np = Softmax(s)\nd = Dropout(p, half, yes)\nout = MatMul(d, v)", ""),
    "something is joined to the scores": (
        KT + "s = MatMul(q, kt)\nc = ReduceMax(s, last)\nj = Concat<axis = -1>(s, c)\nw = Softmax(j)\n"
        "p = Slice(w, first, last, last)\nout = MatMul(p, v)", ""),
}  # fmt: skip


@pytest.mark.parametrize("reason", REFUSED)
def test_what_stays_is_reported(reason: str) -> None:
    body, outputs = REFUSED[reason]
    with pytest.raises(ModelError, match="nothing to rewrite") as caught:
        rewrite_onnx(model(body, outputs=outputs or "float[B,4,S,16] out"))
    wanted = "does not lie between" if "joined" in reason else reason
    assert wanted in caught.value.what


def test_a_softmax_that_is_no_attention_is_reported_beside_one_that_is() -> None:
    made = model(
        KT + "s = MatMul(q, kt)\n" + PLAIN + "\nrouter = Softmax(bias)",
        outputs="float[B,4,S,16] out, float[S,N] router",
    )
    report = sessions.compared(made, given(made)).report
    assert [refusal.reason[:17] for refusal in report.unclaimed] == ["it does not lie b"]


def test_branches_and_functions_are_reported() -> None:
    made = model(KT + "s = MatMul(q, kt)\n" + PLAIN)
    nodes = [helper.make_node("Softmax", ["q"], ["inner"], name="/layers.1/attn/Softmax")]
    branch = helper.make_graph(nodes, "branch", [], [helper.make_empty_tensor_value_info("inner")])
    made.graph.initializer.append(numpy_helper.from_array(np.asarray(True), "condition"))
    made.graph.node.append(helper.make_node("If", ["condition"], ["i"], then_branch=branch, else_branch=branch))
    imports = [helper.make_opsetid("", 20)]
    soft = helper.make_node("Softmax", ["x"], ["y"])
    made.functions.append(helper.make_function("own", "Weights", ["x"], ["y"], [soft], imports))
    made.opset_import.append(helper.make_opsetid("own", 1))
    reasons = [refusal.reason for refusal in rewrite_onnx(made).report.unclaimed]
    assert reasons == ["it is inside a branch or loop"] * 2 + ["it is inside the function 'own.Weights'"]


def test_a_number_of_heads_that_is_not_known_is_refused() -> None:
    made = model(KT + "s = MatMul(q, kt)\n" + PLAIN)
    made.graph.input[0].type.tensor_type.shape.dim[1].dim_param = "H"
    made.graph.output[0].type.tensor_type.shape.dim[1].dim_param = "H"
    made.graph.input[0].type.tensor_type.shape.dim[1].ClearField("dim_value")
    with pytest.raises(ModelError, match="heads is dynamic"):
        rewrite_onnx(made)


def test_numbers_given_as_names_are_numbers() -> None:
    """transformers' exporter writes the sizes of a cache so."""
    made = model(KT + "s = MatMul(q, kt)\n" + PLAIN)
    for value in (*made.graph.input[1:3], *made.graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_value:
                dim.dim_param = str(dim.dim_value)
    assert rewrite_onnx(made).report.sites[0].kv_heads == 4


def test_an_attention_that_nobody_reads_stays_one() -> None:
    made = model(KT + "s = MatMul(q, kt)\n" + PLAIN.replace("out =", "lost =") + "\nout = Neg(q)")
    nodes = [node.op_type for node in rewrite_onnx(made).model.graph.node]
    assert nodes == ["UncachedAttention", "Neg"]


def test_too_old_an_opset_is_refused() -> None:
    made = model(KT + "s = MatMul(q, kt)\n" + PLAIN, opset=13)
    with pytest.raises(OptionError, match="opset 13, not 18 to 26"):
        rewrite_onnx(made)
