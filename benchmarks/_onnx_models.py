"""The artifacts of onnx_decode.py: one model exported with LAMP, plainly, and with ONNX Runtime's GroupQueryAttention.

The GroupQueryAttention files are the LAMP artifact with every Append and FusedAttention replaced, so that all else is
the same; they share its weights in one file.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

WIDE = dict(
    vocab_size=16384, hidden_size=2048, intermediate_size=5632, num_hidden_layers=4, num_attention_heads=16,
    num_key_value_heads=8, head_dim=128, max_position_embeddings=32768, rope_theta=500000.0, tie_word_embeddings=True,
    bos_token_id=0, eos_token_id=0,
)  # fmt: skip
BITS = {"gqa_fp32": 32, "gqa_int8": 8, "gqa_int4": 4}
TYPES = {32: "FLOAT", 8: "INT8", 4: "UINT8"}


def load(source: str) -> Any:
    """A model in float32: of a folder, or ``"wide"``: four layers of 2,048 channels with random weights."""
    if source != "wide":
        return AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, local_files_only=True).eval()
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**WIDE)).float().eval()  # type: ignore[arg-type]


def make(source: str, folder: Path, rows: list[str]) -> None:
    """Write what these rows need and the folder lacks."""
    folder.mkdir(parents=True, exist_ok=True)
    model = load(source)
    if not (folder / "model").exists():
        model.save_pretrained(folder / "model")
    if not (folder / "lamp.onnx").exists():
        import lamp_compile

        lamp_compile.export_onnx(model, None, folder / "lamp.onnx")
    if "plain" in rows and not (folder / "plain.onnx").exists():
        _plain(model, folder / "plain.onnx")
    for name, bits in BITS.items():
        if name in rows and not (folder / f"{name}.onnx").exists():
            _grouped(folder, name, bits)


def _plain(model: Any, file: Path) -> None:
    """transformers' own export of a decode step: past and present are float32 and joined by Concat."""
    import onnx_ir
    from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

    with torch.no_grad():
        past = model(torch.zeros(2, 7, dtype=torch.long), use_cache=True).past_key_values
    inputs = {
        "input_ids": torch.zeros(2, 1, dtype=torch.long), "position_ids": torch.full((2, 1), 7),
        "past_key_values": past, "use_cache": True,
    }  # fmt: skip
    exported = OnnxExporter().export(model, inputs, OnnxConfig(dynamic=True))
    program = getattr(exported, "program", exported)  # transformers before 5.18 gives torch's ONNXProgram itself
    onnx_ir.save(getattr(program, "model", program), str(file), external_data=f"{file.name}.data")


def _grouped(folder: Path, name: str, bits: int) -> None:
    import onnx

    if not (folder / "weights.onnx").exists():
        onnx.save_model(
            onnx.load(str(folder / "lamp.onnx")), str(folder / "weights.onnx"), save_as_external_data=True,
            location="weights.data", all_tensors_to_one_file=True, size_threshold=1 << 16,
        )  # fmt: skip
    model = onnx.load(str(folder / "weights.onnx"), load_external_data=False)
    _replace(model, bits)
    onnx.save_model(model, str(folder / f"{name}.onnx"))


