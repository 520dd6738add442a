"""com.microsoft MultiHeadAttention and GroupQueryAttention, with caches of floating-point numbers."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

from lamp_compile.frontends.onnx.graphs.emit import Emitter
from lamp_compile.frontends.onnx.graphs.graph import Graph, operand, result
from lamp_compile.frontends.onnx.graphs.sites import BOOL, FLOAT, FLOATS, INT64, OnnxSite
from lamp_compile.frontends.onnx.graphs.values import attribute as any_attribute
from lamp_compile.frontends.onnx.graphs.walk import checked, sizes_of
from lamp_compile.frontends.onnx.patterns._base import OnnxPattern, Refuse

if TYPE_CHECKING:
    from onnx import NodeProto

DOMAIN = "com.microsoft"


def attribute(root: NodeProto, name: str, default: Any) -> Any:
    """A number; onnx has no schemas of this domain, so its type was not checked when the file was read."""
    value = any_attribute(root, name, default)
    if type(value) is not type(default):
        raise Refuse(f"its attribute {name} is of a strange type")
    return value


def read_microsoft(graph: Graph, root: NodeProto, emit: Emitter) -> OnnxSite:
    """See ``OnnxPattern.read``."""
    read = _grouped if root.op_type == "GroupQueryAttention" else _multihead
    out = graph.fresh(f"{emit.prefix}/out")
    site = read(graph, root, emit, out)
    emit.follow()
    emit.join_heads(out, root.output[0])
    return checked(graph, site)


def _refuse_given(root: NodeProto, inputs: dict[int, str]) -> None:
    for index, what in inputs.items():
        if operand(root, index):
            raise Refuse(f"its input {what} has no reader yet", "export it without")


def _refuse_scores(graph: Graph, root: NodeProto) -> None:
    if (name := result(root, 3)) and (graph.users(name) or name in graph.outputs):
        raise Refuse("its scores are an output", "leave its fourth output out")


def _multihead(graph: Graph, root: NodeProto, emit: Emitter, out: str) -> OnnxSite:
    _refuse_scores(graph, root)
    _refuse_given(root, {8: "past_sequence_length (a shared buffer)", 9: "cache_indirection (beam search)"})
    heads = attribute(root, "num_heads", 0)
    q, k, v = (operand(root, index) for index in range(3))
    if heads < 1 or not k or not v or graph.rank(q) != 3:
        raise Refuse("its queries, keys and values are packed", "export it with three inputs of three axes")
    q, k, v = _with_bias(graph, [q, k, v], operand(root, 3), emit)
    q, k, v = [emit.split_heads(x, heads) if graph.rank(x) == 3 else x for x in (q, k, v)]
    past_key, past_value = operand(root, 6), operand(root, 7)
    shift = ""
    if past_key and past_value:
        shift = emit.squeeze(emit.size(past_key, 2), 0)
        k, v = emit.concat_past(past_key, k, result(root, 1)), emit.concat_past(past_value, v, result(root, 2))
    else:
        for x, present in ((k, result(root, 1)), (v, result(root, 2))):
            if present:
                emit.call("Identity", x, out=present)
    mask = ""
    if attribute(root, "unidirectional", 0):
        mask = emit.visible(emit.size(q, 2), emit.size(k, 2), shift)
    bias = _joined(graph, operand(root, 5), _padding(graph, root, emit), emit)
    sizes = sizes_of(graph, q, k, v)
    return OnnxSite(
        pattern="microsoft", root=root, out=out, q=q, k=k, v=v, mask=mask, bias=bias,
        scale=_scale(root, sizes["head_dim"]), features=("MultiHeadAttention",), replaced=[root], **sizes,
    )  # fmt: skip


def _scale(root: NodeProto, head_dim: int) -> float:
    return float(attribute(root, "scale", 0.0) or max(head_dim, 1) ** -0.5)  # 0 stands for the default, too


def _with_bias(graph: Graph, inputs: list[str], bias: str, emit: Emitter) -> list[str]:
    """Queries, keys and values plus their parts of the projection's bias, ``[hidden, hidden, v_hidden]``."""
    if not bias:
        return inputs
    begin, added = 0, []
    for x in inputs:
        width = (graph.dims(x) or [""])[-1]
        if graph.rank(x) != 3 or not isinstance(width, int):
            raise Refuse("a bias on keys or values with heads of their own axis")
        part = emit.call("Slice", bias, emit.constant([begin]), emit.constant([begin + width]), emit.constant([0]))
        added.append(emit.call("Add", x, part))
        begin += width
    return added


