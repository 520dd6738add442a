"""Operator Attention of the standard, opset 23 and later. Positions are spelled out as a mask, because providers have
disagreed on where ``is_causal`` begins when there are more keys than queries."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lamp_compile.frontends.onnx.graphs.emit import Emitter
from lamp_compile.frontends.onnx.graphs.graph import Graph, attribute, operand, result
from lamp_compile.frontends.onnx.graphs.sites import BOOL, FLOAT, OnnxSite
from lamp_compile.frontends.onnx.graphs.walk import checked, sizes_of
from lamp_compile.frontends.onnx.patterns._base import OnnxPattern, Refuse

if TYPE_CHECKING:
    from onnx import NodeProto


def read_attention(graph: Graph, root: NodeProto, emit: Emitter) -> OnnxSite:
    """See ``OnnxPattern.read``."""
    qk = result(root, 3)
    if qk and (graph.users(qk) or qk in graph.outputs):
        mode = attribute(root, "qk_matmul_output_mode", 0)
        raise Refuse(f"its scores are an output (qk_matmul_output_mode {mode})", "leave its fourth output out")
    q, k, v = (operand(root, index) for index in range(3))
    flat = graph.rank(q) == 3
    if flat:
        heads, kv_heads = attribute(root, "q_num_heads", 0), attribute(root, "kv_num_heads", 0)
        if heads < 1 or kv_heads < 1:
            raise Refuse("inputs of three axes without q_num_heads and kv_num_heads")
        q, k, v = emit.split_heads(q, heads), emit.split_heads(k, kv_heads), emit.split_heads(v, kv_heads)
    past_key, past_value, valid = (operand(root, index) for index in (4, 5, 6))
    queries = emit.size(q, 2)
    shift = ""
    if past_key and past_value:
        shift = emit.squeeze(emit.size(past_key, 2), 0)
        k, v = emit.concat_past(past_key, k, result(root, 1)), emit.concat_past(past_value, v, result(root, 2))
    elif result(root, 1) or result(root, 2):
        raise Refuse("present without past")
    keys = emit.size(k, 2)
    if valid:
        after = emit.call("Reshape", valid, emit.constant([-1, 1, 1, 1]))
        shift = emit.call("Sub", after, queries)
    mask = _positions(root, emit, queries, keys, shift)
    if valid:
        mask = emit.both(mask, emit.call("Less", emit.count(keys), after))
    given, bias = _given(graph, operand(root, 3), k, keys, emit)
    sizes = sizes_of(graph, q, k, v)
    out = graph.fresh(f"{emit.prefix}/out") if flat else root.output[0]
    site = OnnxSite(
        pattern="attention", root=root, out=out, q=q, k=k, v=v, mask=emit.both(mask, given), bias=bias,
        scale=attribute(root, "scale", sizes["head_dim"] ** -0.5), softcap=attribute(root, "softcap", 0.0),
        features=_features(root, bool(past_key)), replaced=[root], **sizes,
    )  # fmt: skip
    if flat:
        emit.follow()
        emit.join_heads(out, root.output[0])
    return checked(graph, site)


def _positions(root: NodeProto, emit: Emitter, queries: str, keys: str, shift: str) -> str:
    """The mask of ``is_causal`` and the windows; "" where neither hides a key."""
    left, right = attribute(root, "left_window_size", -1), attribute(root, "right_window_size", -1)
    if attribute(root, "is_causal", 0):
        right = 0
    return emit.visible(queries, keys, shift, left, right) if left >= 0 or right >= 0 else ""


def _given(graph: Graph, name: str, k: str, keys: str, emit: Emitter) -> tuple[str, str]:
    """``attn_mask`` as (mask, bias). It may have fewer columns than there are keys: those behind are hidden."""
    if not name:
        return "", ""
    boolean = graph.dtype(name) == BOOL
    columns, total = (graph.dims(name) or [""])[-1], graph.number(keys)
    if (isinstance(columns, int) and columns == 1) or columns == total:
        return (name, "") if boolean else ("", name)
    # Padding works on numbers; what is added is cut to nothing where the mask is long enough.
    missing = emit.call("Sub", keys, emit.size(name, -1))
    x = emit.cast(name, FLOAT)
    begin = emit.constant([0] * (2 * (graph.rank(name) or 1) - 1))
    fill = emit.constant(0.0 if boolean else float("-inf"), FLOAT)
    padded = emit.call("Pad", x, emit.call("Concat", begin, missing, axis=0), fill)
    return (emit.call("Cast", padded, to=BOOL), "") if boolean else ("", padded)


def _features(root: NodeProto, past: bool) -> tuple[str, ...]:
    window = attribute(root, "left_window_size", -1)
    found = [("causal", attribute(root, "is_causal", 0)), (f"window {window}", window >= 0), ("past", past)]
    return tuple(word for word, is_so in found if is_so)


PATTERN = OnnxPattern("attention", (("", "Attention"),), read_attention)
