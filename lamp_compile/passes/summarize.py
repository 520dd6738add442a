"""From graph objects to a ``Report`` that outlives the graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lamp_compile.ir import AttentionSite, Found
from lamp_compile.passes.capture import Program
from lamp_compile.passes.patterns._values import tensor
from lamp_compile.passes.printer import print_nodes, print_site
from lamp_compile.plan import Plan
from lamp_compile.report import Report, SiteSummary
from lamp_compile.runtime import kernel_notes

NO_CACHE = (
    "sites without a KV cache of ours store K and V anew at every call: prefill and encoders are served, "
    "token-by-token decoding gains nothing (lamp_compile.compile(model) gives it a packed cache)"
)
ONE_TILE = (
    "after run_decompositions, torch holds this program to lengths on its example's side of one storage tile (it "
    "specialises sizes of 1): export with an example longer than a tile"
)


def summarize(
    program: Program, found: Found, plan: Plan, chosen: Sequence[AttentionSite], before: str, backend: str,
    reasons: Mapping[str, str | None],
) -> Report:  # fmt: skip
    """What was seen, decided and done. Call it after the passes; ``before`` is taken ahead of them, ``reasons`` say
    by site why no kernel serves it."""
    notes = [NO_CACHE] if any(site.cache is None for site in chosen) else []
    if program.kind == "exported" and any(_dynamic(site) for site in chosen):
        notes.append(ONE_TILE)
    notes += kernel_notes.notes({site.name: reasons[site.name] for site in chosen if _on_a_gpu(site)})
    if not found.sites:
        notes.append("no attention was found in this graph: it runs as it was")
    return Report(
        sites=tuple(map(summary, found.sites)),
        refusals=found.refusals,
        unclaimed=found.unclaimed,
        plan=plan,
        rewritten=tuple(site.name for site in chosen),
        backend=backend,
        notes=tuple(notes),
        before=before,
        after=print_site(program.graph, chosen[0].name) if chosen else "",
    )


def text_before(program: Program, sites: Sequence[AttentionSite]) -> str:
    """The first site's nodes as they were."""
    return print_nodes(program.graph, (sites[0].root, *sites[0].absorbed)) if sites else ""


def _on_a_gpu(site: AttentionSite) -> bool:
    q = tensor(site.q)
    return q is not None and kernel_notes.expected_on(q.device)


def _dynamic(site: AttentionSite) -> bool:
    k = tensor(site.k)
    return k is not None and not isinstance(k.shape[2], int)


def summary(site: AttentionSite) -> SiteSummary:
    """One site without its nodes."""
    features = [name for name in ("mask", "bias", "sinks", "cache") if getattr(site, name) is not None]
    features += [f"causal {site.causal}"] if site.causal else []
    features += [f"window {site.window}"] if site.window else []
    features += [f"softcap {site.softcap:g}"] if site.softcap else []
    return SiteSummary(
        site.name, site.pattern, site.heads, site.kv_heads, site.head_dim, site.value_dim, site.dtype, tuple(features)
    )
