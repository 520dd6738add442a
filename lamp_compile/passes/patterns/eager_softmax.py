"""Attention written out: ``softmax(q k^T * scale + mask) v`` with its variants.

Anchored on the softmax. Down to the product with v: casts, inactive dropout, the slice that drops a sink column. Up to
the product of q and k: scale, soft-cap, additive biases, fills by a boolean mask, a concatenated sink, a subtracted
maximum.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Node

from lamp_compile.ir import AttentionSite
from lamp_compile.passes.patterns._base import NoMatch, Pattern, Refuse
from lamp_compile.passes.patterns._dialect import Call, aten, read
from lamp_compile.passes.patterns._scores import NOT_ATTENTION, Scores, walk_up
from lamp_compile.passes.patterns._values import Emitter, same, tensor
from lamp_compile.passes.patterns._walk import checked, heads_of, leftovers, through, transposed, users


def read_eager_softmax(root: Node, call: Call, emit: Emitter) -> AttentionSite:
    """See ``Pattern.read``; the anchor is the softmax, the site's root the product with v."""
    weights = tensor(root)
    if weights is None or weights.dim() not in (3, 4) or call.get("dim", -1) not in (-1, weights.dim() - 1):
        raise NoMatch(NOT_ATTENTION)
    scores = Scores()
    product, sliced, below = _product_with_values(root)
    q, k_t = walk_up(call["input"], scores)
    if sliced != (scores.sink is not None):
        raise Refuse("a column is sliced off the weights, or added to the scores, that is no sink")
    inside = {*scores.passed, *below, root}
    for node in inside:
        if outside := [user for user in users(node) if user not in inside and user is not product]:
            raise Refuse(
                f"scores or weights are used elsewhere ({outside[0].name})",
                "ask the model for no attention weights (output_attentions=False)",
            )
    emit.before(product)
    absorbed = list(inside)
    k = transposed(k_t, emit, absorbed)
    q, k, v, found = heads_of(q, k, _argument(product, 1), absorbed, emit)
    return checked(
        AttentionSite(
            name="",
            pattern="eager_softmax",
            root=product,
            q=q,
            k=k,
            v=v,
            scale=emit.call(operator.truediv, 1.0, scores.scale) if scores.divides else scores.scale,
            softcap=scores.softcap,
            sinks=_sinks(scores.sink, found["heads"]),
            mask=_mask(scores, weights.dim(), emit),
            bias=_bias(scores, weights.dim(), emit),
            absorbed=(*absorbed, *leftovers(absorbed)),
            **found,
        )
    )


def _argument(product: Node, index: int) -> Node:
    call = read(product)
    assert call is not None
    return call["other"] if index else call["input"]  # type: ignore[no-any-return]


def _product_with_values(root: Node) -> tuple[Node, bool, list[Node]]:
    """The matmul that takes the weights, whether a column is sliced off on the way, and the nodes between."""
    between: list[Node] = []
    node, sliced = root, False
    while True:
        following = users(node)
        products = [u for u in following if (c := read(u)) is not None and c.op == "matmul" and c["input"] is node]
        if products:
            return products[0], sliced, between
        onward = [
            u
            for u in following
            if (c := read(u)) is not None and (c.op in ("cast", "same", "dropout") or _drops_last(u, c))
        ]
        if not onward:
            raise NoMatch(NOT_ATTENTION)
        node = onward[0]
        call = read(node)
        assert call is not None
        if call.op in ("getitem", "slice"):
            sliced = sliced or _drops_last(node, call)
        else:
            through(node, [])  # refuses a dropout that drops
        between.append(node)


def _drops_last(node: Node, call: Call) -> bool:
    """``x[..., :-1]``"""
    if call.op == "getitem":
        index = call["index"]
        if not isinstance(index, tuple):
            return False
        rest = index[:-1]
        return index[-1] == slice(None, -1) and all(item is Ellipsis or item == slice(None) for item in rest)
    if call.op != "slice":
        return False
    before = tensor(call["input"])
    after = tensor(node)
    full = before is not None and after is not None and same(before.shape[-1], after.shape[-1])
    return (
        before is not None
        and not full
        and call.get("dim", 0) % before.dim() == before.dim() - 1
        and call.get("end") == -1
    )


def _sinks(column: Node | None, heads: int) -> Node | None:
    """The per-head parameter ``[H]`` behind a sink column ``[B, H, S, 1]``."""
    node = column
    while isinstance(node, Node):
        found = tensor(node)
        if found is not None and found.dim() == 1 and found.shape[0] == heads:
            return node
        call = read(node)
        if call is None or call.op not in ("expand", "reshape", "unsqueeze", "cast", "same", "getitem", "slice"):
            break
        node = call["input"]
    if column is None:
        return None
    raise Refuse("the sink column is not one number per head")


def _mask(scores: Scores, rank: int, emit: Emitter) -> Node | None:
    masks = [*scores.masks, *(emit.call(aten.logical_not.default, node) for node in scores.hidden)]
    for node in masks:
        found = tensor(node)
        if found is None or found.dtype != torch.bool:
            raise Refuse("scores are masked by something that is not boolean")
    return _joined(_with_heads(masks, rank, emit), aten.logical_and.default, emit)


def _bias(scores: Scores, rank: int, emit: Emitter) -> Node | None:
    return _joined(_with_heads(scores.biases, rank, emit), aten.add.Tensor, emit)


def _with_heads(nodes: list[Node], rank: int, emit: Emitter) -> list[Node]:
    """``[B, S, N]`` of a product of three axes -> ``[B, 1, S, N]``."""
    if rank != 3:
        return nodes
    return [
        emit.call(aten.unsqueeze.default, node, -3) if (t := tensor(node)) is not None and t.dim() == 3 else node
        for node in nodes
    ]


def _joined(nodes: list[Node], target: Any, emit: Emitter) -> Node | None:
    joined = nodes[0] if nodes else None
    for node in nodes[1:]:
        joined = emit.call(target, joined, node)
    return joined


PATTERN = Pattern("eager_softmax", ("softmax",), read_eager_softmax)
