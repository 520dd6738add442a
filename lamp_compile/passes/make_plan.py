"""Decide: from the sites found and what the user asked for to a plan with one row per site."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lamp_compile.errors import PlanError
from lamp_compile.ir import AttentionSite, Found
from lamp_compile.plan import GuardPlan, Plan, SitePlan, fingerprint, template


def make_plan(
    found: Found, *, preset: str = "balanced", plan: Plan | None = None, overrides: Mapping[str, Any] | None = None
) -> Plan:
    """One row per site. A given plan is obeyed row by row; without one, the preset and the overrides decide.

    Sites over a cache take their row from the operator's own attributes: the cache was laid out by them.

    Raises:
        PlanError: The given plan is for other sites, or has impossible values.
    """
    row = template(preset, **(overrides or {}))
    mark = site_fingerprint(found.sites)
    with_cache = any(site.cache is not None for site in found.sites)
    if plan is not None:
        plan.validate()
        if not with_cache:
            plan.check(mark, "this graph")
    rows = tuple(_row(site, plan, row, with_cache) for site in found.sites)
    for site, decided in zip(found.sites, rows, strict=True):
        _fits(site, decided)
    if plan is not None:
        return replace(plan, sites=rows)
    return Plan(rows, model="graph", fingerprint=mark, preset=preset).validate()


def choose_sites(found: Found, plan: Plan, fuel: int | None = None) -> list[AttentionSite]:
    """The sites to rewrite: those the plan applies to, and of them the first ``fuel``."""
    return [site for site in found.sites if plan.site(site.name).apply][:fuel]


def site_fingerprint(sites: tuple[AttentionSite, ...]) -> str:
    """The fingerprint of these sites, by which a plan for another graph is told apart."""
    return fingerprint((s.name, s.heads, s.kv_heads, s.head_dim, s.value_dim) for s in sites)


def _row(site: AttentionSite, plan: Plan | None, row: SitePlan, with_cache: bool) -> SitePlan:
    named = {r.name for r in plan.sites} if plan is not None else set()
    if site.cache is not None:
        base = plan.site(site.name) if plan is not None and site.name in named else replace(row, name=site.name)
        return replace(base, **_settings(site))
    if plan is None:
        return replace(row, name=site.name)
    if with_cache and site.name not in named:
        return replace(row, name=site.name, apply=False, reason="the plan leaves it out")
    return plan.site(site.name)


def _settings(site: AttentionSite) -> dict[str, Any]:
    assert site.cache is not None
    settings = site.cache.settings
    copied = {name: settings[name] for name in ("rule", "k_format", "v_format", "rotation", "query_bits", "subtile")}
    guard = {"window": settings["guard_window"], "hold": settings["guard_hold"], "hysteresis": settings["hysteresis"]}
    return {**copied, "guard": GuardPlan(**guard)}  # type: ignore[arg-type]


def _fits(site: AttentionSite, row: SitePlan) -> None:
    where = f"plan, site {row.name!r}"
    for name, value in (("tau", row.tau), ("floor", row.floor)):
        if isinstance(value, tuple) and len(value) != site.kv_heads:
            raise PlanError(
                f"{name} lists {len(value)} values for {site.kv_heads} kv heads",
                where=where,
                fix="one number, or one per kv head",
            )
    if row.balance is not None and (len(row.balance), len(row.balance[0]) if row.balance else 0) != (
        site.kv_heads,
        site.head_dim,
    ):
        raise PlanError(f"balance is not {site.kv_heads} lists of {site.head_dim} numbers", where=where, fix="or null")
