"""Pass 3: choose a precision for every sub-tile of keys, and attend at those precisions."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch.fx import Graph, Node

from lamp_compile.ir import AttentionSite
from lamp_compile.passes._nodes import OPS, attributes, lamp_nodes, meeting_point, outcome, outputs, sweep, the
from lamp_compile.passes.capture import Program
from lamp_compile.passes.hot_tensors import Wires
from lamp_compile.passes.insert_lookahead import PLANES, SEEN
from lamp_compile.passes.patterns._dialect import bind
from lamp_compile.passes.patterns._values import Emitter
from lamp_compile.plan import Plan

SHARED = ("causal", "window", "scale", "softcap", "keys", "k_format", "rotation", "query_bits", "subtile")


def insert_selector(program: Program, sites: Iterable[AttentionSite], plan: Plan, wires: Wires) -> None:
    """Add ``lamp::select`` and ``lamp::attend``; the attention's users take the latter's output.

    Sites without a cache hand in their K and V as they are, for level 2 (``exact``).
    """
    graph = program.graph
    for site in sites:
        row = plan.site(site.name)
        attention = meeting_point(graph, site, "insert_selector")
        look_ahead = the(graph, "look_ahead", site.name, "insert_selector")
        bound, looked, emit = bind(attention), bind(look_ahead), Emitter(attention)
        hot = wires.nodes(site, row)
        exact = site.cache is None
        importance, skip_below = _importance(graph, site, look_ahead, emit)
        levels = emit.call(
            OPS["select"], importance, hot["tau"], hot["floor"], hot["state"], skip_below, exact=exact, site=site.name
        )
        attended = emit.call(
            OPS["attend"], bound["q"], *_planes(graph, site, bound), levels,
            bound["k"] if exact else None, bound["v"] if exact else None, hot["balance"],
            *(bound.get(name) for name in SEEN),
            **attributes(looked, *SHARED),
            v_format=row.v_format, site=site.name,
        )  # fmt: skip
        out, *_ = outputs(attended, 3, emit)
        if exact:
            attention.replace_all_uses_with(out)
            sweep(graph, [attention])
            continue
        for user in outcome(attention, 0):
            user.replace_all_uses_with(out)
            graph.erase_node(user)


def _importance(graph: Graph, site: AttentionSite, look_ahead: Node, emit: Emitter) -> tuple[Node, Node | None]:
    """What ``lamp::select`` acts on, and where it skips: the look-ahead's word, or what was made of it and of a
    network's."""
    arbitrate = lamp_nodes(graph, site.name).get("arbitrate")
    if arbitrate is None:
        return look_ahead, None
    importance, *below = outputs(arbitrate, 2 if bind(arbitrate)["skip"] > 0 else 1, emit)
    return importance, below[0] if below else None


def _planes(graph: Graph, site: AttentionSite, bound: dict[str, Any]) -> list[Any]:
    if site.cache is not None:
        return [bound[name] for name in PLANES]
    planes = the(graph, "quantize", site.name, "insert_selector")
    return [outcome(planes, index)[0] for index in range(len(PLANES))]
