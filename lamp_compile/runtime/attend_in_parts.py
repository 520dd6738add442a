"""Attention over a cache by its four operators: what ``lamp::attention.cached`` is where no kernel serves it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

SCORES = ("causal", "window", "scale", "softcap", "keys", "rotation", "query_bits", "subtile", "k_format", "site")


def attend_in_parts(
    q: Tensor, planes: tuple[Tensor, ...], hot: tuple[Tensor, ...], seen: tuple[Tensor | None, ...],
    options: Mapping[str, Any],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Output ``[B, H, S, Dv]``, the guard's new state and statistics.

    Args:
        q: ``[B, H, S, D]``.
        planes: Six of them.
        hot: tau, floor, budget, state, stats.
        seen: balance, mask, bias, sinks, start, lengths, block table.
        options: The keyword arguments of ``lamp::attention.cached``.
    """
    tau, floor, budget, state, stats = hot
    site, common = options["site"], {name: options[name] for name in SCORES}
    importance = torch.ops.lamp.look_ahead(q, planes[0], planes[2], *seen, rule=options["rule"], **common)
    levels = torch.ops.lamp.select(importance, tau, floor, state, None, exact=False, site=site)
    out, lse, certificate = torch.ops.lamp.attend(
        q, *planes, levels, None, None, *seen, v_format=options["v_format"], **common
    )
    state, stats = torch.ops.lamp.guard(
        out, lse, certificate, levels, state, stats, floor, budget, window=options["guard_window"],
        hold=options["guard_hold"], hysteresis=options["hysteresis"], exact=False, site=site,
    )  # fmt: skip
    return out, state, stats
