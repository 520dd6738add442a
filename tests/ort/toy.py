"""A decoder of two attentions as an ONNX artifact, and the same in numpy with float attention: small enough that a test
can say what every number should be."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

PLANES = ("k_high", "k_residual", "k_scale", "v_high", "v_residual", "v_scale")
OPSET = 20


@dataclass(frozen=True)
class Toy:
    """Sizes; the weights follow from the seed."""

    vocab: int = 50
    heads: int = 4
    kv_heads: int = 2
    dim: int = 32
    layers: int = 2
    tile: int = 32
    longest: int = 512
    shared_controls: bool = False
    seed: int = 0

    @property
    def width(self) -> int:
        return self.heads * self.dim

    def weights(self) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(self.seed)

        def normal(*shape: int) -> np.ndarray:
            return (rng.standard_normal(shape) / np.sqrt(shape[0])).astype(np.float32)

        kv = self.kv_heads * self.dim
        made = {"embed": 3 * normal(self.vocab, self.width), "place": normal(self.longest, self.width)}
        for i in range(self.layers):
            made |= {f"q{i}": 2 * normal(self.width, self.width), f"k{i}": 2 * normal(self.width, kv)}
            made |= {f"v{i}": normal(self.width, kv), f"o{i}": normal(self.width, self.width)}
        return {**made, "head": normal(self.width, self.vocab)}

    def site(self, index: int) -> str:
        return f"layers.{index}.attention"

    def logits(self, rows: list[int]) -> np.ndarray:
        """Of the last token of one sequence, with float attention."""
        w = self.weights()
        x = w["embed"][rows] + w["place"][: len(rows)]
        for i in range(self.layers):
            q, k, v = (
                (x @ w[f"{name}{i}"]).reshape(len(rows), count, self.dim).transpose(1, 0, 2)
                for name, count in (("q", self.heads), ("k", self.kv_heads), ("v", self.kv_heads))
            )
            k, v = (y.repeat(self.heads // self.kv_heads, 0) for y in (k, v))
            scores = q @ k.transpose(0, 2, 1) / np.sqrt(self.dim)
            scores = np.where(np.tri(len(rows)) > 0, scores, -np.inf)
            p = np.exp(scores - scores.max(-1, keepdims=True))
            out = (p / p.sum(-1, keepdims=True)) @ v
            x = x + out.transpose(1, 0, 2).reshape(len(rows), -1) @ w[f"o{i}"]
        return (x @ w["head"])[-1]


def metadata(toy: Toy) -> dict[str, Any]:
    """What the artifact says about itself."""
    sites = []
    for i in range(toy.layers):
        names = (*PLANES, "state", "stats")
        shared = {"tau": "tau", "floor": "floor", "budget": "budget", "row": i}
        own = {field: f"{field}.{i}" for field in ("tau", "floor", "budget")}
        sites.append({
            "name": toy.site(i), "heads": toy.heads, "kv_heads": toy.kv_heads, "head_dim": toy.dim,
            "value_dim": toy.dim, "tile": toy.tile, "exact_tier": False,
            "past": {name: f"past.{i}.{name}" for name in names},
            "present": {name: f"present.{i}.{name}" for name in names},
            "controls": shared if toy.shared_controls else own,
            "plan": {"tau": 0.01, "floor": 0, "budget": 0.25},
        })  # fmt: skip
    inputs = {"tokens": "ids", "slots": "slots"}
    return {
        "version": 1, "kind": "decoder", "max_length": toy.longest, "eos_token_id": None, "vocab": toy.vocab,
        "inputs": inputs, "logits": "logits", "sites": sites,
    }  # fmt: skip


def _attention(toy: Toy, i: int, h: Any) -> tuple[list[Any], list[Any], list[Any]]:
    """Nodes, inputs and outputs of one layer; x{i} -> x{i+1}."""
    from onnx import TensorProto as t

    info, node = h.make_tensor_value_info, h.make_node
    nodes = []
    for name, count in (("q", toy.heads), ("k", toy.kv_heads), ("v", toy.kv_heads)):
        nodes += [
            node("MatMul", [f"x{i}", f"{name}{i}"], [f"{name}{i}_flat"]),
            node("Reshape", [f"{name}{i}_flat", "heads" if count == toy.heads else "kv_heads"], [f"{name}{i}_rows"]),
            node("Transpose", [f"{name}{i}_rows"], [f"{name}{i}_heads"], perm=[0, 2, 1, 3]),
        ]
    past, present = ([f"{side}.{i}.{name}" for name in PLANES] for side in ("past", "present"))
    common = {"rotation": "hadamard", "format": "nested8", "tile": toy.tile, "site": toy.site(i)}
    form = {"causal": "bottom_right", "rule": "energy", "query_bits": 8, "subtile": 32}
    controls = [f"{field}.{i}" for field in ("tau", "floor", "budget")]
    if toy.shared_controls:
        nodes += [node("Gather", [name.split(".")[0], f"row{i}"], [name], axis=0) for name in controls]
    nodes += [
        node("Append", [f"k{i}_heads", f"v{i}_heads", *past, "slots", "rotation", "rotation"], present,
             domain="ai.lamp", **common),
        node("FusedAttention",
             [f"q{i}_heads", *present, *controls, f"past.{i}.state", f"past.{i}.stats", "lengths", "rotation",
              "rotation"],
             [f"out{i}", f"present.{i}.state", f"present.{i}.stats"], domain="ai.lamp", scale=toy.dim**-0.5,
             guard_window=16, guard_hold=64, hysteresis=0.5, **form, **common),
        node("Transpose", [f"out{i}"], [f"out{i}_rows"], perm=[0, 2, 1, 3]),
        node("Reshape", [f"out{i}_rows", "flat"], [f"out{i}_flat"]),
        node("MatMul", [f"out{i}_flat", f"o{i}"], [f"out{i}_mixed"]),
        node("Add", [f"x{i}", f"out{i}_mixed"], [f"x{i + 1}"]),
    ]  # fmt: skip
    g, d, tile = toy.kv_heads, toy.dim // 2, toy.tile
    kinds = {
        "k": (t.UINT8, ["B", g, "P", tile, d]), "v": (t.UINT8, ["B", g, "P", d, tile]),
        "scale": (t.FLOAT16, ["B", g, "N"]), "state": (t.FLOAT, ["B", g, 4]), "stats": (t.INT64, ["B", g, 7]),
    }  # fmt: skip

    def tensors(side: str) -> list[Any]:
        names = (*PLANES, "state", "stats")
        return [info(f"{side}.{i}.{n}", *kinds["scale" if "scale" in n else n[0] if "_" in n else n]) for n in names]

    own = [] if toy.shared_controls else [info(name, t.FLOAT, [g]) for name in controls]
    return nodes, [*own, *tensors("past")], tensors("present")


def model(toy: Toy, about: Any = None) -> Any:
    """The ``ModelProto``, with the functions' bodies."""
    from onnx import ModelProto, helper

    made = ModelProto.FromString(_model(toy))
    helper.set_model_props(made, {"ai.lamp": json.dumps(metadata(toy) if about is None else about)})
    return made


