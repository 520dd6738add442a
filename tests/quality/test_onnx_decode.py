"""``benchmarks/onnx_decode.py``: its ratios and targets, and its GroupQueryAttention models, which must be right to be
rivals."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnx", reason="ONNX artifacts need the onnx package (extra: onnx-cpu)")
pytest.importorskip("onnxruntime", reason="needs ONNX Runtime (extra: onnx-cpu)")

from tests.ort.toy import Toy, model
from tests.tolerances import ORT_TOY


@pytest.fixture(scope="module")
def scripts(root: Path) -> dict[str, ModuleType]:
    import importlib

    sys.path.insert(0, str(root / "benchmarks"))
    try:
        return {name: importlib.import_module(name) for name in ("onnx_decode", "_onnx_rows", "_onnx_models")}
    finally:
        sys.path.pop(0)


def rows() -> list[dict[str, Any]]:
    ms = {"torch": 9.0, "plain": 6.0, "lamp_native": 3.0, "lamp_portable": 8.0}
    kept = {"torch": 4000, "plain": 4000, "lamp_native": 1016, "lamp_portable": 1016}
    return [
        {"name": name, "cached": 4096, "ms": ms[name], "kv_bytes_per_token": kept[name], "refined_share": None}
        for name in ms
    ]


def test_ratios_and_targets(scripts: dict[str, ModuleType]) -> None:
    found = rows()
    logits = {row["name"]: np.eye(4, dtype=np.float32) for row in found}
    logits["lamp_portable"] = logits["torch"] + 0.01
    scripts["_onnx_rows"].compare(found, logits)
    by_name = {row["name"]: row for row in found}
    assert by_name["lamp_native"]["speed_over_plain"] == 2.0
    assert by_name["lamp_portable"]["kv_share_of_fp32"] == pytest.approx(0.254)
    assert by_name["lamp_portable"]["same_tokens"] == 4
    assert "bit for bit" in by_name["lamp_native"]["failed"]  # equal to torch: nothing was rounded
    assert "failed" not in by_name["plain"]
    checked = scripts["onnx_decode"].targets(found)
    assert [item["met"] for item in checked] == [True, True, True, True]
    by_name["lamp_native"]["speed_over_plain"] = 0.9
    assert [item["met"] for item in scripts["onnx_decode"].targets(found)] == [False, False, True, True]
    assert not any(item["met"] for item in scripts["onnx_decode"].targets([]))
    assert all(scripts["_onnx_rows"].line(row) for row in found)


def test_grouped_query_attention_is_the_same_model(scripts: dict[str, ModuleType]) -> None:
    import onnxruntime

    toy = Toy()
    made = model(toy)
    names = {"ids": "input_ids", "slots": "positions"}
    for node in made.graph.node:
        for at, name in enumerate(node.input):
            node.input[at] = names.get(name, name)
    for value in made.graph.input:
        value.name = names.get(value.name, value.name)
    scripts["_onnx_models"]._replace(made, 32)
    session = onnxruntime.InferenceSession(made.SerializeToString(), providers=["CPUExecutionProvider"])
    ids = [3, 1, 4, 1, 5]
    feeds: dict[str, Any] = {"input_ids": np.array([ids]), "positions": np.array([0])}
    for i in range(toy.layers):
        for letter in "kv":
            feeds[f"past.{i}.{letter}"] = np.zeros((1, toy.kv_heads, 16, toy.dim), np.float32)
    logits = session.run(["logits"], feeds)[0][0, -1]
    wanted = toy.logits(ids)
    assert np.linalg.norm(logits - wanted) / np.linalg.norm(wanted) < ORT_TOY.relative / 100
