"""Small valid models, and ways to damage them: as bytes, and field by field through the protobuf API."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

ATTENTION = """
<ir_version: 10, opset_import: ["" : 20, "own" : 1]>
decoder (float[B,4,S,16] q, float[B,2,N,16] k, float[B,2,N,16] v, bool[S,N] mask, bool flag)
    => (float[B,4,S,16] out, float[B,4,S,N] y) {
    shape = Constant<value_ints: ints = [0, 2, 2, -1, 16]>()
    two = Constant<value_ints: ints = [2]>()
    kx = Unsqueeze(k, two)
    vx = Unsqueeze(v, two)
    wide = Constant<value_ints: ints = [1, 2, 2, 1, 16]>()
    ke = Expand(kx, wide)
    ve = Expand(vx, wide)
    flat = Constant<value_ints: ints = [0, 4, -1, 16]>()
    kr = Reshape(ke, flat)
    vr = Reshape(ve, flat)
    kt = Transpose<perm: ints = [0, 1, 3, 2]>(kr)
    raw = MatMul(q, kt)
    y = Mul(raw, scale)
    masked = Where(mask, y, lowest)
    p = Softmax<axis: int = -1>(masked)
    o = MatMul(p, vr)
    twice = own.Double<factor: float = 2.0>(o)
    out = If(flag) <
        then_branch: graph = yes () => (float[B,4,S,16] t) { t = Add(twice, bias) },
        else_branch: graph = no () => (float[B,4,S,16] e) {
            e = If(flag) <
                then_branch: graph = inner () => (float[B,4,S,16] i) { i = Neg(o) },
                else_branch: graph = other () => (float[B,4,S,16] j) { j = own.Twice(o) }
            >
        }
    >
}
<domain: "own", opset_import: ["" : 20, "own" : 1]>
Double <factor: float = 1.0> (x) => (y) { c = Constant<value_float: float = @factor>() y = Mul(x, c) }
<domain: "own", opset_import: ["" : 20, "own" : 1]>
Twice (x) => (y) { y = own.Double(x) }
"""


@cache
def decoder() -> bytes:
    """Repeated heads, scale, mask, subgraphs inside subgraphs, functions that call each other, initializers."""
    model = onnx.parser.parse_model(ATTENTION)
    for name, value in (("scale", np.float32(0.25)), ("lowest", np.float32(-3e38)), ("bias", np.ones(16, np.float32))):
        model.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
    onnx.checker.check_model(model, full_check=True)
    return model.SerializeToString()


GROUPED = """
<ir_version: 10, opset_import: ["" : 20, "com.microsoft" : 1]>
step (float[B,S,64] q, float[B,S,32] k, float[B,S,32] v, float[B,2,P,16] pk, float[B,2,P,16] pv, int32[B] lens,
      int32 total, float[64,8] cos, float[64,8] sin, float[1,1,S,T] bias)
    => (float[B,S,64] out, float[B,2,T,16] pk2, float[B,2,T,16] pv2, float[B,S,64] o2) {
    out, pk2, pv2 = com.microsoft.GroupQueryAttention <num_heads = 4, kv_num_heads = 2, do_rotary = 1, softcap = 2.0,
        local_window_size = 7> (q, k, v, pk, pv, lens, total, cos, sin, , bias)
    o2 = com.microsoft.MultiHeadAttention <num_heads = 4, unidirectional = 1> (q, out, out)
}
"""


@cache
def seeds() -> tuple[bytes, ...]:
    """Models to damage."""
    from tests.onnx.cases import attention_cases

    chosen = [case.model.SerializeToString() for name, case in attention_cases().items() if name in _CASES]
    assert len(chosen) == len(_CASES)
    return (decoder(), onnx.parser.parse_model(GROUPED).SerializeToString(), *chosen)


_CASES = (
    "test_attention_3d_with_past_and_present_qk_matmul_softmax",
    "test_attention_4d_gqa_softcap_expanded",
    "test_attention_4d_diff_heads_mask4d_padded_kv",
)


def damage(data: bytes, rng: random.Random) -> bytes:
    """The model with one to four faults."""
    for _ in range(rng.choice((1, 1, 2, 4))):
        data = rng.choice(_WAYS)(data, rng)
    return data


def _flip(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        if changed:
            changed[rng.randrange(len(changed))] = rng.choice((0, 1, 127, 128, 255, rng.randrange(256)))
    return bytes(changed)


def _cut(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data) + 1)]


def _drop(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data) + 1)
    return data[:at] + data[at + rng.randint(1, 40) :]


def _repeat(data: bytes, rng: random.Random) -> bytes:
    first, second = sorted((rng.randrange(len(data) + 1), rng.randrange(len(data) + 1)))
    return data[:second] + data[first:]


def _field(data: bytes, rng: random.Random) -> bytes:
    """One field of one message, any of them, gets an odd value."""
    model = onnx.ModelProto()
    try:
        model.ParseFromString(data)
    except Exception:  # noqa: BLE001  (damaged before already: leave it so)
        return data
    message = rng.choice(list(_messages(model)))
    try:
        _change(message, rng)
        return model.SerializeToString()
    except Exception:  # noqa: BLE001  (text that is not UTF-8 in the message, a number out of range)
        return data


def _messages(message: Any) -> Iterator[Any]:
    """A message and all within it: most are nodes, their attributes, and dimensions."""
    yield message
    for field, value in message.ListFields():
        if field.message_type is not None:
            for inner in value if field.is_repeated else [value]:
                yield from _messages(inner)


def _change(message: Any, rng: random.Random) -> None:
    field = rng.choice(message.DESCRIPTOR.fields)
    if field.message_type is not None:
        if not field.is_repeated:
            if message.HasField(field.name) and rng.random() < 0.5:
                message.ClearField(field.name)
            else:
                getattr(message, field.name).SetInParent()
            return
        items = getattr(message, field.name)
        if items and rng.random() < 0.5:
            del items[rng.randrange(len(items))]
        elif items:
            items.add().CopyFrom(rng.choice(items))
        else:
            items.add()
        return
    value = _odd(field, rng)
    if field.is_repeated:
        items = getattr(message, field.name)
        if items and rng.random() < 0.7:
            items[rng.randrange(len(items))] = value
        else:
            items.append(value)
    else:
        setattr(message, field.name, value)


def _odd(field: Any, rng: random.Random) -> Any:
    if field.type in (field.TYPE_STRING, field.TYPE_BYTES):
        text = rng.choice(
            ("", "q", "k", "v", "y", "Attention", "Softmax", "../../../etc/passwd", "x" * 300, "own", "\0")
        )
        return text if field.type == field.TYPE_STRING else text.encode()
    if field.type in (field.TYPE_FLOAT, field.TYPE_DOUBLE):
        return rng.choice((0.0, -1.0, float("inf"), float("nan"), 1e38))
    if field.type == field.TYPE_ENUM:
        return rng.choice([v.number for v in field.enum_type.values])
    small = rng.choice((0, 1, 2, 3, 7, 16, 255, 2**31 - 1))
    return (
        small if field.type in (field.TYPE_UINT64, field.TYPE_INT32) else rng.choice((small, -1, -2, 2**62, 2**63 - 1))
    )


_WAYS: tuple[Callable[[bytes, random.Random], bytes], ...] = (_flip, _cut, _drop, _repeat, *[_field] * 6)
