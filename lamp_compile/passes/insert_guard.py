"""Pass 4: the fallback guard: certificate, budget and state to a new state, written back in place; and the audit of a
prediction."""

from __future__ import annotations

from collections.abc import Iterable

from torch.fx import Graph, Node

from lamp_compile.ir import AttentionSite
from lamp_compile.passes._nodes import OPS, attributes, meeting_point, outcome, outputs, sweep, the
from lamp_compile.passes.capture import Program
from lamp_compile.passes.hot_tensors import Wires
from lamp_compile.passes.insert_lookahead import PLANES, SEEN
from lamp_compile.passes.insert_selector import SHARED
from lamp_compile.passes.patterns._dialect import aten, bind
from lamp_compile.passes.patterns._values import Emitter
from lamp_compile.plan import Plan


def insert_guard(program: Program, sites: Iterable[AttentionSite], plan: Plan, wires: Wires) -> None:
    """Add ``lamp::guard`` after each ``lamp::attend``, and ``lamp::audit`` where a network has predicted.

    Without a cache the new state and statistics are copied into the hot tensors here; with one, the program copies
    what the attention returned, and now takes the guard's results instead.
    """
    graph = program.graph
    for site in sites:
        row = plan.site(site.name)
        attend, select = (the(graph, op, site.name, "insert_guard") for op in ("attend", "select"))
        out, lse, certificate = (outcome(attend, index)[0] for index in range(3))
        emit, hot = Emitter(certificate.next), wires.nodes(site, row)
        emit.inherit(attend)
        guard = emit.call(
            OPS["guard"], out, lse, certificate, select, hot["state"], hot["stats"], hot["floor"], hot["budget"],
            window=row.guard.window, hold=row.guard.hold, hysteresis=row.guard.hysteresis,
            exact=site.cache is None or row.sixteen_bits, site=site.name,
        )  # fmt: skip
        state, stats = outputs(guard, 2, emit)
        if site.cache is None:
            emit.call(aten.copy_.default, hot["state"], state)
            emit.call(aten.copy_.default, hot["stats"], stats)
            continue
        cached = meeting_point(graph, site, "insert_guard")
        results = [state, stats]
        if cached.target is OPS["predicted"]:
            results += outputs(_audit(graph, site, emit), 2, emit)
        for index, new in enumerate(results, start=1):
            for user in outcome(cached, index):
                user.replace_all_uses_with(new)
                graph.erase_node(user)
        sweep(graph, [cached])


def _audit(graph: Graph, site: AttentionSite, emit: Emitter) -> Node:
    """``lamp::audit``: what the step's own weights say of the prediction."""
    predicted, look_ahead, select, attend = (
        bind(the(graph, op, site.name, "insert_guard")) for op in ("predicted", "look_ahead", "select", "attend")
    )
    return emit.call(
        OPS["audit"], predicted["q"], *(predicted[name] for name in PLANES[:3]), attend["levels"],
        the(graph, "look_ahead", site.name, "insert_guard"),
        *(predicted[name] for name in ("predicted", "history", "trust")),
        *(select[name] for name in ("tau", "floor", "state")), *(predicted[name] for name in ("limit", "margin")),
        *(attend[name] for name in ("balance", *SEEN)),
        **attributes(look_ahead, *SHARED), **attributes(predicted, "trained", "skip"), site=site.name,
    )  # fmt: skip
