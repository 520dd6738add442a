"""Attention over a cache by its four operators: what ``lamp::attention.cached`` is where no kernel serves it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lamp_compile.plan import SIXTEEN_BITS

SCORES = ("causal", "window", "scale", "softcap", "keys", "rotation", "query_bits", "subtile", "k_format", "site")


def sixteen_bits(options: Mapping[str, Any]) -> bool:
    """Whether the planes hold what level 2 asks for (as ``SitePlan.sixteen_bits``)."""
    return {options["k_format"], options["v_format"]} <= set(SIXTEEN_BITS) and options["query_bits"] != 8


def attend_in_parts(
    q: Tensor, planes: tuple[Tensor, ...], hot: tuple[Tensor, ...], seen: tuple[Tensor | None, ...],
    options: Mapping[str, Any], exact: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Output ``[B, H, S, Dv]``, the guard's new state and statistics.

    Args:
        q: ``[B, H, S, D]``.
        planes: Six of them.
        hot: tau, floor, budget, state, stats.
        seen: balance, mask, bias, sinks, start, lengths, block table.
        options: The keyword arguments of ``lamp::attention.cached``.
        exact: Keys ``[B, G, N, D]`` and values as they came, for level 2; without them it means both planes.
    """
    tau, floor, budget, state, stats = hot
    site, common = options["site"], {name: options[name] for name in SCORES}
    importance = torch.ops.lamp.look_ahead(q, planes[0], planes[2], *seen, rule=options["rule"], **common)
    levels = torch.ops.lamp.select(importance, tau, floor, state, None, exact=exact is not None, site=site)
    k_exact, v_exact = exact or (None, None)
    out, lse, certificate = torch.ops.lamp.attend(
        q, *planes, levels, k_exact, v_exact, *seen, v_format=options["v_format"], **common
    )
    state, stats = torch.ops.lamp.guard(
        out, lse, certificate, levels, state, stats, floor, budget, window=options["guard_window"],
        hold=options["guard_hold"], hysteresis=options["hysteresis"],
        exact=exact is not None or sixteen_bits(options), site=site,
    )  # fmt: skip
    return out, state, stats
