"""Pass 1: every spelling of attention becomes one operator, ``lamp::attention``."""

from __future__ import annotations

from collections.abc import Iterable

from torch.fx import Node

from lamp_compile.ir import AttentionSite
from lamp_compile.passes._nodes import OPS, sweep
from lamp_compile.passes.capture import Program
from lamp_compile.passes.patterns._dialect import aten
from lamp_compile.passes.patterns._values import Emitter, tensor


def meet(program: Program, sites: Iterable[AttentionSite]) -> None:
    """Replace each site's root by ``lamp::attention`` and remove what it absorbed; over a cache it is there already."""
    for site in sites:
        if site.cache is None:
            _replace(site)
            sweep(program.graph, (site.root, *site.absorbed))


def _replace(site: AttentionSite) -> None:
    emit = Emitter(site.root)
    found: Node = emit.call(
        OPS["attention"], site.q, site.k, site.v, site.mask, site.bias, site.sinks,
        causal=site.causal, window=site.window, scale=site.scale, softcap=site.softcap, site=site.name,
    )  # fmt: skip
    old, new = tensor(site.root), tensor(found)
    if old is not None and new is not None:
        if old.dim() == 3:
            found = emit.call(aten.squeeze.dim, found, 1)
        if old.dtype != new.dtype:
            # Autocast, or a chain that stays in float32 after the softmax.
            found = emit.call(aten._to_copy.default, found, dtype=old.dtype)
    site.root.replace_all_uses_with(found)
