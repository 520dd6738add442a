"""What a node does besides computing: whether it may write in place, and whether other strides suit its readers."""

from __future__ import annotations

import contextlib
import inspect
import operator
import types
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg
from torch.utils import _pytree

from lamp_compile.passes.patterns._values import fake_mode, same, same_shape, value

_IN_PLACE = tuple(
    getattr(operator, name)
    for name in (
        "setitem", "delitem", "iadd", "isub", "imul", "imatmul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior",
        "ixor", "ilshift", "irshift",
    )
)  # fmt: skip
_MODES = ("_enter_", "_exit_", "_set_", "set_")
"""How functions begin that change the mode others run in, such as autocast."""
_BY_LAYOUT = ("as_strided", "as_strided_", "set_", "resize_", "resize_as_", "data_ptr", "storage_offset", "stride")
"""What depends on where numbers lie, and would run on other strides with another result."""
_STRAYS = (RuntimeError, TypeError, ValueError, IndexError, AssertionError)


def writes(node: Node) -> bool:
    """Whether a node may change a tensor in place, or how others run. What is not known may."""
    if node.op in ("placeholder", "get_attr", "output"):
        return False
    name = _name(node)
    if node.op == "call_method":
        return _in_place(name)
    if node.op != "call_function" or node.kwargs.get("out") is not None:
        return True
    target: Any = node.target
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.is_mutable
    if target in _IN_PLACE or _in_place(name) or name.startswith(_MODES):
        return True
    if isinstance(target, types.BuiltinFunctionType):
        return bool(node.kwargs.get("inplace"))
    module = str(getattr(target, "__module__", ""))
    if not inspect.isfunction(target) or not module.startswith("torch."):
        return True
    try:
        return bool(inspect.signature(target).bind(*node.args, **node.kwargs).arguments.get("inplace"))
    except TypeError:
        return True


def why_not_restrided(start: Node, changed: dict[Node, Any]) -> str | None:
    """Follow values of other strides through a graph, on fake tensors, until they come out as they did before.

    Args:
        start: A node ahead of all their readers.
        changed: The values by node; those that follow from them are added.

    Returns:
        Why a reader cannot take them, or None.
    """
    node, waiting = start, {user for source in changed for user in source.users}
    while waiting:
        node = node.next
        if node not in waiting:
            continue
        waiting.discard(node)
        if node.op == "output":
            return "their results leave the graph"
        if node.op not in ("call_function", "call_method") or _name(node) in _BY_LAYOUT:
            return f"{_name(node)} goes by their layout"
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            return "their results go into a subgraph"
        try:
            found = _evaluate(node, changed)
        except _STRAYS:
            return f"{_name(node)} cannot take slices"
        before = value(node)
        if not _alike(found, before):
            return f"{_name(node)} would give something else"
        if not _same_strides(found, before):
            changed[node] = found
            waiting.update(node.users)
    return None


def _name(node: Node) -> str:
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name.split("::")[-1]
    return target if isinstance(target, str) else str(getattr(target, "__name__", target))


def _in_place(name: str) -> bool:
    return name.endswith("_") and not name.endswith("__")


def _evaluate(node: Node, changed: dict[Node, Any]) -> Any:
    args, kwargs = map_arg((node.args, node.kwargs), lambda source: changed.get(source, value(source)))
    # What an operator makes by itself, such as a mask, must be fake, too.
    with fake_mode(node.graph) or contextlib.nullcontext(), torch.no_grad():
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        assert callable(node.target)
        return node.target(*args, **kwargs)


def _alike(found: Any, before: Any) -> bool:
    """Whether they are the same but for strides."""
    (left, right) = (_pytree.tree_leaves(x) for x in (found, before))
    return len(left) == len(right) and all(
        (isinstance(a, Tensor) and isinstance(b, Tensor) and a.dtype == b.dtype and same_shape(a, b))
        or (not isinstance(a, Tensor) and not isinstance(b, Tensor))
        for a, b in zip(left, right, strict=True)
    )


def _same_strides(found: Any, before: Any) -> bool:
    pairs = zip(_pytree.tree_leaves(found), _pytree.tree_leaves(before), strict=True)
    return all(
        all(same(size, 1) or same(x, y) for size, x, y in zip(a.shape, a.stride(), b.stride(), strict=True))
        for a, b in pairs
        if isinstance(a, Tensor)
    )
