"""From file to file: external data, metadata, plans, fuel, the command line, and what is not overwritten."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import lamp_compile
from lamp_compile import cli
from lamp_compile.errors import InputError, ModelError, OptionError, PassError, PlanError
from lamp_compile.frontends.onnx.files import reading
from lamp_compile.frontends.onnx.functions import DOMAIN
from lamp_compile.frontends.onnx.rewriting import replace, rewrite
from lamp_compile.frontends.onnx.rewriting.rewrite import rewrite_onnx
from lamp_compile.plan import Plan
from tests.onnx import sessions
from tests.onnx.test_rewrite_spellings import KT, PLAIN, REPEAT, feeds
from tests.onnx.test_rewrite_spellings import model as spelled

LAYERS = 3


def three_layers() -> onnx.ModelProto:
    """Three attentions with weights between them."""
    nodes, weights, x = [], [], "x"
    for layer in range(LAYERS):
        scope = helper.make_node
        projected = []
        for part in "qkv":
            weight = np.random.default_rng(ord(part) + layer).standard_normal((64, 64)).astype(np.float32) / 8
            weights.append(numpy_helper.from_array(weight, f"layers.{layer}.{part}.weight"))
            nodes.append(
                scope("MatMul", [x, f"layers.{layer}.{part}.weight"], [f"{part}{layer}"], name=f"{part}{layer}")
            )
            projected.append(f"{part}{layer}")
        out = f"x{layer}" if layer + 1 < LAYERS else "y"
        name = f"/layers.{layer}/attn/Attention"
        nodes.append(
            helper.make_node("Attention", projected, [out], name=name, q_num_heads=4, kv_num_heads=4, is_causal=1)
        )
        x = out
    info = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["B", "S", 64]) for n in ("x", "y")]
    graph = helper.make_graph(nodes, "net", info[:1], info[1:], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    model.metadata_props.add(key="author", value="somebody")
    onnx.checker.check_model(model, full_check=True)
    return model


FEED = {"x": np.random.default_rng(0).standard_normal((2, 40, 64)).astype(np.float32)}


@pytest.fixture
def on_disk(tmp_path: Path) -> Path:
    """The model with its weights in a file of their own."""
    folder = tmp_path / "original"
    folder.mkdir()
    onnx.save(
        three_layers(), folder / "model.onnx", save_as_external_data=True, location="weights.bin", size_threshold=0
    )
    return folder / "model.onnx"


def run_file(path: Path) -> np.ndarray:
    import onnxruntime as ort

    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, FEED)[0]  # type: ignore[no-any-return]


def test_external_data_stays_external(on_disk: Path, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in on_disk.parent.iterdir()}
    other = tmp_path / "other"
    other.mkdir()
    for target in (on_disk.parent / "lamp.onnx", other / "lamp.onnx"):
        done = rewrite_onnx(on_disk, target, tau=0.0)
        assert len(done.report.rewritten) == LAYERS
        onnx.checker.check_model(str(target), full_check=True)
        tensors = list(reading.all_tensors(reading.load(target)))
        assert sum(tensor.data_location == TensorProto.EXTERNAL for tensor in tensors) == 3 * LAYERS
        assert target.stat().st_size < 150_000
        assert sessions.error(run_file(target), run_file(on_disk)) < 0.02
    assert (other / "weights.bin").read_bytes() == before[on_disk.parent / "weights.bin"]
    assert {path: path.read_bytes() for path in before} == before
    assert sorted(path.name for path in other.iterdir()) == ["lamp.onnx", "weights.bin"]


def test_scales_and_shapes_may_be_external_too(tmp_path: Path) -> None:
    body = REPEAT.format(x="k") + REPEAT.format(x="v") + KT.replace("(k)", "(kr)") + "s = MatMul(q, kt)\n"
    made = spelled(body + PLAIN.replace("(p, v)", "(p, vr)"), kv=2)
    wanted = sessions.compared(made, feeds(2)).report
    onnx.save(made, tmp_path / "m.onnx", save_as_external_data=True, location="all.bin", size_threshold=0)
    report = rewrite_onnx(tmp_path / "m.onnx", tmp_path / "out.onnx", tau=0.0).report
    assert report.sites == wanted.sites
    assert report.sites[0].kv_heads == 2


def test_what_is_in_the_way_is_not_overwritten(on_disk: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    with pytest.raises(InputError, match="folder does not exist"):
        rewrite_onnx(on_disk, other / "lamp.onnx")
    other.mkdir()
    (other / "weights.bin").write_bytes(b"somebody else's")
    with pytest.raises(InputError, match="another data file"):
        rewrite_onnx(on_disk, other / "lamp.onnx")
    with pytest.raises(InputError, match="overwrite the original"):
        rewrite_onnx(on_disk, on_disk.parent / "." / "model.onnx")
    with pytest.raises(InputError, match="it is a folder"):
        rewrite_onnx(on_disk, other)
    assert [path.name for path in other.iterdir()] == ["weights.bin"]
    assert (other / "weights.bin").read_bytes() == b"somebody else's"


def test_the_argument_stays_and_twice_is_refused() -> None:
    model = three_layers()
    done = lamp_compile.rewrite_onnx(model)
    assert model == three_layers()
    assert rewrite_onnx(model).model.SerializeToString(deterministic=True) == done.model.SerializeToString(
        deterministic=True
    )
    with pytest.raises(ModelError, match="already rewritten: 3 nodes"):
        rewrite_onnx(done.model)


def test_the_plan_is_in_the_metadata_and_is_obeyed() -> None:
    model = three_layers()
    done = rewrite_onnx(model, tau=0.05, preset="aggressive", guard="select")
    metadata = {entry.key: entry.value for entry in done.model.metadata_props}
    assert metadata["author"] == "somebody"
    assert metadata[rewrite.VERSION_KEY] == lamp_compile.__version__
    plan = Plan.from_json(metadata[rewrite.PLAN_KEY])
    assert [row.name for row in plan.sites] == [f"layers.{layer}.attn" for layer in range(LAYERS)]
    assert {row.tau for row in plan.sites} == {0.05}
    tau = next(t for t in done.model.graph.initializer if t.name == "lamp/layers.1.attn/tau")
    assert numpy_helper.to_array(tau).tolist() == [np.float32(0.05)] * 4
    assert "If" not in {node.op_type for function in done.model.functions for node in function.node}
    data = json.loads(plan.to_json())
    data["sites"][1].update(apply=False, reason="by hand")
    again = rewrite_onnx(model, plan=Plan.from_json(json.dumps(data)))
    assert again.report.rewritten == ("layers.0.attn", "layers.2.attn")
    assert [node.name for node in again.model.graph.node if node.op_type == "Attention"] == ["/layers.1/attn/Attention"]


def test_fuel() -> None:
    for fuel in range(LAYERS + 1):
        done = rewrite_onnx(three_layers(), fuel=fuel)
        assert sum(node.domain == DOMAIN for node in done.model.graph.node) == fuel
        assert len(done.report.sites) == LAYERS
        sessions.run(sessions.sound(done, three_layers()), FEED)


def test_options_are_checked_first() -> None:
    for options, kind in (
        ({"tua": 1}, OptionError), ({"guard": "maybe"}, OptionError), ({"fuel": -1}, OptionError),
        ({"preset": "wild"}, OptionError), ({"tau": -1.0}, PlanError), ({"k_format": "fp8"}, PlanError),
        ({"rule": "mass"}, PlanError), ({"tau": (0.1, 0.2)}, PlanError), ({"plan": "no such file"}, PlanError),
    ):  # fmt: skip
        with pytest.raises(kind):
            rewrite_onnx(three_layers(), **options)  # type: ignore[arg-type]


def test_a_broken_rewrite_is_not_handed_out(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(replace, "_complete", lambda *_: None)  # functions forgotten
        with pytest.raises(PassError, match=r"malformed: domain .* is not imported"):
            rewrite_onnx(three_layers())
    monkeypatch.setattr(replace, "_splice", lambda *_: None)  # the graph left as it was
    with pytest.raises(PassError, match=r"sites \[\] came out"):
        rewrite_onnx(three_layers())


def test_command_line(on_disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = on_disk.parent / "lamp.onnx"
    assert cli.main(["rewrite", str(on_disk), "--dry-run"]) == 0
    assert not target.exists()
    assert "3 of 3 attention sites rewritten" in capsys.readouterr().out
    assert cli.main(["rewrite", str(on_disk), str(target), "--json", "--set", "tau=0.02", "--fuel", "2"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["rewritten"] == ["layers.0.attn", "layers.1.attn"]
    assert report["plan"]["sites"][2]["tau"] == 0.02
    assert reading.load(target).functions
    for bad, text in (
        ([str(on_disk)], "nowhere to write"),
        ([str(on_disk), str(target), "--dry-run"], "beside a file"),
        ([str(target), "--dry-run"], "already rewritten"),
        ([str(on_disk.parent / "weights.bin"), "--dry-run"], "weights.bin"),
    ):
        assert cli.main(["rewrite", *bad]) == 1
        assert text in capsys.readouterr().err
