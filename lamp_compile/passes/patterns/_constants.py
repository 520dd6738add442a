"""Numbers in a graph: literals, filled tensors, and the values that stand for "hidden" in a mask."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from lamp_compile.passes.patterns._dialect import read

HIDES_BELOW = -1e4
"""A score filled with less than this has weight 0 beside any finite score of ordinary size."""


def constant(node: Any) -> float | None:
    """The number that a literal, ``torch.full`` or ``torch.tensor`` node holds; None for anything computed."""
    if isinstance(node, bool):
        return None
    if isinstance(node, int | float):
        return float(node)
    call = read(node)
    if call is None:
        return _attribute(node)
    if call.op == "full":
        return constant(call["fill_value"])
    if call.op == "tensor":
        return constant(call["data"])
    return constant(call["input"]) if call.op in ("cast", "same") else None


def is_lowest(node: Any, like: Tensor | None) -> bool:
    """Whether a fill value hides a key: minus infinity, a dtype's minimum, or anything as low."""
    number = constant(node)
    if number is None or like is None:
        return False
    return number <= (HIDES_BELOW if like.dtype != torch.float16 else -6e4 / 2)


def _attribute(node: Any) -> float | None:
    """A one-element tensor kept in the module, such as a lifted constant."""
    if not isinstance(node, Node) or node.op != "get_attr" or node.graph.owning_module is None:
        return None
    found: Any = node.graph.owning_module
    for name in str(node.target).split("."):
        found = getattr(found, name, None)
    constant_tensor = isinstance(found, Tensor) and not isinstance(found, torch.nn.Parameter) and found.numel() == 1
    return float(found) if constant_tensor else None