@cache
def _model(toy: Toy) -> bytes:
    from onnx import TensorProto, helper, numpy_helper

    from lamp_compile.frontends.onnx.form import Form
    from lamp_compile.frontends.onnx.functions import functions_for
    from lamp_compile.runtime import rotation

    info, node = helper.make_tensor_value_info, helper.make_node
    constants: dict[str, np.ndarray] = {
        **toy.weights(), "heads": np.array([0, 0, toy.heads, toy.dim]),
        "kv_heads": np.array([0, 0, toy.kv_heads, toy.dim]),
        "flat": np.array([0, 0, toy.width]), "last": np.array([-1]), "end": np.array([2**31]), "axis": np.array([1]),
        "zero": np.array(0), "one": np.array(1),
        "rotation": (rotation.sign_matrix(toy.dim) / np.sqrt(toy.dim)).astype(np.float32),
        **{f"row{i}": np.array(i) for i in range(toy.layers)},
    }  # fmt: skip
    nodes = [
        node("Shape", ["ids"], ["count"], start=1, end=2),
        node("Squeeze", ["count"], ["rows"]),
        node("Range", ["zero", "rows", "one"], ["steps"]),
        node("Unsqueeze", ["slots", "axis"], ["first"]),
        node("Add", ["first", "steps"], ["places"]),
        node("Add", ["slots", "count"], ["lengths"]),
        node("Gather", ["embed", "ids"], ["e"]),
        node("Gather", ["place", "places"], ["p"]),
        node("Add", ["e", "p"], ["x0"]),
    ]
    inputs = [info("ids", TensorProto.INT64, ["B", "S"]), info("slots", TensorProto.INT64, ["B"])]
    if toy.shared_controls:
        inputs += [info(n, TensorProto.FLOAT, [toy.layers, toy.kv_heads]) for n in ("tau", "floor", "budget")]
    outputs = [info("logits", TensorProto.FLOAT, ["B", 1, toy.vocab])]
    for i in range(toy.layers):
        made, given, given_back = _attention(toy, i, helper)
        nodes, inputs, outputs = nodes + made, inputs + given, outputs + given_back
    nodes += [
        node("Slice", [f"x{toy.layers}", "last", "end", "axis"], ["x_last"]),
        node("MatMul", ["x_last", "head"], ["logits"]),
    ]
    form = Form(tile=toy.tile)
    for each in nodes:
        if each.domain == "ai.lamp":
            each.overload = form.tag
    if not toy.shared_controls:  # inputs with defaults, as in exported decoders
        for field, value in (("tau", 0.5), ("floor", 0), ("budget", 1)):
            for i in range(toy.layers):
                constants[f"{field}.{i}"] = np.full(toy.kv_heads, value, np.float32)
    graph = helper.make_graph(
        nodes, "toy", inputs, outputs, [numpy_helper.from_array(x, name) for name, x in constants.items()]
    )
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid("ai.lamp", 1)]
    made = helper.make_model(
        graph, opset_imports=opsets, ir_version=10, functions=functions_for([form], OPSET), producer_name="tests"
    )
    return made.SerializeToString()


def write(folder: Path, toy: Toy = Toy(), about: Any = None) -> Path:
    """The artifact as a file."""
    file = folder / "toy.onnx"
    file.write_bytes(model(toy, about).SerializeToString())
    return file
