"""A look-ahead network at the sites of a transformers model: the plan that uses it, and the gates of its layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from lamp_compile.errors import PlanError
from lamp_compile.frontends.huggingface.sites import ProbedSite
from lamp_compile.network_plan import NetworkPlan
from lamp_compile.plan import Plan, SitePlan
from lamp_compile.runtime.network import files
from lamp_compile.runtime.network.files import Layer, Network
from lamp_compile.runtime.network.layer import SiteNetwork

Sites = Sequence[ProbedSite]


def with_network(plan: Plan, sites: Sites, path: str | Path) -> Plan:
    """The plan with the network of this file at every site that it serves; the others keep the exact look-ahead.

    Raises:
        PlanError: The file is damaged, or made for another model, other formats or sub-tiles.
    """
    network = files.load(path)
    _check_model(network, sites, str(path))
    rows = tuple(_row(row, network, str(path)) for row in plan.sites)
    return replace(plan, sites=rows, network=NetworkPlan(str(path), network.sha256)).validate()


def gates(plan: Plan, sites: Sites, folder: Path) -> dict[str, SiteNetwork]:
    """The gate of every row with a network, on its site's device; none where no row has one.

    Args:
        plan: Checked against the model.
        sites: What the probe saw.
        folder: That the plan's path is relative to.

    Raises:
        PlanError: See ``with_network``; or the file is another than the plan was made with.
    """
    rows = [row for row in plan.sites if row.apply and row.lookahead == "network"]
    if not rows or plan.network is None:
        return {}
    path = plan.network.path(folder)
    network = files.load(path, plan.network.sha256)
    _check_model(network, sites, str(path))
    by_name = {site.name: site for site in sites}
    made = {}
    for row in rows:
        layer = _layer(network, row.name, str(path))
        _check_row(row, layer, network, str(path))
        about = network.about
        gate = network.gates[row.name].to(by_name[row.name].device)
        made[row.name] = SiteNetwork(gate, about.group, about.trained, row.skip)
    return made


def _row(row: SitePlan, network: Network, where: str) -> SitePlan:
    layer = _layer(network, row.name, where) if row.apply else None
    if layer is None or not layer.serves:
        return row
    _check_row(row, layer, network, where)
    return replace(row, lookahead="network")


def _layer(network: Network, name: str, where: str) -> Layer:
    for layer in network.about.layers:
        if layer.name == name:
            return layer
    raise PlanError(f"the look-ahead network has no gate for {name}", where=where, fix=files.RETRAIN)


def _check_row(row: SitePlan, layer: Layer, network: Network, where: str) -> None:
    """Raise PlanError unless the row stores and decides as it did where the gate was trained."""
    basis, tile = files.basis_of(row.rotation, row.balance), network.about.subtile
    if basis != layer.basis:
        raise PlanError(
            f"keys of {row.name} are stored in the basis {basis}, the network was trained on {layer.basis}",
            where=where,
            fix="train it with the plan's rotation and balance",
        )
    if row.subtile != tile:
        raise PlanError(
            f"{row.name} decides on {row.subtile} keys, the network on {tile}", where=where, fix=f"subtile {tile}"
        )
    if row.rule != "energy":
        raise PlanError(f"{row.name} has rule {row.rule!r}", where=where, fix="rule energy, which the network predicts")


def _check_model(network: Network, sites: Sites, where: str) -> None:
    served = [site for site in sites if not site.reason]
    known = {site.name: site for site in served}
    for layer in network.about.layers:
        site = known.get(layer.name)
        if site is None or (site.heads, site.kv_heads, site.head_dim) != (layer.heads, layer.kv_heads, layer.dim):
            raise PlanError(
                f"the look-ahead network was trained for {network.about.model}, with {layer.heads} heads, "
                f"{layer.kv_heads} kv heads and D {layer.dim} at {layer.name}; this model has "
                + (f"{site.heads}, {site.kv_heads} and {site.head_dim} there" if site else "no such site"),
                where=where,
                fix=files.RETRAIN,
            )
    if files.weights_mark([site.module for site in served]) != network.about.weights:
        raise PlanError(
            f"the look-ahead network was trained for other weights than this model's ({network.about.model})",
            where=where,
            fix=files.RETRAIN,
        )
