"""Attention written out: ``softmax(q k^T * scale + mask) v`` with its variants.

Anchored on the softmax. Down to the product with v: casts, inactive dropout, the slice that drops a sink column. Up to the
product of q and k: scale, soft-cap, additive biases, fills by a boolean mask, a concatenated sink, a subtracted maximum.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Node

from lamp_compile.ir import AttentionSite
from lamp_compile.passes.patterns._base import NoMatch, Pattern, Refuse
from lamp_compile.passes.patterns._constants import constant, is_lowest
from lamp_compile.passes.patterns._dialect import Call, aten, read
from lamp_compile.passes.patterns._values import Emitter, same, tensor
from lamp_compile.passes.patterns._walk import checked, checks, sizes, through, transposed, true_kv, users, with_heads

NOT_ATTENTION = "it does not lie between a product of queries and keys and a product with values"


@dataclass
class _Scores:
    """What the walk from the softmax up to q k^T has met."""

    scale: float | Node = 1.0
    softcap: float = 0.0
    biases: list[Node] = field(default_factory=list)
    masks: list[Node] = field(default_factory=list)
    hidden: list[Node] = field(default_factory=list)
    """Boolean fills, where True hides a key."""
    sink: Node | None = None
    passed: list[Node] = field(default_factory=list)


def read_eager_softmax(root: Node, call: Call, emit: Emitter) -> AttentionSite:
    """See ``Pattern.read``; the anchor is the softmax, the site's root the product with v."""
    weights = tensor(root)
    if weights is None or weights.dim() not in (3, 4) or call.get("dim", -1) not in (-1, weights.dim() - 1):
        raise NoMatch(NOT_ATTENTION)
    scores = _Scores()
    product, sliced, below = _product_with_values(root)
    q, k_t = _walk_up(call["input"], scores)
    if sliced != (scores.sink is not None):
        raise Refuse("a column is sliced off the weights, or added to the scores, that is no sink")
    inside = {*scores.passed, *below, root}
    for node in inside:
        if outside := [user for user in users(node) if user not in inside and user is not product]:
            raise Refuse(
                f"scores or weights are used elsewhere ({outside[0].name})", "ask the model for no attention weights (output_attentions=False)"
            )
    emit.before(product)
    absorbed = list(inside)
    k = with_heads(true_kv(transposed(k_t, emit, absorbed), absorbed), emit)
    v = with_heads(true_kv(_argument(product, 1), absorbed), emit)
    q = with_heads(q, emit)
    values = [tensor(node) for node in (q, k, v)]
    for x in values:
        if x is None or x.dim() != 4:
            raise Refuse("queries, keys or values are not [batch, heads, tokens, channels]", "reshape them to four axes")
    if values[1].shape[1] != values[2].shape[1]:  # type: ignore[union-attr]
        raise Refuse("keys and values have different numbers of heads")
    found = sizes(*values)  # type: ignore[arg-type]
    return checked(
        AttentionSite(
            name="", pattern="eager_softmax", root=product, q=q, k=k, v=v, scale=scores.scale, softcap=scores.softcap,
            sinks=_sinks(scores.sink, found["heads"]), mask=_mask(scores, emit), bias=_bias(scores, weights.dim(), emit),
            absorbed=(*absorbed, *checks(absorbed)), **found,
        )  # fmt: skip
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
        onward = [u for u in following if (c := read(u)) is not None and (c.op in ("cast", "same", "dropout") or _drops_last(u, c))]
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
    return before is not None and not full and call.get("dim", 0) % before.dim() == before.dim() - 1 and call.get("end") == -1


def _walk_up(node: Any, scores: _Scores) -> tuple[Node, Node]:
    """From the softmax's input to (q, k transposed)."""
    for _ in range(40):
        node = through(node, scores.passed)
        call = read(node)
        if call is None:
            raise NoMatch(NOT_ATTENTION)
        if call.op == "matmul":
            scores.passed.append(node)
            return _operands(call["input"], call["other"])
        if call.op == "baddbmm":
            return _baddbmm(node, call, scores)
        step = _STEPS.get(call.op)
        if step is None:
            raise NoMatch(NOT_ATTENTION)
        scores.passed.append(node)
        node = step(node, call, scores)
    raise NoMatch(NOT_ATTENTION)


def _operands(q: Any, k_t: Any) -> tuple[Node, Node]:
    if tensor(q) is None or tensor(k_t) is None:
        raise NoMatch(NOT_ATTENTION)
    return q, k_t


def _baddbmm(node: Node, call: Call, scores: _Scores) -> tuple[Node, Node]:
    scores.passed.append(node)
    beta, alpha = call.get("beta", 1), call.get("alpha", 1)
    if beta == 1:
        scores.biases.append(call["input"])
    elif beta != 0:
        raise Refuse(f"baddbmm with beta {beta}")
    _scale(scores, alpha, False)
    return _operands(call["batch1"], call["batch2"])


def _leads_to_product(node: Any) -> bool:
    """Whether walking up from here meets a matmul: tells the scores from the bias that is added to them."""
    try:
        _walk_up(node, _Scores())
    except (NoMatch, Refuse):
        return False
    return True


def _add(node: Node, call: Call, scores: _Scores) -> Node:
    if call.get("alpha", 1) != 1:
        raise Refuse(f"a bias is added with factor {call['alpha']}")
    left, right = call["input"], call["other"]
    if not _leads_to_product(left):
        left, right = right, left
    if not isinstance(right, Node) or tensor(right) is None:
        raise Refuse(f"{right} is added to the scores")
    bias = tensor(right)
    if bias is not None and not bias.is_floating_point():
        raise Refuse(f"a {bias.dtype} tensor is added to the scores")
    if scores.scale != 1.0 or scores.softcap:
        raise Refuse("a bias is added before scaling or soft-capping", "add it after")
    scores.biases.append(right)
    return left  # type: ignore[no-any-return]


def _sub(node: Node, call: Call, scores: _Scores) -> Node:
    """``x - x.max()``: changes nothing in a softmax."""
    inner: list[Node] = []
    largest = through(call["other"], inner)
    taken = read(largest)
    if taken is not None and taken.op in ("getitem", "attribute_values"):
        inner.append(largest)
        if taken.op == "getitem" and taken["index"] != 0:
            raise NoMatch(NOT_ATTENTION)
        largest = taken["input"]
        taken = read(largest)
    dim = taken.get("dim") if taken is not None else None
    dim = dim[0] if isinstance(dim, list | tuple) and len(dim) == 1 else dim
    found = tensor(call["input"])
    last = found is not None and dim in (-1, found.dim() - 1)
    if taken is None or taken.op not in ("max", "amax") or not last or taken["input"] is not call["input"]:
        raise NoMatch(NOT_ATTENTION)
    scores.passed.extend([largest, *inner])
    return call["input"]  # type: ignore[no-any-return]


def _cat(node: Node, call: Call, scores: _Scores) -> Node:
    parts, found = call["tensors"], tensor(node)
    if scores.sink is not None or found is None or len(parts) != 2 or call.get("dim", 0) not in (-1, found.dim() - 1):
        raise NoMatch(NOT_ATTENTION)
    column = tensor(parts[1])
    if column is None or not same(column.shape[-1], 1) or scores.biases or scores.masks or scores.scale != 1.0:
        raise Refuse("something other than a sink column is joined to the scores")
    scores.sink = parts[1]
    return parts[0]  # type: ignore[no-any-return]


def _mul(node: Node, call: Call, scores: _Scores) -> Node:
    left, right = call["input"], call["other"]
    if not isinstance(left, Node) or tensor(left) is None or (tensor(right) is not None and constant(right) is None and _leads_to_product(right)):
        left, right = right, left
    cap, capped = constant(right), read(through(left, []))
    if cap is not None and capped is not None and capped.op == "tanh":
        return _softcap(through(left, scores.passed), cap, scores)
    _scale(scores, right, False)
    return left  # type: ignore[no-any-return]


def _softcap(tanh: Node, cap: float, scores: _Scores) -> Node:
    if scores.softcap or scores.scale != 1.0:
        raise Refuse("scores are scaled after their soft-cap")
    scores.passed.append(tanh)
    inside = read(tanh)
    assert inside is not None
    divided = through(inside["input"], scores.passed)
    call = read(divided)
    factor = constant(call.get("other")) if call is not None else None
    if call is None or factor is None or call.op not in ("div", "mul"):
        raise Refuse("the soft-cap is not tanh(x / c) * c")
    if abs((factor if call.op == "div" else 1 / factor) - cap) > 1e-6 * abs(cap):
        raise Refuse("the soft-cap divides and multiplies by different numbers")
    scores.passed.append(divided)
    scores.softcap = cap
    return call["input"]  # type: ignore[no-any-return]


def _div(node: Node, call: Call, scores: _Scores) -> Node:
    if call.get("rounding_mode") is not None:
        raise NoMatch(NOT_ATTENTION)
    _scale(scores, call["other"], True)
    return call["input"]  # type: ignore[no-any-return]


def _scale(scores: _Scores, factor: Any, divide: bool) -> None:
    number = constant(factor)
    if number is not None:
        if isinstance(scores.scale, Node):
            raise Refuse("scores are scaled by a number and by a computed value")
        scores.scale *= 1 / number if divide else number
        return
    if not isinstance(factor, Node) or tensor(factor) is not None or divide or scores.scale != 1.0:
        raise Refuse("scores are scaled by a tensor")
    scores.scale = factor


def _masked_fill(node: Node, call: Call, scores: _Scores) -> Node:
    if not is_lowest(call["value"], tensor(node)):
        raise Refuse(f"scores are filled with {call['value']}, which does not hide a key")
    scores.hidden.append(call["mask"])
    return call["input"]  # type: ignore[no-any-return]


def _where(node: Node, call: Call, scores: _Scores) -> Node:
    kept, other = call["input"], call["other"]
    if is_lowest(other, tensor(node)):
        scores.masks.append(call["condition"])
        return kept  # type: ignore[no-any-return]
    if is_lowest(kept, tensor(node)):
        scores.hidden.append(call["condition"])
        return other  # type: ignore[no-any-return]
    raise NoMatch(NOT_ATTENTION)


_STEPS = {
    "add": _add, "sub": _sub, "cat": _cat, "mul": _mul, "div": _div, "masked_fill": _masked_fill, "where": _where,
}  # fmt: skip


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


def _mask(scores: _Scores, emit: Emitter) -> Node | None:
    masks = [*scores.masks, *(emit.call(aten.logical_not.default, node) for node in scores.hidden)]
    for node in masks:
        found = tensor(node)
        if found is None or found.dtype != torch.bool:
            raise Refuse("scores are masked by something that is not boolean")
    return _joined(masks, aten.logical_and.default, emit)


def _bias(scores: _Scores, rank: int, emit: Emitter) -> Node | None:
    biases = scores.biases
    if rank == 3:
        biases = [emit.call(aten.unsqueeze.default, b, -3) if (t := tensor(b)) is not None and t.dim() == 3 else b for b in biases]
    return _joined(biases, aten.add.Tensor, emit)


def _joined(nodes: list[Node], target: Any, emit: Emitter) -> Node | None:
    joined = nodes[0] if nodes else None
    for node in nodes[1:]:
        joined = emit.call(target, joined, node)
    return joined


PATTERN = Pattern("eager_softmax", ("softmax",), read_eager_softmax)