def _padding(graph: Graph, root: NodeProto, emit: Emitter) -> str:
    """``key_padding_mask`` ``[B, N]`` as a bias: padded keys get ``mask_filter_value``, as the operator gives them."""
    name = operand(root, 4)
    if not name:
        return ""
    if graph.rank(name) != 2:
        raise Refuse("its key_padding_mask is not [batch, keys]", "one number for each key")
    value = attribute(root, "mask_filter_value", -10000.0)
    kept = emit.call("Cast", name, to=BOOL)
    return emit.unsqueeze(emit.call("Where", kept, emit.constant(0.0, FLOAT), emit.constant(value, FLOAT)), 1, 2)


def _joined(graph: Graph, bias: str, padding: str, emit: Emitter) -> str:
    if bias and padding:
        return emit.call("Add", emit.cast(bias, FLOAT), padding)
    return bias or padding


def _grouped(graph: Graph, root: NodeProto, emit: Emitter, out: str) -> OnnxSite:
    _refuse_scores(graph, root)
    _refuse_given(root, {
        11: "head_sink", 12: "k_scale (a quantised cache)", 13: "v_scale (a quantised cache)", 14: "q_norm_weight",
        15: "k_norm_weight", 16: "query_seqlens",
    })  # fmt: skip
    for name in ("smooth_softmax", "sliding_window_cache"):
        if attribute(root, name, 0) > 0:
            raise Refuse(f"{name} has no reader yet", "export it without")
    heads, kv_heads = attribute(root, "num_heads", 0), attribute(root, "kv_num_heads", 0)
    if heads < 1 or kv_heads < 1 or heads % kv_heads or not operand(root, 5) or not operand(root, 6):
        raise Refuse("its heads or lengths are missing")
    q, k, v = _unpacked(graph, root, heads, kv_heads, emit)
    q, k, v = emit.split_heads(q, heads), emit.split_heads(k, kv_heads), emit.split_heads(v, kv_heads)
    shape = {"heads": heads, "kv_heads": kv_heads, **_channels(graph, q, root)}
    queries = emit.size(q, 2)
    # Tokens of each sequence once the new ones are there, and before: what is not new.
    after = emit.call("Add", emit.cast(operand(root, 5), INT64), emit.constant(1))
    before = emit.call("Max", emit.call("Sub", after, queries), emit.constant(0))
    if attribute(root, "do_rotary", 0):
        q, k = _rotated(root, q, k, queries, before, emit)
    before = emit.call("Reshape", before, emit.constant([-1, 1, 1, 1]))
    total = emit.call("Reshape", emit.cast(operand(root, 6), INT64), emit.constant([1]))
    k = _appended(operand(root, 3), k, result(root, 1), before, total, emit)
    v = _appended(operand(root, 4), v, result(root, 2), before, total, emit)
    keys = emit.call("Gather", emit.call("Shape", k), emit.constant([2]), axis=0)
    window = attribute(root, "local_window_size", -1)
    causal = attribute(root, "causal", 1) != 0
    ends = emit.call("Reshape", after, emit.constant([-1, 1, 1, 1]))
    mask = emit.call("Less", emit.count(keys), ends)
    if causal:
        mask = emit.both(mask, emit.visible(queries, keys, before, window - 1 if window > 0 else -1))
    bias = _to_width(operand(root, 10), keys, graph, emit)
    return OnnxSite(
        pattern="microsoft", root=root, out=out, q=q, k=k, v=v, mask=mask, bias=bias,
        scale=_scale(root, shape["head_dim"]), softcap=attribute(root, "softcap", 0.0), replaced=[root],
        features=("GroupQueryAttention", *((f"window {window}",) if window > 0 else ())), **shape,
    )  # fmt: skip


def _channels(graph: Graph, q: str, root: NodeProto) -> dict[str, int]:
    size, element = (graph.dims(q) or [""] * 4)[3], graph.dtype(operand(root, 0))
    if not isinstance(size, int) or size < 1:
        raise Refuse("head_dim is dynamic", "export it with fixed heads and channels")
    if element not in FLOATS:
        raise Refuse(f"queries of data type {element}", "float16, bfloat16 or float32")
    past = operand(root, 3)
    if past and graph.dtype(past) not in (element, 0):
        raise Refuse("its cache is quantised", "rewrite the model with a cache of floating-point numbers")
    return {"head_dim": size, "value_dim": size, "element": element}


