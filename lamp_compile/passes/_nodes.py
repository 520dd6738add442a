"""Finding and removing nodes."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch.fx import Graph, Node

from lamp_compile.errors import PassError
from lamp_compile.ir import AttentionSite
from lamp_compile.passes.patterns._dialect import bind
from lamp_compile.passes.patterns._values import Emitter
from lamp_compile.runtime import fused_ops as _fused_ops  # noqa: F401  (registers the fused operators)
from lamp_compile.runtime.network import ops as _network_ops  # noqa: F401  (and those of look-ahead networks)

lamp = torch.ops.lamp
OPS = {
    "attention": lamp.attention.default,
    "cached": lamp.attention.cached,
    "quantize": lamp.quantize.default,
    "predicted": lamp.attention.predicted,
    "predict": lamp.predict.default,
    "look_ahead": lamp.look_ahead.default,
    "arbitrate": lamp.arbitrate.default,
    "audit": lamp.audit.default,
    "select": lamp.select.default,
    "attend": lamp.attend.default,
    "guard": lamp.guard.default,
    "fused_attention": lamp.fused_attention.default,
    "fused_predicted": lamp.fused_predicted.default,
}
"""The operators of the rewritten graph, by short name."""


def lamp_nodes(graph: Graph, site: str) -> dict[str, Node]:
    """The ``lamp::`` nodes of one site by short name, in graph order."""
    names = {target: name for name, target in OPS.items()}
    found = {}
    for node in graph.nodes:
        if node.op == "call_function" and node.target in names and bind(node)["site"] == site:
            found[names[node.target]] = node
    return found


def the(graph: Graph, op: str, site: str, wanted_by: str) -> Node:
    """The node of that operator at that site.

    Raises:
        PassError: It is not there.
    """
    node = lamp_nodes(graph, site).get(op)
    if node is None:
        raise PassError(
            f"{wanted_by} needs lamp::{op}, which is not in the graph",
            where=f"site {site}",
            fix="run the passes in order",
        )
    return node


def meeting_point(graph: Graph, site: AttentionSite, wanted_by: str) -> Node:
    """The attention operator of a site, before it is expanded.

    Raises:
        PassError: It is not there.
    """
    if site.cache is None:
        return the(graph, "attention", site.name, wanted_by)
    return lamp_nodes(graph, site.name).get("predicted") or the(graph, "cached", site.name, wanted_by)


def outputs(node: Node, count: int, emit: Emitter) -> list[Node]:
    """The first ``count`` results of an operator that returns several."""
    return [emit.call(operator.getitem, node, index) for index in range(count)]


def outcome(node: Node, index: int) -> list[Node]:
    """The users that take one result of an operator that returns several."""
    return [user for user in node.users if user.target is operator.getitem and user.args[1] == index]


def sweep(graph: Graph, candidates: Iterable[Node]) -> None:
    """Erase candidates that nobody uses. General dead-code elimination would take in-place updates with it."""
    chosen = set(candidates)
    for node in reversed(list(graph.nodes)):
        if node in chosen and not node.users:
            graph.erase_node(node)


def attributes(bound: dict[str, Any], *names: str) -> dict[str, Any]:
    """Some of a node's arguments."""
    return {name: bound[name] for name in names}