def _replace(model: Any, bits: int) -> None:
    """Every pair of Append and FusedAttention by GroupQueryAttention over a cache of ``bits`` bits, in place."""
    from onnx import TensorProto, helper, numpy_helper

    graph = model.graph
    about = json.loads(next(item.value for item in model.metadata_props if item.key == "ai.lamp"))
    sites = {site["name"]: (index, site) for index, site in enumerate(about["sites"])}
    appends: dict[str, Any] = {}
    nodes: list[Any] = [
        helper.make_node("Shape", ["input_ids"], ["gqa.rows"], start=1, end=2),
        helper.make_node("Add", ["positions", "gqa.rows"], ["gqa.total"]),
        helper.make_node("Sub", ["gqa.total", "gqa.one"], ["gqa.last"]),
        helper.make_node("Cast", ["gqa.last"], ["gqa.seqlens"], to=TensorProto.INT32),
        helper.make_node("ReduceMax", ["gqa.total"], ["gqa.most"], keepdims=0),
        helper.make_node("Cast", ["gqa.most"], ["gqa.longest"], to=TensorProto.INT32),
    ]
    given = [value for value in graph.input if value.name in ("input_ids", "positions")]
    made = [value for value in graph.output if value.name == "logits"]
    constants = {"gqa.one": np.array([1]), "gqa.flat": np.array([0, 0, -1])}
    for node in graph.node:
        name = _attribute(node, "site") if node.domain == "ai.lamp" else b""
        if node.domain != "ai.lamp":
            for at, value in enumerate(node.input):  # the batch, read off a plane's shape
                if value.startswith("past."):
                    node.input[at] = f"past.{value.split('.')[1]}.k"
            nodes.append(node)
        elif node.op_type == "Append":
            appends[name.decode()] = node
        else:
            index, site = sites[name.decode()]
            more, inputs, outputs = _layer(index, site, node, appends[name.decode()], bits)
            nodes, given, made = nodes + more, given + inputs, made + outputs
            constants[f"gqa.split{index}"] = np.array([0, 0, site["heads"], site["head_dim"]])
    nodes = _needed(nodes, {value.name for value in made})
    used = {name for node in nodes for name in node.input}
    weights = [tensor for tensor in graph.initializer if tensor.name in used]
    weights += [numpy_helper.from_array(x, name) for name, x in constants.items()]
    for field, values in (("node", nodes), ("input", given), ("output", made), ("initializer", weights)):
        graph.ClearField(field)
        getattr(graph, field).extend(values)
    for field in ("functions", "metadata_props"):
        model.ClearField(field)
    graph.ClearField("value_info")
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))


def _needed(nodes: list[Any], outputs: set[str]) -> list[Any]:
    """The nodes that these outputs come from; shapes of planes are needed no more."""
    wanted, kept = set(outputs), []
    for node in reversed(nodes):
        if wanted & set(node.output):
            kept.append(node)
            wanted |= set(node.input)
    return kept[::-1]


def _attribute(node: Any, name: str) -> Any:
    from onnx import helper

    return next(helper.get_attribute_value(item) for item in node.attribute if item.name == name)


def _layer(
    i: int, site: dict[str, Any], node: Any, append: Any, bits: int
) -> tuple[list[Any], list[Any], list[Any]]:  # fmt: skip
    """Nodes, inputs and outputs of one attention."""
    from onnx import TensorProto, helper

    nodes = []
    for name, value in {"q": node.input[0], "k": append.input[0], "v": append.input[1]}.items():
        nodes += [
            helper.make_node("Transpose", [value], [f"gqa.{name}{i}.rows"], perm=[0, 2, 1, 3]),
            helper.make_node("Reshape", [f"gqa.{name}{i}.rows", "gqa.flat"], [f"gqa.{name}{i}"]),
        ]
    kv_heads, dim = site["kv_heads"], site["head_dim"]
    shape = ["batch", kv_heads, "capacity", dim // 2 if bits == 4 else dim]
    info, kept = helper.make_tensor_value_info, getattr(TensorProto, TYPES[bits])
    past, present = ([info(f"{side}.{i}.{n}", kept, shape) for n in "kv"] for side in ("past", "present"))
    inputs = [*(f"gqa.{n}{i}" for n in "qkv"), *(x.name for x in past), "gqa.seqlens", "gqa.longest"]
    scales, options = [], {}
    if bits != 32:
        scales = [info(f"scale.{i}.{n}", TensorProto.FLOAT, [1, kv_heads, 1, dim]) for n in "kv"]
        inputs += [""] * 5 + [x.name for x in scales]
        options = {"kv_cache_bit_width": bits, "k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL"}
    nodes += [
        helper.make_node(
            "GroupQueryAttention", inputs, [f"gqa.out{i}", *(x.name for x in present)], domain="com.microsoft",
            num_heads=site["heads"], kv_num_heads=kv_heads, scale=_attribute(node, "scale"), **options,
        ),
        helper.make_node("Reshape", [f"gqa.out{i}", f"gqa.split{i}"], [f"gqa.out{i}.rows"]),
        helper.make_node("Transpose", [f"gqa.out{i}.rows"], [node.output[0]], perm=[0, 2, 1, 3]),
    ]  # fmt: skip
    return nodes, [*past, *scales], present
