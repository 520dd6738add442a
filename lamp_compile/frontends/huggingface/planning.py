"""From probed sites to a plan, and from a plan to what the caches are made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from lamp_compile.errors import ModelError, OptionError, PlanError
from lamp_compile.frontends import linears
from lamp_compile.frontends.huggingface import balance as balancing
from lamp_compile.frontends.huggingface.sites import CALIBRATION, ProbedSite
from lamp_compile.launch_plan import LaunchPlan
from lamp_compile.plan import Plan, SitePlan, fingerprint, keep_last
from lamp_compile.runtime import kernels
from lamp_compile.runtime.cache_layers import LayerSpec
from lamp_compile.runtime.controls import Controls
from lamp_compile.runtime.kv_cache import CacheSpec
from lamp_compile.runtime.ledger import Ledger
from lamp_compile.runtime.network.layer import SiteNetwork

Sites = tuple[ProbedSite, ...]


def describe(model: nn.Module, sites: Sites) -> str:
    """The model in words, for plans and errors."""
    first = sites[0] if sites else None
    sizes = f", {first.heads} heads, {first.kv_heads} kv, D {first.head_dim}" if first else ""
    return f"{type(model).__name__} with {len(sites)} attention layers{sizes}"


def make_plan(model: nn.Module, sites: Sites, wanted: Plan, balance: str) -> Plan:
    """One row per site, in the order they run; ``wanted`` has one row, the template of all.

    Raises:
        OptionError: ``balance`` is not a mode.
    """
    if balance not in balancing.MODES:
        raise OptionError(f"balance is {balance!r}", where="balance", fix=f"one of {', '.join(balancing.MODES)}")
    config: Any = model.config
    (template,) = wanted.sites
    text = config.get_text_config(decoder=True)
    rows = tuple(_row(site, template, balance, text) for site in sites)
    rows = keep_last(rows, wanted.preset)
    gains = {site.name: round(balancing.gain(*balancing.pooled(site, config)), 3) for site in sites if not site.reason}
    return replace(
        wanted,
        sites=rows,
        model=describe(model, sites),
        fingerprint=fingerprint(site.key for site in sites),
        provenance={
            "calibration": "uncalibrated",
            "balance_from": CALIBRATION,
            "balance": balance,
            "balance_threshold": balancing.THRESHOLD,
            "balance_gain": gains,
        },
    ).validate()


def _row(site: ProbedSite, template: SitePlan, balance: str, config: Any) -> SitePlan:
    if site.reason:
        return replace(template, name=site.name, apply=False, reason=site.reason)
    rms = balancing.pooled(site, config)
    gain = balancing.gain(*rms)
    if balance == "never" or (balance == "auto" and gain <= balancing.THRESHOLD):
        return replace(template, name=site.name)
    rows = tuple(tuple(float(f"{value:.6g}") for value in row) for row in balancing.factors(*rms).tolist())
    reason = f"balanced: score noise {gain:.2f} times smaller" if balance == "auto" else "balanced: asked for"
    return replace(template, name=site.name, balance=rows, reason=reason)


def check_plan(plan: Plan, model: nn.Module, sites: Sites) -> Plan:
    """A plan given by the user, checked against the model.

    Raises:
        PlanError: It was made for another model, or a row does not fit its site.
    """
    plan.validate().check(fingerprint(site.key for site in sites), describe(model, sites))
    known = {site.name: site for site in sites}
    for row in plan.sites:
        where = f"plan, site {row.name!r}"
        if row.name not in known:
            raise PlanError(f"the model has no site {row.name!r}", where=where, fix=f"one of {', '.join(known)}")
        site = known[row.name]
        if row.apply and site.reason:
            raise PlanError(f"this site cannot be applied: {site.reason}", where=where, fix="apply: false")
        if row.balance is not None and [len(r) for r in row.balance] != [site.head_dim] * site.kv_heads:
            raise PlanError(
                f"balance is {len(row.balance)} x {len(row.balance[0]) if row.balance else 0}",
                where=where,
                fix=f"{site.kv_heads} lists of {site.head_dim}, or null",
            )
        for name in ("tau", "floor"):
            value = getattr(row, name)
            if isinstance(value, tuple) and len(value) != site.kv_heads:
                raise PlanError(
                    f"{name} has {len(value)} numbers", where=where, fix=f"one, or {site.kv_heads} (one per kv head)"
                )
    for site in sites:
        plan.site(site.name)
    linears.check(model, plan.linears)
    return plan


def mode_for(plan: Plan, mode: str, device: str) -> str:
    """How decoding runs on a type of device: what "auto" means there.

    Raises:
        OptionError: The plan has an exact tier on the host, which no graph can fetch from, and a graph was asked for.
    """
    insured = [row.name for row in plan.sites if row.apply and row.exact_tier == "host"]
    if not insured:
        return ("reduce-overhead" if device == "cuda" else "default") if mode == "auto" else mode
    if mode not in ("auto", "eager"):
        raise OptionError(
            f"mode {mode!r} with exact_tier 'host' in {insured[0]}: a graph cannot fetch from the host on demand",
            where="mode",
            fix="mode='eager' or 'auto', or exact_tier 'none'",
        )
    return "eager"


def applied(plan: Plan, sites: Sites, fuel: int | None) -> tuple[ProbedSite, ...]:
    """The sites that the plan applies, the first ``fuel`` of them.

    Raises:
        OptionError: ``fuel`` is negative or no whole number.
    """
    if fuel is not None and (not isinstance(fuel, int) or isinstance(fuel, bool) or fuel < 0):
        raise OptionError(f"fuel is {fuel!r}", where="fuel", fix="None for all sites, or how many to rewrite")
    wanted = [site for site in sites if not site.reason and plan.site(site.name).apply]
    return tuple(wanted[:fuel])


def make_spec(
    model: nn.Module, plan: Plan, sites: Sites, chosen: Sites, controls: Controls,
    networks: Mapping[str, SiteNetwork] | None = None,
) -> CacheSpec:  # fmt: skip
    """What each layer of a cache needs, with the gates of sites that a network predicts. Layers without an applied site
    keep float keys and values.

    Raises:
        ModelError: Two sites share one cache layer.
    """
    config: Any = model.config
    count = max([int(config.get_text_config(decoder=True).num_hidden_layers), *(site.layer + 1 for site in sites)])
    layers: list[LayerSpec | None] = [None] * count
    ledger = Ledger()
    for site in chosen:
        row = plan.site(site.name)
        if layers[site.layer] is not None:
            raise ModelError(
                f"two attentions share cache layer {site.layer}", where=site.name, fix="apply: false for one of them"
            )
        factors = None if row.balance is None else torch.tensor(row.balance, dtype=torch.float32, device=site.device)
        launch = plan.launch.get(kernels.target_name(site.device), LaunchPlan()).text()
        hot = controls.get_or_create(row, site.kv_heads, site.device)
        network = None if networks is None else networks.get(site.name)
        layers[site.layer] = LayerSpec(row, hot, factors, launch, ledger, network, site.shape)
    return CacheSpec(tuple(layers), plan.fingerprint, describe(model, sites), ledger=ledger)
