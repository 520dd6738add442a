"""``nn.MultiheadAttention`` and ``nn.TransformerEncoderLayer``: single nodes in a Dynamo graph, opened up around SDPA.

The ``sdpa`` pattern then reads that node. Shapes: L queries, N keys, B batch, E embedding.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Node

from lamp_compile.passes.patterns._base import Pattern, Refuse
from lamp_compile.passes.patterns._dialect import Call, aten
from lamp_compile.passes.patterns._values import Emitter, tensor
from lamp_compile.passes.patterns._walk import training


def expand_multihead(root: Node, call: Call, emit: Emitter) -> None:
    """See ``Pattern.expand``."""
    if call.op == "encoder_layer":
        _expand_encoder_layer(root, call, emit)
    else:
        _expand_attention(root, call, emit)


def _expand_attention(root: Node, call: Call, emit: Emitter) -> None:
    """``F.multi_head_attention_forward``: tokens first, ``[L, B, E]``; returns (output, weights or None)."""
    results = {user.args[1]: user for user in root.users if user.target is operator.getitem}
    _refuse_odd(root, call, results)
    q, k, v = _projected(call, emit)
    heads = call["num_heads"]
    q, k, v = (_split_heads(x, heads, (1, 2, 0, 3), emit) for x in (q, k, v))
    mask = _joined_mask(call.get("attn_mask"), call.get("key_padding_mask"), q, emit)
    out = emit.call(aten.scaled_dot_product_attention.default, q, k, v, mask)
    out = emit.call(aten.flatten.using_ints, emit.call(aten.permute.default, out, [2, 0, 1, 3]), 2)
    out = emit.call(aten.linear.default, out, call["out_proj_weight"], call["out_proj_bias"])
    if 0 in results:
        results[0].replace_all_uses_with(out)
    for user in results.values():
        root.graph.erase_node(user)
    root.graph.erase_node(root)


def _refuse_odd(root: Node, call: Call, results: dict[Any, Node]) -> None:
    if call.get("training", True) and call.get("dropout_p", 0.0):
        raise training()
    query = tensor(call["query"])
    if query is None or query.dim() != 3:
        raise Refuse("queries without a batch axis", "give it three axes: tokens, batch, channels")
    if any(user.target is not operator.getitem for user in root.users):
        raise Refuse("its results are used as a whole")
    if call.get("need_weights", True) and 1 in results and results[1].users:
        raise Refuse("the attention weights are used", "call it with need_weights=False")
    for name, what in (
        ("bias_k", "add_bias_kv"),
        ("bias_v", "add_bias_kv"),
        ("static_k", "static keys"),
        ("static_v", "static values"),
    ):
        if call.get(name) is not None:
            raise Refuse(f"{what} is not supported", "leave it out")
    if call.get("add_zero_attn"):
        raise Refuse("add_zero_attn is not supported", "leave it out")


def _projected(call: Call, emit: Emitter) -> list[Node]:
    inputs = [call[name] for name in ("query", "key", "value")]
    bias = call["in_proj_bias"]
    biases = _pieces(bias, 3, 0, emit) if bias is not None else [None] * 3
    if call.get("use_separate_proj_weight"):
        weights = [call[name] for name in ("q_proj_weight", "k_proj_weight", "v_proj_weight")]
    elif inputs[0] is inputs[1] and inputs[1] is inputs[2]:
        return _pieces(emit.call(aten.linear.default, inputs[0], call["in_proj_weight"], bias), 3, -1, emit)
    else:
        weights = _pieces(call["in_proj_weight"], 3, 0, emit)
    return [emit.call(aten.linear.default, x, w, b) for x, w, b in zip(inputs, weights, biases, strict=True)]


def _pieces(node: Node, count: int, dim: int, emit: Emitter) -> list[Node]:
    chunks = emit.call(aten.chunk.default, node, count, dim)
    return [emit.call(operator.getitem, chunks, index) for index in range(count)]


def _split_heads(x: Node, heads: int, order: tuple[int, ...], emit: Emitter) -> Node:
    split = emit.call(aten.unflatten.int, x, -1, [heads, -1])
    return emit.call(aten.permute.default, split, list(order))


def _joined_mask(mask: Node | None, padding: Node | None, q: Node, emit: Emitter) -> Node | None:
    """True hides a key in both masks; a float mask is added. One mask in SDPA's convention comes out."""
    query = tensor(q)
    assert query is not None
    given = tensor(mask)
    if mask is not None and given is not None and given.dim() == 3:
        mask = emit.call(aten.unflatten.int, mask, 0, [-1, query.shape[1]])
    if padding is not None:
        padding = emit.call(aten.unsqueeze.default, emit.call(aten.unsqueeze.default, padding, 1), 2)
    masks = [node for node in (mask, padding) if node is not None]
    hiding = [node for node in masks if _is_bool(node)]
    added = [node for node in masks if not _is_bool(node)]
    hidden = hiding[0] if hiding else None
    for node in hiding[1:]:
        hidden = emit.call(aten.logical_or.default, hidden, node)
    bias = added[0] if added else None
    for node in added[1:]:
        bias = emit.call(aten.add.Tensor, bias, node)
    if bias is None:
        return None if hidden is None else emit.call(aten.logical_not.default, hidden)
    if hidden is None:
        return bias
    lowest = emit.call(aten.where.ScalarSelf, hidden, float("-inf"), emit.call(aten.zeros_like.default, bias))
    return emit.call(aten.add.Tensor, bias, lowest)


