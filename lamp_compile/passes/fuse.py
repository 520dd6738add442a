"""Pass 5, where a kernel exists: look_ahead, select, attend and guard over a cache become one operator; with a network,
so do predict, arbitrate and audit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor
from torch.fx import Node

from lamp_compile.ir import AttentionSite
from lamp_compile.passes._nodes import OPS, lamp_nodes, outcome, sweep
from lamp_compile.passes.capture import Program
from lamp_compile.passes.insert_lookahead import PLANES, SEEN
from lamp_compile.passes.patterns._dialect import aten, bind, settings_of
from lamp_compile.passes.patterns._values import Emitter, tensor
from lamp_compile.runtime import kernel_notes, kernels

COPIES = (aten.copy_.default, "copy_")
INPUTS = {
    "fused_attention": ("q", *PLANES, "tau", "floor", "budget", "state", "stats", "balance", *SEEN),
    "fused_predicted": (
        "q", *PLANES, "tau", "floor", "budget", "state", "stats", "balance", *SEEN, "summary", "history", "trust",
        "query", "query_bias", "age", "extra", "limit", "margin",
    ),
}  # fmt: skip
KEPT = ("summary", "history", "trust")
WhyNot = Callable[[Tensor, tuple[Tensor, ...], Tensor, Mapping[str, Any]], str | None]


def fuse(
    program: Program, sites: Iterable[AttentionSite], why_not: WhyNot = kernels.why_not_attend
) -> dict[str, str | None]:
    """Replace the four nodes of each site over a cache by ``lamp::fused_attention``, the seven of one that a network
    predicts by ``lamp::fused_predicted``; gives back, by site, why not.

    These operators write what they change in place (the guard's state and statistics; the network's history and
    trust), so the copies that the program made go too.
    """
    reasons: dict[str, str | None] = {}
    for site in sites:
        if site.cache is None:
            reasons[site.name] = kernel_notes.NO_CACHE
            continue
        nodes = lamp_nodes(program.graph, site.name)
        op = "fused_predicted" if "predict" in nodes else "fused_attention"
        inputs = {**_inputs(nodes), "launch": site.cache.settings["launch"]}
        reasons[site.name] = _why_not(op, inputs, why_not)
        if reasons[site.name] is None:
            _replace(program, op, nodes, inputs)
    return reasons


def _inputs(nodes: dict[str, Node]) -> dict[str, Any]:
    """What the operators of a site take, by name."""
    bound = {op: bind(node) for op, node in nodes.items()}
    looked, selected, attended, guarded = (bound[op] for op in ("look_ahead", "select", "attend", "guard"))
    inputs = {**attended, "tau": selected["tau"], "floor": selected["floor"], "budget": guarded["budget"],
              "state": guarded["state"], "stats": guarded["stats"], "rule": looked["rule"],
              "guard_window": guarded["window"], "guard_hold": guarded["hold"],
              "hysteresis": guarded["hysteresis"]}  # fmt: skip
    for op in ("predict", "audit"):
        inputs = {**bound.get(op, {}), **inputs}
    return inputs


def _why_not(op: str, inputs: dict[str, Any], why_not: WhyNot) -> str | None:
    names = ("q", "state", *PLANES, *(KEPT if op == "fused_predicted" else ()))
    found = [x for x in (tensor(inputs[name]) for name in names) if x is not None]
    if len(found) < len(names):
        return kernel_notes.UNKNOWN
    q, state, planes, kept = found[0], found[1], tuple(found[2:8]), tuple(found[8:])
    reason = why_not(q, planes, state, inputs)
    if reason is None and kept:
        reason = kernels.why_not_predicted(q, planes, kept, inputs)
    return reason


def _replace(program: Program, op: str, nodes: dict[str, Node], inputs: dict[str, Any]) -> None:
    attend = nodes["attend"]
    names = settings_of(OPS[op]._schema)
    fused = Emitter(attend).call(
        OPS[op], *(inputs[name] for name in INPUTS[op]), **{name: inputs[name] for name in names}
    )
    leftover = list(nodes.values())
    for out in outcome(attend, 0):
        out.replace_all_uses_with(fused)
        leftover.append(out)
    leftover += [node for index in (1, 2) for node in outcome(attend, index)]
    if "arbitrate" in nodes:
        leftover += [node for index in (0, 1) for node in outcome(nodes["arbitrate"], index)]
    for part, written in (("guard", ("state", "stats")), ("audit", ("history", "trust"))):
        for index, name in enumerate(written if part in nodes else ()):
            leftover += _in_place(program, nodes[part], index, inputs[name])
    sweep(program.graph, leftover)


def _in_place(program: Program, part: Node, index: int, written: Node) -> list[Node]:
    """Let the tensor itself stand for a result that was copied into it; gives back what nobody needs now."""
    leftover = outcome(part, index)
    for new in leftover:
        for user in list(new.users):
            if user.target in COPIES and user.args[0] is written:
                user.replace_all_uses_with(written)
                program.graph.erase_node(user)
        new.replace_all_uses_with(written)
    return leftover