def _unpacked(graph: Graph, root: NodeProto, heads: int, kv_heads: int, emit: Emitter) -> list[str]:
    """Queries, keys and values of three axes; packed ones ``[B, S, (H + 2 G) D]`` are taken apart."""
    q, k, v = (operand(root, index) for index in range(3))
    if graph.rank(q) != 3:
        raise Refuse("its queries have not three axes")
    if k and v:
        return [q, k, v]
    width = (graph.dims(q) or [""])[-1]
    if not isinstance(width, int) or width % (heads + 2 * kv_heads):
        raise Refuse("packed queries, keys and values of unknown width")
    size = width // (heads + 2 * kv_heads)
    edges = [0, heads * size, (heads + kv_heads) * size, width]
    last = emit.constant([2])
    return [emit.call("Slice", q, emit.constant([a]), emit.constant([b]), last) for a, b in itertools.pairwise(edges)]


def _rotated(root: NodeProto, q: str, k: str, queries: str, before: str, emit: Emitter) -> tuple[str, str]:
    """Rotary positions by the same provider's operator."""
    cos, sin = operand(root, 7), operand(root, 8)
    if not cos or not sin:
        raise Refuse("do_rotary without its tables")
    positions = operand(root, 9)
    if not positions:
        # [B, 1] + [S]
        positions = emit.call("Add", emit.unsqueeze(before, 1), emit.count(queries))
    interleaved = attribute(root, "rotary_interleaved", 0)
    turned = [
        emit.call("RotaryEmbedding", x, positions, cos, sin, domain=DOMAIN, interleaved=interleaved) for x in (q, k)
    ]
    return turned[0], turned[1]


def _appended(past: str, new: str, present: str, before: str, total: str, emit: Emitter) -> str:
    """The cache with new rows at each sequence's own end: ``[B, G, max(P, total), D]``, as the operator returns it.

    Row j is past row j before that end, a new row from there on, and whatever the buffer held behind.
    """
    if not past:
        return emit.call("Identity", new, out=present) if present else new
    joined = emit.call("Concat", past, new, axis=2)
    held = emit.call("Gather", emit.call("Shape", past), emit.constant([2]), axis=0)
    fresh = emit.call("Gather", emit.call("Shape", new), emit.constant([2]), axis=0)
    length = emit.call("Max", held, total)
    row = emit.unsqueeze(emit.count(length), 0, 1, 3)  # [1, 1, N, 1], against [B, 1, 1, 1]
    since = emit.call("Sub", row, before)
    is_new = emit.call(
        "And", emit.call("GreaterOrEqual", since, emit.constant(0)), emit.call("Less", since, fresh)
    )  # fmt: skip
    last = emit.call("Max", emit.call("Sub", held, emit.constant(1)), emit.constant(0))
    source = emit.call("Where", is_new, emit.call("Add", since, held), emit.call("Min", row, last))
    lead = emit.call("Slice", emit.call("Shape", new), emit.constant([0]), emit.constant([2]))
    tail = emit.call("Slice", emit.call("Shape", new), emit.constant([3]), emit.constant([4]))
    shape = emit.call("Concat", lead, length, tail, axis=0)
    return emit.call("GatherElements", joined, emit.call("Expand", source, shape), axis=2, out=present)


def _to_width(bias: str, keys: str, graph: Graph, emit: Emitter) -> str:
    """A bias of ``total_sequence_length`` columns for a buffer that may be longer; what is behind is hidden anyway."""
    if not bias:
        return ""
    missing = emit.call("Max", emit.call("Sub", keys, emit.size(bias, -1)), emit.constant([0]))
    begin = emit.constant([0] * (2 * (graph.rank(bias) or 4) - 1))
    return emit.call("Pad", emit.cast(bias, FLOAT), emit.call("Concat", begin, missing, axis=0))


PATTERN = OnnxPattern("microsoft", ((DOMAIN, "MultiHeadAttention"), (DOMAIN, "GroupQueryAttention")), read_microsoft)
