"""The walk from a softmax up to the product of queries and keys, gathering what is done to the scores on the way."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch.fx import Node

from lamp_compile.passes.patterns._base import NoMatch, Refuse
from lamp_compile.passes.patterns._constants import constant, is_lowest
from lamp_compile.passes.patterns._dialect import Call, read
from lamp_compile.passes.patterns._values import same, tensor
from lamp_compile.passes.patterns._walk import through

NOT_ATTENTION = "it does not lie between a product of queries and keys and a product with values"


@dataclass
class Scores:
    """What the walk from the softmax up to q k^T has met."""

    scale: float | Node = 1.0
    divides: bool = False
    """The scale is a node that scores are divided by."""
    softcap: float = 0.0
    biases: list[Node] = field(default_factory=list)
    masks: list[Node] = field(default_factory=list)
    hidden: list[Node] = field(default_factory=list)
    """Boolean fills, where True hides a key."""
    sink: Node | None = None
    passed: list[Node] = field(default_factory=list)


def walk_up(node: Any, scores: Scores) -> tuple[Node, Node]:
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


def _baddbmm(node: Node, call: Call, scores: Scores) -> tuple[Node, Node]:
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
        walk_up(node, Scores())
    except (NoMatch, Refuse):
        return False
    return True


def _add(node: Node, call: Call, scores: Scores) -> Node:
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


def _sub(node: Node, call: Call, scores: Scores) -> Node:
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


def _cat(node: Node, call: Call, scores: Scores) -> Node:
    parts, found = call["tensors"], tensor(node)
    if scores.sink is not None or found is None or len(parts) != 2 or call.get("dim", 0) not in (-1, found.dim() - 1):
        raise NoMatch(NOT_ATTENTION)
    column = tensor(parts[1])
    if column is None or not same(column.shape[-1], 1) or scores.biases or scores.masks or scores.scale != 1.0:
        raise Refuse("something other than a sink column is joined to the scores")
    scores.sink = parts[1]
    return parts[0]  # type: ignore[no-any-return]


def _mul(node: Node, call: Call, scores: Scores) -> Node:
    left, right = call["input"], call["other"]
    if (
        not isinstance(left, Node)
        or tensor(left) is None
        or (tensor(right) is not None and constant(right) is None and _leads_to_product(right))
    ):
        left, right = right, left
    cap, capped = constant(right), read(through(left, []))
    if cap is not None and capped is not None and capped.op == "tanh":
        return _softcap(through(left, scores.passed), cap, scores)
    _scale(scores, right, False)
    return left  # type: ignore[no-any-return]


def _softcap(tanh: Node, cap: float, scores: Scores) -> Node:
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


def _div(node: Node, call: Call, scores: Scores) -> Node:
    if call.get("rounding_mode") is not None:
        raise NoMatch(NOT_ATTENTION)
    _scale(scores, call["other"], True)
    return call["input"]  # type: ignore[no-any-return]


def _scale(scores: Scores, factor: Any, divide: bool) -> None:
    number = constant(factor)
    if number is not None:
        if isinstance(scores.scale, Node):
            raise Refuse("scores are scaled by a number and by a computed value")
        scores.scale *= 1 / number if divide else number
        return
    if not isinstance(factor, Node) or tensor(factor) is not None or scores.scale != 1.0:
        raise Refuse("scores are scaled by a tensor")
    scores.scale, scores.divides = factor, divide


def _masked_fill(node: Node, call: Call, scores: Scores) -> Node:
    if not is_lowest(call["value"], tensor(node)):
        raise Refuse(f"scores are filled with {call['value']}, which does not hide a key")
    _no_softcap(scores)
    scores.hidden.append(call["mask"])
    return call["input"]  # type: ignore[no-any-return]


def _no_softcap(scores: Scores) -> None:
    if scores.softcap:
        raise Refuse("keys are hidden before soft-capping, which lets them back in", "hide them after it")


def _where(node: Node, call: Call, scores: Scores) -> Node:
    kept, other = call["input"], call["other"]
    if is_lowest(other, tensor(node)) or is_lowest(kept, tensor(node)):
        _no_softcap(scores)
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
