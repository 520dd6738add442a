"""Pass 2: store K and V as planes, and look ahead at the scores from the high plane alone."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch.fx import Node

from lamp_compile.ir import AttentionSite
from lamp_compile.passes._nodes import OPS, attributes, meeting_point, outputs
from lamp_compile.passes.capture import Program
from lamp_compile.passes.hot_tensors import Wires
from lamp_compile.passes.patterns._dialect import aten, bind
from lamp_compile.passes.patterns._values import Emitter, tensor
from lamp_compile.plan import Plan

PLANES = ("k_high", "k_residual", "k_scale", "v_high", "v_residual", "v_scale")
ARBITRATED = ("predicted", "trust", "state", "margin", "lengths")
SEEN = ("mask", "bias", "sinks", "start", "lengths", "block_table")


def insert_lookahead(program: Program, sites: Iterable[AttentionSite], plan: Plan, wires: Wires) -> None:
    """Add ``lamp::quantize`` (unless a cache holds planes) and ``lamp::look_ahead`` before each site's attention;
    where a network has predicted the importance, ``lamp::arbitrate`` chooses between the two."""
    for site in sites:
        row = plan.site(site.name)
        attention = meeting_point(program.graph, site, "insert_lookahead")
        bound, emit = bind(attention), Emitter(attention)
        if site.cache is None:
            balance = wires.nodes(site, row)["balance"]
            planes = emit.call(
                OPS["quantize"], bound["k"], bound["v"], balance,
                k_format=row.k_format, v_format=row.v_format, rotation=row.rotation, tile=row.tile, site=site.name,
            )  # fmt: skip
            k_high, _, k_scale, *_ = outputs(planes, len(PLANES), emit)
            keys = _keys(program, bound["k"], emit)
        else:
            balance, k_high, k_scale, keys = (bound[name] for name in ("balance", "k_high", "k_scale", "keys"))
        exact = emit.call(
            OPS["look_ahead"], bound["q"], k_high, k_scale, balance, *(bound.get(name) for name in SEEN),
            **attributes(bound, "causal", "window", "scale", "softcap"), keys=keys, k_format=row.k_format,
            rotation=row.rotation, rule=row.rule, query_bits=row.query_bits, subtile=row.subtile, site=site.name,
        )  # fmt: skip
        if attention.target is OPS["predicted"]:
            emit.call(
                OPS["arbitrate"], exact, *(bound[name] for name in ARBITRATED),
                **attributes(bound, "keys", "trained", "skip", "subtile"), site=site.name,
            )  # fmt: skip


def _keys(program: Program, k: Node, emit: Emitter) -> Any:
    """How many keys there are: a number where the program's own guards hold it, read at run time otherwise."""
    found = tensor(k)
    assert found is not None
    if isinstance(found.shape[2], int) and program.kind != "graph_module":
        return found.shape[2]
    return emit.call(aten.sym_size.int, k, 2)
