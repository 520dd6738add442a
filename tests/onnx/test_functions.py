"""The functions of domain ai.lamp, one node at a time, against the torch reference."""

from __future__ import annotations

import numpy as np
import onnxruntime as ort
import pytest
import torch
from onnx import checker
from onnx.reference import ReferenceEvaluator

from lamp_compile.errors import OptionError
from lamp_compile.frontends.onnx import functions
from lamp_compile.frontends.onnx.exporting import targets
from lamp_compile.frontends.onnx.form import Form
from lamp_compile.runtime import guard
from lamp_compile.runtime.attend_in_parts import attend_in_parts
from tests.onnx.nodes import PLANES, node_model, numpy, rotations, session
from tests.tolerances import ONNX

B, H, G, S, D, DV, N = 2, 4, 2, 3, 64, 32, 192
EVERYTHING = {
    "causal": "", "mask": "keys", "bias": True, "sinks": True, "start": True, "balance": True, "softcap": True,
}  # fmt: skip
CASES = {
    "few hot": (Form(), {"tau": 0.4}),
    "most hot": (Form(), {"tau": 0.02}),
    "none hot": (Form(), {"tau": 1e9}),
    "floor 1": (Form(), {"floor": 1.0}),
    "floor 2": (Form(), {"floor": 2.0}),
    "select": (Form(guard="select"), {"tau": 0.4}),
    "float": (Form(arithmetic="float"), {"tau": 0.4}),
    "strict": (Form(rule="lamp_strict"), {"tau": 0.1}),
    "relaxed": (Form(rule="lamp_relaxed", softcap=True), {"tau": 0.5, "softcap": 5.0}),
    "bf16 query": (Form(query_bits=16, rotation=False), {}),
    "bf16 query in float": (Form(query_bits=16, arithmetic="float"), {}),
    "float query": (Form(query_bits=0, guard="select"), {}),
    "large tiles": (Form(tile=64, subtile=16, window=True), {"window": 50}),
    "newest key alone in its sub-tile": (Form(), {"lengths": (97, 33)}),
    "sub-tile just behind": (Form(), {"lengths": (96, 32)}),
    "everything": (Form(**EVERYTHING), {"softcap": 3.0}),
    "one column": (Form(mask="column", causal="top_left"), {}),
}


def relative(got: np.ndarray, wanted: torch.Tensor) -> float:
    return float(np.linalg.norm(got - wanted.numpy()) / max(1e-30, np.linalg.norm(wanted.numpy())))


def cached(form: Form, tau=0.1, floor=0.0, window=0, softcap=0.0, lengths=(N - 20, N - 60)):
    """Inputs of a FusedAttention node, its attributes, and what the reference gives."""
    q, k, v = torch.randn(B, H, S, D), torch.randn(B, G, N - 20, D), torch.randn(B, G, N - 20, DV)
    q[:, :, :, :] += 2 * k[:, :1, 5:6]  # one key that matters
    kind = "hadamard" if form.rotation else "none"
    given = {
        "balance": torch.rand(G, D) + 0.5 if form.balance else None,
        "start": torch.tensor([3, 0]) if form.start else None,
        "mask": {"keys": torch.rand(B, 1, S, N) > 0.2, "column": torch.rand(B, 1, S, 1) > 0.3}.get(form.mask),
        "bias": torch.randn(1, H, S, N) if form.bias else None,
        "sinks": torch.randn(H) if form.sinks else None,
    }
    if form.mask == "keys":
        given["mask"][0, 0, 1] = False  # a row that sees nothing
    planes = torch.ops.lamp.quantize(
        k, v, given["balance"], k_format="nested8", v_format="nested8", rotation=kind, tile=form.tile, site=""
    )
    lengths = torch.tensor(lengths)
    hot = (torch.full((G,), tau), torch.full((G,), floor), torch.full((G,), 0.01))
    state, stats = guard.new_state(B, G), guard.new_stats(B, G)
    state[0, 0] = torch.tensor([0.0, 1.0, 2.0, 1.0])
    numbers = {"scale": D**-0.5, "guard_window": 4, "guard_hold": 5, "hysteresis": 0.5}
    wanted = attend_in_parts(
        q, planes, (*hot, state, stats),
        (given["balance"], given["mask"], given["bias"], given["sinks"], given["start"], lengths, None),
        dict(
            numbers, causal=form.causal, window=window, softcap=softcap, keys=N, k_format="nested8",
            v_format="nested8", rotation=kind, rule=form.rule, query_bits=form.query_bits, subtile=form.subtile,
            site="",
        ),
    )  # fmt: skip
    tensors = {"q": q, **dict(zip(PLANES, planes, strict=True)), **dict(zip(functions.HOT, hot, strict=True))}
    inputs = numpy({**tensors, "state": state, "stats": stats, "lengths": lengths})
    inputs |= rotations(form, D, DV)
    inputs |= numpy(given)
    if window:
        numbers["window"] = window
    if softcap:
        numbers["softcap"] = softcap
    return inputs, numbers, wanted


