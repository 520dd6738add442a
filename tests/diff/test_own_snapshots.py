"""The project's own graphs against committed snapshots. ``make golden`` accepts changes; read them before you commit.

Of the newest torch that is supported: exporters of other versions may write other operators for the same model.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import lamp_compile
from tests.diff.test_torch_programs import rewritten

TORCH = "2.13."


def test_exported_program(lamp_snapshot, reference_only) -> None:
    """Two layers of attention, rewritten: quantize, look_ahead, select, attend, guard."""
    if not torch.__version__.startswith(TORCH):
        pytest.skip(f"snapshots are of torch {TORCH}x")
    lamp_snapshot(rewritten())


def test_plan(lamp_snapshot, nano: Path) -> None:
    """What is decided for the packaged model."""
    model = AutoModelForCausalLM.from_pretrained(nano, dtype=torch.float32).eval()
    lamp_snapshot(lamp_compile.compile(model, mode="eager"))


def test_onnx_functions(lamp_snapshot) -> None:
    """The functions of domain ai.lamp, with bodies of standard operators."""
    helper = pytest.importorskip("onnx.helper", reason="needs the onnx package")
    values = [helper.make_tensor_value_info(name, 1, ["batch", 4, "seq", 64]) for name in "qkvy"]
    node = helper.make_node("Attention", ["q", "k", "v"], ["y"], name="layers.0/attn", is_causal=1)
    graph = helper.make_graph([node], "one", values[:3], values[3:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    lamp_snapshot(lamp_compile.rewrite_onnx(model).model)
