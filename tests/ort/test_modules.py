"""An artifact without a cache; and one that keeps a layer in floats."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lamp_compile.errors import InputError
from lamp_compile.runtime.ort.session import OrtSession


def write(folder: Path, about: dict[str, Any], nodes: list[Any], inputs: list[Any], outputs: list[Any]) -> Path:
    from onnx import helper

    graph = helper.make_graph(nodes, "module", inputs, outputs)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    helper.set_model_props(model, {"ai.lamp": json.dumps(about)})
    file = folder / "module.onnx"
    file.write_bytes(model.SerializeToString())
    return file


def test_a_module_is_run(tmp_path: Path) -> None:
    from onnx import TensorProto, helper

    info = helper.make_tensor_value_info
    x, y = (info(name, TensorProto.FLOAT, ["N", 3]) for name in "xy")
    file = write(tmp_path, {"version": 1, "kind": "module"}, [helper.make_node("Neg", ["x"], ["y"])], [x], [y])
    session = OrtSession(file, threads=1)
    given = np.ones((2, 3), np.float32)
    assert np.array_equal(session.run({"x": given})["y"], -given)
    for call in (lambda: session.start(1), lambda: session.generate([1], max_new_tokens=1)):
        with pytest.raises(InputError, match="no cache"):
            call()
    with pytest.raises(InputError):
        session.run({"z": given})


def test_a_layer_in_floats(tmp_path: Path) -> None:
    """Its keys and values are bound like planes, and grow like them."""
    from onnx import TensorProto, helper

    info, node = helper.make_tensor_value_info, helper.make_node
    ids, slots = info("ids", TensorProto.INT64, ["B", "S"]), info("slots", TensorProto.INT64, ["B"])
    kv = [[info(f"{side}.{n}", TensorProto.FLOAT, ["B", 1, "N", 2]) for n in "kv"] for side in ("past", "present")]
    logits = info("logits", TensorProto.FLOAT, ["B", "S", 4])
    four = helper.make_tensor("four", TensorProto.INT64, [1], [4])
    zero = helper.make_tensor("zero", TensorProto.INT64, [1], [0])
    nodes = [
        node("Identity", ["past.k"], ["present.k"]),
        node("Identity", ["past.v"], ["present.v"]),
        node("Constant", [], ["four"], value=four),
        node("Constant", [], ["axis"], value=zero),
        node("Shape", ["ids"], ["shape"]),
        node("Concat", ["shape", "four"], ["wide"], axis=0),
        node("Unsqueeze", ["ids", "last"], ["column"]),
        node("Cast", ["column"], ["number"], to=TensorProto.FLOAT),
        node("Expand", ["number", "wide"], ["logits"]),
    ]
    nodes.insert(0, node("Constant", [], ["last"], value=helper.make_tensor("last", TensorProto.INT64, [1], [2])))
    sides = {side: {n: f"{side}.{n}" for n in "kv"} for side in ("past", "present")}
    about = {
        "version": 1, "kind": "decoder", "inputs": {"tokens": "ids", "slots": "slots"}, "logits": "logits", "sites": [],
        "float_sites": [{"name": "layer", "kv_heads": 1, "head_dim": 2, **sides}],
    }  # fmt: skip
    session = OrtSession(write(tmp_path, about, nodes, [ids, slots, *kv[0]], [logits, *kv[1]]), threads=1)
    session.start(1)
    place = session.planes("layer")["k"].data_ptr()
    assert session.step([[3, 2]]).tolist() == [[2.0] * 4]
    assert session.planes("layer")["k"].data_ptr() == place
    session.prefill([[1] * 100])
    assert session.capacity >= 102
    assert session.statistics() == {}
    assert session.nbytes == 2 * session.capacity * 2 * 4