def close(got, wanted) -> None:
    assert relative(got[0], wanted[0]) < ONNX["node"].relative
    assert relative(got[1], wanted[1]) < ONNX["state"].relative
    assert np.array_equal(got[2], wanted[2].numpy())


@pytest.mark.parametrize("name", CASES)
def test_fused_attention(name: str) -> None:
    form, settings = CASES[name]
    inputs, numbers, wanted = cached(form, **settings)
    model = node_model("FusedAttention", form, inputs, ["out", "state_new", "stats_new"], **numbers)
    checker.check_model(model, full_check=True)
    got = session(model).run(None, inputs)
    close(got, wanted)
    refined, live = got[2][..., guard.REFINED].sum(), got[2][..., guard.LIVE].sum()
    share = {"few hot": (0.01, 0.5), "most hot": (0.5, 1.0), "none hot": (0.0, 0.3)}.get(name, (0.0, 1.0))
    assert share[0] <= refined / live <= share[1], "the case is not what its name says"


def test_reference_evaluator_agrees() -> None:
    for name in ("few hot", "everything", "float"):
        form, settings = CASES[name]
        inputs, numbers, wanted = cached(form, **settings)
        model = node_model("FusedAttention", form, inputs, ["out", "state_new", "stats_new"], **numbers)
        with np.errstate(invalid="ignore"):
            close(ReferenceEvaluator(model).run(None, inputs), wanted)


def test_a_row_that_is_not_finite_and_a_step_over_budget_are_counted_as_the_reference_does() -> None:
    """NaN in one query: the floor of its kv head goes to 2 without being counted as raised; others are over budget."""
    form = Form()
    inputs, numbers, _ = cached(form)
    inputs["q"] = inputs["q"].copy()
    inputs["q"][0, 0, 1, 5], inputs["budget"] = np.nan, np.full(G, 1e-6, np.float32)
    tensors = {name: torch.from_numpy(x) for name, x in inputs.items()}
    given = [tensors[name] for name in (*functions.HOT, "state", "stats")]
    wanted = attend_in_parts(
        tensors["q"], [tensors[name] for name in PLANES], given,
        (None, None, None, None, None, tensors["lengths"], None),
        dict(
            numbers, causal=form.causal, window=0, softcap=0.0, keys=N, k_format="nested8", v_format="nested8",
            rotation="hadamard", rule="energy", query_bits=8, subtile=32, site="",
        ),
    )  # fmt: skip
    model = node_model("FusedAttention", form, inputs, ["out", "state_new", "stats_new"], **numbers)
    got = session(model).run(None, inputs)
    assert np.isnan(got[0][0, 0, 1]).all()
    assert np.isnan(got[0]).sum() == DV
    assert got[1][0, 0, guard.FLOOR] == 2.0
    assert np.array_equal(got[2][..., guard.RAISED :], wanted[2].numpy()[..., guard.RAISED :])
    assert got[2][0, 0, guard.BAD] == 1
    assert got[2][1, 1, guard.RAISED] == 1
    assert relative(got[1], wanted[1]) < ONNX["state"].relative


