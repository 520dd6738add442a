"""com.microsoft MultiHeadAttention and GroupQueryAttention against ONNX Runtime's own kernels."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

from lamp_compile.errors import ModelError
from lamp_compile.frontends.onnx.rewriting import find
from lamp_compile.frontends.onnx.rewriting.rewrite import rewrite_onnx
from tests import tolerances
from tests.onnx import sessions

B, S, N, H, G, D = 2, 5, 9, 4, 2, 16
MULTI = ("query", "key", "value", "bias", "key_padding_mask", "attention_bias", "past_key", "past_value")
GROUP = ("query", "key", "value", "past_key", "past_value", "seqlens_k", "total_sequence_length", "cos_cache",
         "sin_cache", "position_ids", "attention_bias", "head_sink")  # fmt: skip


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def info(name: str, x: np.ndarray) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(x.dtype), x.shape)


def model(operator: str, fed: dict[str, Any], outputs: list[str], **attributes: Any) -> onnx.ModelProto:
    """One node; its inputs are the model's."""
    order = MULTI if operator == "MultiHeadAttention" else GROUP
    inputs = [name if name in fed else "" for name in order]
    while not inputs[-1]:
        inputs.pop()
    node = helper.make_node(operator, inputs, outputs, domain="com.microsoft", name="/layers.3/attn/A", **attributes)
    infos = [info(name, x) for name, x in fed.items()]
    graph = helper.make_graph([node], "g", infos, [helper.make_empty_tensor_value_info(name) for name in outputs])
    imports = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    made = helper.make_model(graph, opset_imports=imports, ir_version=9)
    for value, x in zip(made.graph.output, sessions.run(made, fed), strict=True):
        value.CopyFrom(info(value.name, x))
    return made


def attends(x: np.ndarray) -> dict[str, Any]:
    return {"query": normal(B, S, H * D), "key": normal(B, len(x[0]), H * D), "value": normal(B, len(x[0]), H * D) + 1}


PADDING = np.int32([[1] * N, [1] * 6 + [0] * 3])
CROSS = attends(np.zeros((1, N)))
OWN = attends(np.zeros((1, S)))
PAST = {"past_key": normal(B, H, 3, D), "past_value": normal(B, H, 3, D) - 1}
MULTIHEAD: dict[str, tuple[dict[str, Any], dict[str, Any], list[str]]] = {
    "cross": (CROSS, {}, ["out"]),
    "bias and scale": ({**CROSS, "bias": normal(3 * H * D)}, {"scale": 0.3}, ["out"]),
    "padding": ({**CROSS, "key_padding_mask": PADDING}, {}, ["out"]),
    "padding and a bias": (
        {**CROSS, "key_padding_mask": PADDING, "attention_bias": normal(1, H, S, N)}, {}, ["out"]),
    "past": ({**OWN, **PAST}, {"unidirectional": 1}, ["out", "present_key", "present_value"]),
    "present alone": (OWN, {"unidirectional": 1}, ["out", "present_key", "present_value"]),
}  # fmt: skip


@pytest.mark.parametrize("case", MULTIHEAD)
def test_multi_head(case: str) -> None:
    fed, attributes, outputs = MULTIHEAD[case]
    made = model("MultiHeadAttention", fed, outputs, num_heads=H, **attributes)
    done = sessions.compared(made, fed)
    assert done.report.sites[0].name == "layers.3.attn"
    for got, wanted in zip(sessions.run(done.model, fed)[1:], sessions.run(made, fed)[1:], strict=True):
        assert np.array_equal(got, wanted)


def step(
    tokens: int, past: int, lengths: list[int], total: int, *, packed: bool = False, **given: Any
) -> dict[str, Any]:
    """Inputs of a GroupQueryAttention step: new tokens, rows in the cache, lengths afterwards."""
    batch = len(lengths)
    widths = {"query": (H + 2 * G) * D} if packed else {"query": H * D, "key": G * D, "value": G * D}
    fed: dict[str, Any] = {name: normal(batch, tokens, width) for name, width in widths.items()}
    fed |= {"past_key": normal(batch, G, past, D), "past_value": normal(batch, G, past, D) + 1}
    fed["seqlens_k"], fed["total_sequence_length"] = np.int32(lengths) - 1, np.array(total, np.int32)
    return {**fed, **given}


