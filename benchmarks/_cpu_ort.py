"""ONNX Runtime's GroupQueryAttention with its cache in float32, int8 and int4, as ways of a CPU benchmark.

The quantised caches have static symmetric scales per channel, here from the very keys and values that they store. Past
and present share a buffer, as in a decode loop, so that a call stores one new row and attends.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from _cpu_ways import Sources, Way
from torch import Tensor

BITS = {"ort_fp32": 32, "ort_int8": 8, "ort_int4": 4}
LARGEST = {8: 127, 4: 7}


def round_per_channel(bits: int) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Keys and values ``[G, N, D]`` as the quantised cache keeps them, in float32."""

    def rounded(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        (k8, ks), (v8, vs) = _integers(k, bits), _integers(v, bits)
        return k8 * ks, v8 * vs

    return rounded


def _integers(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """``[G, N, D]`` or ``[B, G, N, D]`` as whole numbers, and scales ``[..., G, 1, D]`` that sequences share."""
    scale = (x.float().abs().amax((0, 2) if x.dim() == 4 else 1, keepdim=True) / LARGEST[bits]).clamp_min(1e-20)
    return (x.float() / scale).round().clamp(-LARGEST[bits] - 1, LARGEST[bits]), scale


def _stored(x: Tensor, bits: int) -> tuple[Tensor, Tensor | None]:
    """What the operator's cache holds of ``[B, G, N, D]``: int4 as two offset nibbles in a byte, lower first."""
    if bits == 32:
        return x.float().contiguous(), None
    whole, scale = _integers(x, bits)
    if bits == 8:
        return whole.to(torch.int8), scale
    nibbles = (whole + 8).to(torch.uint8)
    return nibbles[..., 0::2] | nibbles[..., 1::2] << 4, scale


def _model(sources: Sources, bits: int) -> bytes:
    """One operator as an ONNX model."""
    from onnx import TensorProto, helper

    kv_heads, dim = sources.shape.kv_heads, sources.shape.dim
    heads, batch, length = kv_heads * sources.shape.group, sources.case.batch, sources.case.length
    kept = {32: TensorProto.FLOAT, 8: TensorProto.INT8, 4: TensorProto.UINT8}[bits]
    cache = [batch, kv_heads, length, dim // 2 if bits == 4 else dim]
    info = helper.make_tensor_value_info
    float32, int32 = TensorProto.FLOAT, TensorProto.INT32
    given = [info("q", float32, [batch, 1, heads * dim])]
    given += [info(name, float32, [batch, 1, kv_heads * dim]) for name in ("k", "v")]
    given += [info(name, kept, cache) for name in ("past_k", "past_v")]
    given += [info("seqlens", int32, [batch]), info("total", int32, [])]
    names, options = [x.name for x in given], {}
    if bits != 32:
        given += [info(name, float32, [1, kv_heads, 1, dim]) for name in ("k_scale", "v_scale")]
        names += [""] * 5 + ["k_scale", "v_scale"]  # no rotary tables, positions, bias or sinks
        options = {"kv_cache_bit_width": bits, "k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL"}
    made = [info("out", float32, [batch, 1, heads * dim]), *(info(n, kept, cache) for n in ("new_k", "new_v"))]
    node = helper.make_node(
        "GroupQueryAttention", names, ["out", "new_k", "new_v"], domain="com.microsoft", num_heads=heads,
        kv_num_heads=kv_heads, **options,
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    graph = helper.make_graph([node], "attention", given, made)
    model: bytes = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
    return model


class _Set:
    """Buffers of one set, bound to a session."""

    def __init__(self, session: Any, sources: Sources, index: int, bits: int) -> None:
        from onnxruntime import OrtValue

        given, case, scales = sources.of(index), sources.case, {}
        self.session, self.binding, self.kept = session, session.io_binding(), []
        for name, x in (("k", given.k), ("v", given.v)):
            stored, scales[name] = _stored(x, bits)
            buffer = OrtValue.ortvalue_from_numpy(stored.clone().numpy())
            self.binding.bind_ortvalue_input(f"past_{name}", buffer)
            self.binding.bind_ortvalue_output(f"new_{name}", buffer)
            self._input(name, x[:, :, -1].float().reshape(case.batch, 1, -1))
            if scales[name] is not None:
                self._input(f"{name}_scale", scales[name])
            self.kept.append(buffer)
        self._input("q", given.q.float().reshape(case.batch, 1, -1))
        self._input("seqlens", torch.full((case.batch,), case.length - 1, dtype=torch.int32))
        self._input("total", torch.tensor(case.length, dtype=torch.int32))
        self.shape = given.q.shape
        self.out = OrtValue.ortvalue_from_numpy(torch.zeros(case.batch, 1, self.shape[1] * self.shape[3]).numpy())
        self.binding.bind_ortvalue_output("out", self.out)

    def _input(self, name: str, x: Tensor) -> None:
        values = x.contiguous().numpy()
        self.kept.append(values)
        self.binding.bind_cpu_input(name, values)

    def __call__(self) -> Tensor:
        self.session.run_with_iobinding(self.binding)
        return torch.from_numpy(self.out.numpy()).reshape(self.shape)


def way(name: str, sources: Sources) -> Way:
    """The operator over a cache of ``BITS[name]`` bits. Raises where onnxruntime is missing or refuses."""
    import onnxruntime

    bits = BITS[name]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 4
    options.add_session_config_entry("session.force_spinning_stop", "1")  # after a call, so that it disturbs no other
    session = onnxruntime.InferenceSession(_model(sources, bits), options, providers=["CPUExecutionProvider"])
    touched = sources.bytes(bits / 8)
    calls = [_Set(session, sources, index, bits) for index in range(sources.count(touched))]
    calls[0]()
    how = f"onnxruntime {onnxruntime.__version__}, stores the new row too"
    return Way(name, calls, touched, {"how": how})
