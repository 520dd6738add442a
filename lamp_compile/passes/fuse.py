"""Pass 5, where a kernel exists: look_ahead, select, attend and guard over a cache become one operator."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor
from torch.fx import Node

from lamp_compile.ir import AttentionSite
from lamp_compile.passes._nodes import OPS, lamp_nodes, outcome, sweep
from lamp_compile.passes.capture import Program
from lamp_compile.passes.insert_lookahead import PLANES, SEEN
from lamp_compile.passes.patterns._dialect import aten, bind
from lamp_compile.passes.patterns._values import Emitter, tensor
from lamp_compile.runtime import kernel_notes, kernels

PARTS = ("look_ahead", "select", "attend", "guard")
COPIES = (aten.copy_.default, "copy_")
WhyNot = Callable[[Tensor, tuple[Tensor, ...], Tensor, Mapping[str, Any]], str | None]


def fuse(
    program: Program, sites: Iterable[AttentionSite], why_not: WhyNot = kernels.why_not_attend
) -> dict[str, str | None]:
    """Replace the four nodes of each site over a cache by ``lamp::fused_attention``; gives back, by site, why not.

    The operator writes the guard's state and statistics itself, so the copies that the program made go too.
    """
    reasons: dict[str, str | None] = {}
    for site in sites:
        if site.cache is None:
            reasons[site.name] = kernel_notes.NO_CACHE
            continue
        nodes = lamp_nodes(program.graph, site.name)
        if "arbitrate" in nodes:
            reasons[site.name] = kernel_notes.PREDICTED
            continue
        look_ahead, select, attend, guard = (nodes[name] for name in PARTS)
        looked, selected, attended, guarded = (bind(node) for node in (look_ahead, select, attend, guard))
        inputs = {**attended, "tau": selected["tau"], "floor": selected["floor"], "budget": guarded["budget"],
                  "state": guarded["state"], "stats": guarded["stats"], "rule": looked["rule"],
                  "guard_window": guarded["window"], "guard_hold": guarded["hold"],
                  "hysteresis": guarded["hysteresis"], "launch": site.cache.settings["launch"]}  # fmt: skip
        reasons[site.name] = _why_not(inputs, why_not)
        if reasons[site.name] is None:
            _replace(program, (look_ahead, select, attend, guard), inputs)
    return reasons


def _why_not(inputs: dict[str, Any], why_not: WhyNot) -> str | None:
    q, state, *planes = (tensor(inputs[name]) for name in ("q", "state", *PLANES))
    if q is None or state is None or any(plane is None for plane in planes):
        return kernel_notes.UNKNOWN
    return why_not(q, tuple(plane for plane in planes if plane is not None), state, inputs)


def _replace(program: Program, parts: tuple[Node, ...], inputs: dict[str, Any]) -> None:
    *_, attend, guard = parts
    emit = Emitter(attend)
    names = [argument.name for argument in OPS["fused_attention"]._schema.arguments if argument.kwarg_only]
    ordered = ("q", *PLANES, "tau", "floor", "budget", "state", "stats", "balance", *SEEN)
    fused = emit.call(
        OPS["fused_attention"], *(inputs[name] for name in ordered), **{name: inputs[name] for name in names}
    )
    leftover: list[Node] = [*parts]
    for out in outcome(attend, 0):
        out.replace_all_uses_with(fused)
        leftover.append(out)
    for index, name in enumerate(("state", "stats")):
        for new in outcome(guard, index):
            for user in list(new.users):
                if user.target in COPIES and user.args[0] is inputs[name]:
                    user.replace_all_uses_with(inputs[name])
                    program.graph.erase_node(user)
            new.replace_all_uses_with(inputs[name])
            leftover.append(new)
    leftover += [node for index in (1, 2) for node in outcome(attend, index)]
    sweep(program.graph, leftover)