ANGLES = np.arange(64)[:, None] / 100 ** (np.arange(D // 2) / (D // 2))
ROTARY = {"cos_cache": np.cos(ANGLES).astype(np.float32), "sin_cache": np.sin(ANGLES).astype(np.float32)}
GROUPED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "prompt": (step(6, 0, [6, 6], 6), {}),
    "prompt of two lengths": (step(6, 0, [6, 4], 6), {}),
    "prompt, packed, rotary": (step(6, 0, [6, 6], 6, packed=True, **ROTARY), {"do_rotary": 1}),
    "window": (step(6, 0, [6, 6], 6), {"local_window_size": 3}),
    "next token": (step(1, 5, [6, 6], 6), {"softcap": 3.0}),
    "next token, two lengths, rotary": (step(1, 7, [8, 5], 8, **ROTARY), {"do_rotary": 1}),
    "next token, interleaved": (step(1, 7, [8, 8], 8, **ROTARY), {"do_rotary": 1, "rotary_interleaved": 1}),
    "next token into a longer buffer": (step(1, 12, [8, 5], 8), {}),
    "window and bias": (step(1, 7, [8, 8], 8, attention_bias=normal(1, 1, 1, 8)), {"local_window_size": 4}),
    "several tokens into a longer buffer": (step(4, 16, [10], 10), {"scale": 0.2}),
}


@pytest.mark.parametrize("case", GROUPED)
def test_grouped(case: str) -> None:
    fed, attributes = GROUPED[case]
    outputs = ["out", "present_key", "present_value"]
    made = model("GroupQueryAttention", fed, outputs, num_heads=H, kv_num_heads=G, **attributes)
    wanted = sessions.run(made, fed)
    done = rewrite_onnx(made, tau=0.0)
    got = sessions.run(sessions.sound(done, made), fed)
    coarse = sessions.run(rewrite_onnx(made, tau=1e9).model, fed)
    for row, length in enumerate(fed["seqlens_k"] + 1):
        new = min(fed["query"].shape[1], length)
        rows = slice(row, row + 1), slice(0, new if fed["past_key"].shape[2] == 0 else None)
        close = sessions.error(got[0][rows], wanted[0][rows])
        assert 0 < close < tolerances.REWRITTEN.relative
        assert sessions.error(coarse[0][rows], wanted[0][rows]) > tolerances.HIGH_OVER_BOTH * close
        for ours, theirs in zip(got[1:], wanted[1:], strict=True):
            # Rows behind the end of a sequence are unspecified.
            assert np.allclose(ours[row, :, :length], theirs[row, :, :length], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("fed", "attributes", "reason"),
    [
        (step(1, 5, [6, 6], 6, head_sink=normal(H)), {}, "its input head_sink has no reader"),
        (step(1, 5, [6, 6], 6), {"smooth_softmax": 1}, "smooth_softmax has no reader"),
    ],
)
def test_what_is_refused(fed: dict[str, Any], attributes: dict[str, Any], reason: str) -> None:
    made = model("GroupQueryAttention", fed, ["out", "pk", "pv"], num_heads=H, kv_num_heads=G, **attributes)
    with pytest.raises(ModelError, match=reason):
        rewrite_onnx(made)


def test_an_operator_without_a_reader_is_reported() -> None:
    made = model("MultiHeadAttention", CROSS, ["out"], num_heads=H)
    made.graph.node.add(op_type="PagedAttention", domain="com.microsoft", input=["out"], output=["other"], name="p")
    (refusal,) = rewrite_onnx(made).report.unclaimed
    assert refusal.reason == "there is no reader for com.microsoft.PagedAttention"


@pytest.mark.parametrize("bound", ["MOST_HEADS", "MOST_CHANNELS"])
def test_sizes_that_no_attention_has_are_refused(monkeypatch: pytest.MonkeyPatch, bound: str) -> None:
    """A file may declare 2^31 heads; the settings of a site are initializers of that size."""
    made = model("MultiHeadAttention", CROSS, ["out"], num_heads=H)
    assert rewrite_onnx(made)[1].rewritten
    monkeypatch.setattr(find, bound, 1)
    with pytest.raises(ModelError, match="no attention is as large"):
        rewrite_onnx(made)