def _is_bool(node: Node) -> bool:
    found = tensor(node)
    if found is None or not (found.dtype == torch.bool or found.is_floating_point()):
        raise Refuse("its mask is neither boolean nor float")
    return found.dtype == torch.bool


def _expand_encoder_layer(root: Node, call: Call, emit: Emitter) -> None:
    """``torch._transformer_encoder_layer_fwd``: the inference path of the layer, batch first, ``[B, L, E]``."""
    src = call["src"]
    found = tensor(src)
    if found is None or found.dim() != 3 or found.is_nested:
        raise Refuse("its input is nested or has no batch axis", "enable_nested_tensor=False")
    if call["embed_dim"] % call["num_heads"]:
        raise Refuse("channels do not divide into heads")
    first = _norm(call, 1, src, emit) if call["norm_first"] else src
    attended = emit.call(aten.add.Tensor, src, _self_attention(call, first, emit))
    x = attended if call["norm_first"] else _norm(call, 1, attended, emit)
    y = _norm(call, 2, x, emit) if call["norm_first"] else x
    y = emit.call(aten.linear.default, y, call["ffn_weight_1"], call["ffn_bias_1"])
    y = emit.call(aten.gelu.default if call["use_gelu"] else aten.relu.default, y)
    y = emit.call(aten.linear.default, y, call["ffn_weight_2"], call["ffn_bias_2"])
    out = emit.call(aten.add.Tensor, x, y)
    root.replace_all_uses_with(out if call["norm_first"] else _norm(call, 2, out, emit))
    root.graph.erase_node(root)


def _norm(call: Call, which: int, x: Node, emit: Emitter) -> Node:
    weight, bias = call[f"norm_weight_{which}"], call[f"norm_bias_{which}"]
    return emit.call(aten.layer_norm.default, x, [call["embed_dim"]], weight, bias, call["eps"])


def _self_attention(call: Call, x: Node, emit: Emitter) -> Node:
    projected = emit.call(aten.linear.default, x, call["qkv_weight"], call["qkv_bias"])
    q, k, v = (_split_heads(piece, call["num_heads"], (0, 2, 1, 3), emit) for piece in _pieces(projected, 3, -1, emit))
    mask = _layer_mask(call, emit)
    out = emit.call(aten.scaled_dot_product_attention.default, q, k, v, mask)
    out = emit.call(aten.flatten.using_ints, emit.call(aten.transpose.int, out, 1, 2), 2)
    return emit.call(aten.linear.default, out, call["proj_weight"], call["proj_bias"])


def _layer_mask(call: Call, emit: Emitter) -> Node | None:
    """mask_type 0 is ``[L, L]``, 1 padding ``[B, L]``, 2 both, ``[B, H, L, L]``; any non-zero entry hides a key."""
    mask, kind = call.get("mask"), call.get("mask_type")
    if mask is None:
        return None
    if kind not in (0, 1, 2):
        raise Refuse(f"mask type {kind!r} is unknown")
    keep = emit.call(aten.eq.Scalar, mask, 0)
    if kind == 1:
        keep = emit.call(aten.unsqueeze.default, emit.call(aten.unsqueeze.default, keep, 1), 2)
    return keep


PATTERN = Pattern("multihead", ("multihead", "encoder_layer"), expand=expand_multihead)