def append_inputs(form: Form, capacity: int = 96, rows: int = 5):
    DV = D if form.paired else D // 2
    k, v = torch.randn(B, G, rows, D), torch.randn(B, G, rows, DV)
    k[0, 0, 0, 0], k[0, 1, 1], v[1, 0, 2, 3] = float("nan"), 0.0, float("nan")
    if form.arithmetic == "integer":
        k[1, 1, 2] *= 1e-9  # too small for a scale: stored as 0
    balance = torch.rand(G, D) + 0.5 if form.balance else None
    lead = (B, G, capacity // 32)
    planes = [
        *torch.randint(0, 256, (2, *lead, 32, D // 2), dtype=torch.uint8), torch.rand(B, G, capacity).half(),
        *torch.randint(0, 256, (2, *lead, DV // 2, 32), dtype=torch.uint8), torch.rand(B, G, capacity).half(),
    ]  # fmt: skip
    positions = torch.tensor([30, 7])
    inputs = numpy({"k": k, "v": v, **dict(zip(PLANES, planes, strict=True)), "positions": positions})
    inputs = {name: x.copy() for name, x in inputs.items()} | rotations(form, D, DV) | numpy({"balance": balance})
    kind = "hadamard" if form.rotation else "none"
    torch.ops.lamp.append(
        k, v, *planes, balance, positions, None, k_format="nested8", v_format="nested8", rotation=kind, site=""
    )
    return inputs, planes


PAIRED = [Form(paired=True, balance=True), Form("select", "float", paired=True)]


@pytest.mark.parametrize("form", [Form(), Form(balance=True), Form(rotation=False), Form(arithmetic="float"), *PAIRED])
def test_append_writes_the_same_bytes_in_place(form: Form) -> None:
    inputs, wanted = append_inputs(form)
    model = node_model("Append", form, inputs, list(functions.outputs_of("Append")))
    run = session(model)
    values = {name: ort.OrtValue.ortvalue_from_numpy(x) for name, x in inputs.items()}
    addresses = {name: values[name].data_ptr() for name in PLANES}
    binding = run.io_binding()
    for name, value in values.items():
        binding.bind_ortvalue_input(name, value)
    for name in PLANES:
        binding.bind_ortvalue_output(f"{name}_new", values[name])
    run.run_with_iobinding(binding)
    for name, made, plane in zip(PLANES, binding.get_outputs(), wanted, strict=True):
        assert made.data_ptr() == addresses[name]
        assert np.array_equal(made.numpy(), plane.numpy(), equal_nan=name.endswith("scale")), name


@pytest.mark.parametrize("floor", [0.0, 1.0, 2.0])
@pytest.mark.parametrize(
    "form",
    [Form(cache=False, causal=""), Form("select", "float", cache=False, causal="top_left", mask="keys", bias=True)],
    ids=["if", "select"],
)
def test_uncached_attention(form: Form, floor: float) -> None:
    from lamp_compile.frontends.onnx.exporting import torch_ops  # noqa: F401

    rows = 40
    q, k, v = torch.randn(B, H, rows, D) * 2, torch.randn(B, G, rows, D), torch.randn(B, G, rows, DV)
    mask = torch.rand(B, 1, rows, rows) > 0.2 if form.mask else None
    bias = torch.randn(1, 1, rows, rows) if form.bias else None
    hot = (torch.full((G,), 0.2), torch.full((G,), floor), torch.full((G,), 0.01))
    state, stats = guard.new_state(1, G), guard.new_stats(1, G)
    wanted = torch.ops.lamp_onnx.uncached_attention(
        q, k, v, *hot, state, stats, None, mask, bias, None, causal=form.causal, window=0, scale=0.125, softcap=0.0,
        rotation="hadamard", rule="energy", query_bits=8, subtile=32, guard_window=16, guard_hold=64, hysteresis=0.5,
        site="", tile=32,
    )  # fmt: skip
    tensors = {"q": q, "k": k, "v": v, **dict(zip(functions.HOT, hot, strict=True)), "state": state, "stats": stats}
    inputs = numpy(tensors) | rotations(form, D, DV) | numpy({"mask": mask, "bias": bias})
    model = node_model("UncachedAttention", form, inputs, ["out", "state_new", "stats_new"], scale=0.125)
    checker.check_model(model, full_check=True)
    close(session(model).run(None, inputs), wanted)


def walk(nodes, known: set[str], where: str) -> None:
    """Every value is defined once, and before it is used."""
    for node in nodes:
        for name in node.input:
            assert not name or name in known, f"{where}: {name} is used and not made"
        for attribute in node.attribute:
            if attribute.HasField("g"):
                walk(attribute.g.node, set(known), where)
        for name in node.output:
            assert name not in known, f"{where}: {name} is made twice"
            known.add(name)


@pytest.mark.parametrize("form", [form for form, _ in CASES.values()] + [Form(cache=False, causal="")])
def test_bodies_are_well_formed(form: Form) -> None:
    made = functions.functions_for([form])
    names = [(f.domain, f.name, f.overload) for f in made]
    assert len(set(names)) == len(names)
    for function in made:
        known = set(function.input)
        walk(function.node, known, function.name)
        assert set(function.output) <= known


def test_forms_share_a_model() -> None:
    """Two forms in one model: nodes by overload, inner functions by number."""
    made = functions.functions_for([Form(), Form(window=True), Form()])
    assert sorted({f.overload for f in made if f.name == "FusedAttention"}) == sorted(
        [Form().tag, Form(window=True).tag]
    )
    assert {f.name for f in made} >= {"Visible", "Visible_2", "Attend", "Attend_2"}


def test_select_has_no_control_flow_and_float_no_bits() -> None:
    for target in (targets.TARGETS["cuda"], targets.TARGETS["migraphx"]):
        made = functions.functions_for(
            [Form("select", "float", balance=True), Form("select", "float", cache=False, causal="", query_bits=16)]
        )
        used = {node.op_type for f in made for node in f.node if not node.domain}
        assert not used & {"If", "Loop", "Scan", "NonZero", "Attention", *target.forbidden}


def test_what_has_no_body_is_refused() -> None:
    with pytest.raises(OptionError, match="rule 'mass' has no ONNX body"):
        Form(rule="mass")
    with pytest.raises(OptionError, match="window needs"):
        Form(window=True, causal="")
    with pytest.raises(OptionError, match="opset 17"):
        functions.functions_for([Form()], opset=17)
    with pytest.raises(OptionError, match="no 'window'"):
        functions.attributes_for("FusedAttention", Form(), window=4)
