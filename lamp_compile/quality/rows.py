"""The rows of a quality table: what each changes in the plan, and the controls that keep the claim honest."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

from lamp_compile.plan import Plan, SitePlan
from lamp_compile.runtime import formats

NEVER = 1e30
"""A tau that no importance exceeds."""
PLAIN = MappingProxyType({"rotation": "none", "query_bits": 0, "balance": None, "tau": NEVER, "floor": 0})
"""Storage in a plain format: no rotation, no balance, the query as it is, nothing to refine."""


@dataclass(frozen=True)
class RowSpec:
    """One row: the default plan with these changes at every site.

    Attributes:
        name: What the table calls it.
        changes: Fields of ``SitePlan`` to replace.
        control: ``"random_tiles"`` or ``"static_tiles"``: choose tiles without looking, at the refined share of the
            row ``match`` or more.
        match: The row a control is held against.
        twin: S of the outlier twin it runs on; 0 = the model itself.
        pairs: Which RoPE pairs the twin scales.
        balance: Compiled with balance ``"auto"``, ``"always"`` or ``"never"``.
    """

    name: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    control: str = ""
    match: str = "lamp"
    twin: float = 0.0
    pairs: str = "any"
    balance: str = "auto"

    def on_twin(self, scale: float, pairs: str = "any") -> RowSpec:
        """The same row on an outlier twin."""
        return replace(self, twin=scale, pairs=pairs)

    @property
    def key(self) -> tuple[str, float, str]:
        """What tells rows of one table apart."""
        return self.name, self.twin, self.pairs


BF16 = RowSpec("bf16", {"k_format": "bf16", "v_format": "bf16", **PLAIN})
FP8 = RowSpec("fp8_kv", {"k_format": "fp8", "v_format": "fp8", **PLAIN})
ALL_HIGH = RowSpec("all_high", {"floor": 1})
ALL_LOW = RowSpec("all_low", {"tau": NEVER, "floor": 0})
RANDOM = RowSpec("random_tiles", {"floor": 0}, control="random_tiles")
STATIC = RowSpec("static_tiles", {"floor": 0}, control="static_tiles")
LAMP = RowSpec("lamp")
STANDARD = (BF16, FP8, ALL_HIGH, ALL_LOW, LAMP, RANDOM, STATIC)
"""In the order of measurement: a control comes after the row it is held against."""
TWIN = (FP8, ALL_HIGH, LAMP)
"""Rows worth repeating on an outlier twin."""


def changed(plan: Plan, changes: Mapping[str, Any]) -> Plan:
    """The plan with ``changes`` at every site it applies to. Not validated: controls use rules that no plan may."""
    return replace(plan, sites=tuple(replace(s, **changes) if s.apply else s for s in plan.sites))


def first_tau(control: str, share: float, plan: Plan, context: int, groups: int) -> float:
    """A tau at which a control should refine at least ``share`` of the tiles; measure, and ``next_tau`` if it does not.

    ``groups`` query heads share a tile, and the random control refines it when any of them draws it.
    """
    if control == "random_tiles":
        wanted = min(1.0, share * 1.01 + 1e-4)
        return float((1 - wanted) ** (1 / groups))
    subtile = min((s.subtile for s in plan.sites if s.apply), default=32)
    seen = [math.ceil((i + 1) / subtile) for i in range(context)]
    newest = 0
    while sum(min(t, newest + 1) for t in seen) < share * sum(seen):
        newest += 1
    return _static_tau(newest)


def next_tau(control: str, tau: float, share: float, reached: float) -> float:
    """A smaller tau, for a control that fell short of ``share``."""
    if control == "random_tiles":
        return max(0.0, tau - 1.5 * (share - reached) - 1e-4)
    return _static_tau(round(1 / tau - 0.5) + 1)


def bits_read(site: SitePlan, key_dim: int, value_dim: int, refined_share: float) -> float:
    """Bits that one step reads per stored value, scales included."""
    key, value = _bits(site.k_format, key_dim, refined_share), _bits(site.v_format, value_dim, refined_share)
    return (key * key_dim + value * value_dim) / (key_dim + value_dim)


def _bits(name: str, dim: int, share: float) -> float:
    made = formats.get(name)
    # The scale slot of a 16-bit format is a placeholder of the common layout; a 16-bit cache needs none.
    return float(made.high_bits) if made.high_bits >= 16 else made.bits_per_value(dim, share)


def _static_tau(newest: int) -> float:
    """Between 1 / (newest + 1) and 1 / newest: the sink's tile and the ``newest`` newest are refined."""
    return 1 / (newest + 0.5)
