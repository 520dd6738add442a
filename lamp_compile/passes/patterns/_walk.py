"""Steps that the readers share: looking through casts, repeats of kv heads and transposes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from lamp_compile.ir import AttentionSite
from lamp_compile.passes.patterns._base import Refuse
from lamp_compile.passes.patterns._dialect import Call, aten, read
from lamp_compile.passes.patterns._values import Emitter, same, same_shape, tensor
from lamp_compile.runtime.rotation import HEAD_DIMS

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def users(node: Node) -> list[Node]:
    """Users of a node, without what torch.export sprinkles in."""
    return [user for user in node.users if not _is_leftover(user)]


def leftovers(nodes: Iterable[Node]) -> list[Node]:
    """Metadata checks on these nodes, and results taken of them that nobody uses."""
    return [user for node in nodes for user in node.users if _is_leftover(user)]


def _is_leftover(node: Node) -> bool:
    call = read(node)
    return call is not None and not node.users and call.op in ("check", "getitem")


def is_noop(node: Node, call: Call | None) -> bool:
    """A cast on the same device, copy, inactive dropout or full slice: nothing that changes what is computed."""
    if call is None or not isinstance(source := call.get("input"), Node):
        return False
    if call.op == "same":
        return True
    before, after = tensor(source), tensor(node)
    if before is None or after is None:
        return False
    if call.op == "cast":
        return before.device == after.device and after.is_floating_point() and before.is_floating_point()
    if call.op == "dropout":
        return not active_dropout(call)
    return call.op == "slice" and same_shape(before, after)


def active_dropout(call: Call) -> bool:
    """Whether a dropout drops anything."""
    return call.get("training", True) is not False and call.get("p", 0.5) != 0


def through(node: Any, passed: list[Node]) -> Any:
    """Walk back over no-ops, adding them to ``passed``; raises Refuse at a dropout that drops."""
    while isinstance(node, Node):
        call = read(node)
        if call is not None and call.op == "dropout" and active_dropout(call):
            raise training()
        if not is_noop(node, call):
            return node
        assert call is not None
        passed.append(node)
        node = call["input"]
    return node


def training() -> Refuse:
    """The refusal of a graph that was captured in training mode."""
    return Refuse(
        "attention weights are dropped out: the model is in training mode", "call model.eval()", training=True
    )


def true_kv(node: Node, passed: list[Node]) -> Node:
    """Keys or values ``[B, G, N, D]`` before they were repeated to all query heads; the node itself if not repeated."""
    seen: list[Node] = []
    outer = node
    while (call := read(outer)) is not None and (call.op == "same" or (call.op == "slice" and is_noop(outer, call))):
        seen.append(outer)
        outer = call["input"]
    found = _repeated(outer, call, seen)
    if found is None:
        return node
    before, after = tensor(found), tensor(outer)
    if before is None or after is None or before.dim() != 4 or after.dim() != 4:
        return node
    if not all(same(before.shape[i], after.shape[i]) for i in (0, 2, 3)):
        return node
    passed.extend(seen)
    return found


def _repeated(outer: Node, call: Call | None, seen: list[Node]) -> Node | None:
    if call is None:
        return None
    if call.op == "repeat_interleave":
        if call.get("dim") not in (1, -3) or not isinstance(call.get("repeats"), int):
            return None
        seen.append(outer)
        return call["input"] if isinstance(call["input"], Node) else None
    if call.op not in ("reshape", "flatten"):
        return None
    seen.append(outer)
    expand = through(call["input"], seen)
    expanded, wide = read(expand), tensor(expand)
    if expanded is None or expanded.op != "expand" or wide is None or wide.dim() != 5:
        return None
    seen.append(expand)
    unsqueezed = through(expanded["input"], seen)
    inner = read(unsqueezed)
    if inner is None or not _adds_group_axis(inner):
        return None
    seen.append(unsqueezed)
    found = through(inner["input"], seen)
    return found if isinstance(found, Node) else None


def _adds_group_axis(call: Call) -> bool:
    if call.op == "unsqueeze":
        return call.get("dim") in (2, -3)
    index = call.get("index")
    if call.op != "getitem" or not isinstance(index, tuple) or len(index) < 3:
        return False
    rest = (*index[:2], *index[3:])
    return index[2] is None and all(item == slice(None) or item is Ellipsis for item in rest)


def transposed(node: Node, emit: Emitter, passed: list[Node]) -> Node:
    """The node whose last two axes, swapped, give ``node``; a new transpose when there is none to look through."""
    call, found = read(node), tensor(node)
    if (
        call is not None
        and found is not None
        and isinstance(call.get("input"), Node)
        and _swaps_last(call, found.dim())
    ):
        passed.append(node)
        return call["input"]  # type: ignore[no-any-return]
    return emit.call(aten.transpose.int, node, -1, -2)


def _swaps_last(call: Call, rank: int) -> bool:
    if call.op == "attribute_mT":
        return True
    if call.op == "transpose":
        dims = (call.get("dim0"), call.get("dim1"))
        return all(isinstance(d, int) for d in dims) and {d % rank for d in dims} == {rank - 1, rank - 2}
    if call.op == "permute":
        dims = call.get("dims", ())
        return all(isinstance(d, int) for d in dims) and [d % rank for d in dims] == [
            *range(rank - 2),
            rank - 1,
            rank - 2,
        ]
    return False


def heads_of(q: Node, k: Node, v: Node, passed: list[Node], emit: Emitter) -> tuple[Node, Node, Node, dict[str, Any]]:
    """Queries, keys and values with four axes and the true kv heads, and the size fields of their site.

    Raises:
        Refuse: They have other axes than [batch, heads, tokens, channels], or [batch, tokens, channels] all three.
    """
    inner: list[Node] = []
    single, repeated = [true_kv(node, inner) for node in (k, v)], [k, v]
    counts = [x.shape[1] if (x := tensor(node)) is not None and x.dim() == 4 else None for node in single]
    if counts[0] == counts[1]:
        passed.extend(inner)
        repeated = single
    nodes = [q, *repeated]
    ranks = {None if (x := tensor(node)) is None else x.dim() for node in nodes}
    if None in ranks:
        raise Refuse("shapes are not known here")
    if ranks == {3}:
        nodes = [emit.call(aten.unsqueeze.default, node, 1) for node in nodes]
    elif ranks != {4}:
        axes = ", ".join(map(str, sorted(r for r in ranks if r is not None)))
        raise Refuse(f"it has {axes} axes, not [batch, heads, tokens, channels]", "reshape to four axes")
    values = [tensor(node) for node in nodes]
    assert values[0] is not None
    assert values[1] is not None
    assert values[2] is not None
    if not same(values[1].shape[1], values[2].shape[1]):
        raise Refuse("keys and values have different numbers of heads")
    return nodes[0], nodes[1], nodes[2], sizes(values[0], values[1], values[2], emit.specialises)


def checked(site: AttentionSite) -> AttentionSite:
    """The site, once shapes and dtypes are known to be ones that the runtime takes.

    Raises:
        Refuse: They are not.
    """
    q, k, v = tensor(site.q), tensor(site.k), tensor(site.v)
    assert q is not None
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x is None:
            continue
        if x.dtype not in FLOATS:
            raise Refuse(f"{name} is {x.dtype}", "use float16, bfloat16 or float32")
        if any(isinstance(size, int) and size == 0 for size in x.shape):
            raise Refuse(f"{name} is empty: {tuple(x.shape)}", "run it on at least one token")
        if not same(x.shape[0], q.shape[0]):
            raise Refuse(f"{name} broadcasts over the batch", "expand it before attention")
    for name, size in (("head_dim", site.head_dim), ("value dim", site.value_dim)):
        if size not in HEAD_DIMS:
            raise Refuse(f"{name} {size} has no rotation", f"one of {', '.join(map(str, HEAD_DIMS))}")
    if site.heads % site.kv_heads:
        raise Refuse(f"{site.heads} query heads do not divide into {site.kv_heads} kv heads")
    for name, node in (("mask", site.mask), ("bias", site.bias)):
        x = tensor(node)
        if x is not None and x.dim() > 4:
            raise Refuse(f"the {name} has {x.dim()} axes", "at most four, broadcasting to [B, H, S, N]")
        if x is not None and x.dim() == 0:
            raise Refuse(f"the {name} is a single number", "give it at least a key axis")
    return site


def sizes(q: Tensor, k: Tensor, v: Tensor, specialise: bool = False) -> dict[str, Any]:
    """The size fields of a site; symbolic ones become numbers where the program can be guarded.

    Raises:
        Refuse: Heads or channels are symbolic.
    """
    found = {"heads": q.shape[1], "kv_heads": k.shape[1], "head_dim": q.shape[3], "value_dim": v.shape[3]}
    if specialise:
        found = {name: int(size) for name, size in found.items()}
    for name, size in found.items():
        if not isinstance(size, int):
            raise Refuse(f"{name} is dynamic", "mark that axis static")
    return {**found, "dtype": str(q.dtype).removeprefix("torch.")}
