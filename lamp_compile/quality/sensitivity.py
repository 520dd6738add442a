"""What single sites cost: KL of a model's predictions with one site, or one kv head, under LAMP and all else exact."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lamp_compile.plan import Plan, SitePlan
from lamp_compile.quality import rows as specs
from lamp_compile.quality.engine import Engine
from lamp_compile.quality.metrics import NORMAL_95, POSITIONS_AT_ONCE, wilson

BLOCK = 128
"""Positions whose mean KL counts as one observation in an interval: neighbours depend on each other."""
KEPT_BYTES = {"cuda": 16 << 30, "cpu": 1 << 30}
"""Reference logits are kept up to this size and computed again beyond it."""
FLOAT_BITS = 16.0


@dataclass(frozen=True)
class Outcome:
    """One plan on some windows.

    Attributes:
        kl: Mean KL(exact || plan) of each block of positions ``[blocks]``, in nats.
        agreed: Positions with the same most likely token.
        positions: Of all.
        bits: Bits read per stored value.
        share: Refined share of the live sub-tiles of each site.
    """

    kl: Tensor
    agreed: int
    positions: int
    bits: float
    share: dict[str, float]

    @property
    def mean(self) -> float:
        """Mean KL."""
        return float(sum(self.kl.tolist())) / self.kl.numel()

    def summary(self) -> dict[str, float]:
        """KL, agreement and bits with their intervals, JSON-ready."""
        low, high = wilson(self.agreed, self.positions)
        return {
            "kl": self.mean, "kl_half_interval": half_interval(self.kl), "agreement": self.agreed / self.positions,
            "agreement_low": low, "agreement_high": high, "bits_per_value": self.bits, "positions": self.positions,
        }  # fmt: skip


def half_interval(observations: Tensor) -> float:
    """Half the 95 % interval of the mean of independent observations; infinite for fewer than two."""
    if observations.numel() < 2:
        return math.inf
    return NORMAL_95 * float(observations.double().std()) / math.sqrt(observations.numel())


class Bench:
    """Plans over the same windows of one model.

    Args:
        model: The uncompiled model in float32.
        engine: The same model on the runtime, with every site that LAMP can take.
        windows: Token ids ``[n, T]``.
    """

    def __init__(self, model: Any, engine: Engine, windows: Tensor) -> None:
        self.model, self.engine = model, engine
        self.windows = windows.to(next(model.parameters()).device)
        self._kept: dict[int, Tensor] = {}

    @torch.no_grad()
    def measure(self, plan: Plan) -> Outcome:
        """One forward over each window under a plan; sites that it does not apply are exact."""
        kls: list[Tensor] = []
        agreed = 0
        counts: dict[str, Tensor] = {}
        bits = 0.0
        for index in range(self.windows.shape[0]):
            run = self.engine.run(self.windows[index : index + 1], plan)
            kl, same = _compare(self._reference(index)[0], run.logits[0])
            kls.append(_blocks(kl))
            agreed += int(same)
            for name, site in run.tiles.items():
                counts[name] = site.counts + counts.get(name, 0)
            tiles, floats = run.tiles, run.float_values
        share = {name: int(seen[1]) / max(1, int(seen[0])) for name, seen in counts.items()}
        values = {name: site.kv_heads * (site.key_dim + site.value_dim) for name, site in tiles.items()}
        bits = FLOAT_BITS * floats + sum(
            values[name] * specs.bits_read(plan.site(name), site.key_dim, site.value_dim, share[name])
            for name, site in tiles.items()
        )
        return Outcome(torch.cat(kls), agreed, self.windows.numel(), bits / (floats + sum(values.values())), share)

    def _reference(self, index: int) -> Tensor:
        if index in self._kept:
            return self._kept[index]
        logits: Tensor = self.model(input_ids=self.windows[index : index + 1], use_cache=False).logits
        if logits.nbytes * self.windows.shape[0] <= KEPT_BYTES.get(self.windows.device.type, 1 << 30):
            self._kept[index] = logits
        return logits


def alone(plan: Plan, name: str, **changes: Any) -> Plan:
    """The plan with one site changed and all others as the model has them."""
    return replace(
        plan,
        sites=tuple(replace(r, **changes) if r.name == name else replace(r, apply=False) for r in plan.sites),
    )


def one_head(row: SitePlan, head: int, kv_heads: int, tau: float) -> dict[str, Any]:
    """Changes that put one kv head of a site at tau and read both planes for the others."""
    return {
        "tau": (tau,) * kv_heads,
        "floor": tuple(int(row_floor) if h == head else 1 for h, row_floor in enumerate(_per_head(row, kv_heads))),
    }


def _per_head(row: SitePlan, kv_heads: int) -> Sequence[int]:
    return row.floor if isinstance(row.floor, tuple) else (row.floor,) * kv_heads


def difference(first: Outcome, second: Outcome) -> tuple[float, float]:
    """Mean KL of the second over the first on the same positions, and half its 95 % interval."""
    paired = second.kl.double() - first.kl.double()
    return float(paired.mean()), half_interval(paired)


def _compare(reference: Tensor, test: Tensor) -> tuple[Tensor, Tensor]:
    """KL of each position ``[S]`` and how many agree, from logits ``[S, V]``."""
    found, same = [], torch.zeros((), dtype=torch.int64, device=reference.device)
    for first in range(0, reference.shape[0], POSITIONS_AT_ONCE):
        ref = reference[first : first + POSITIONS_AT_ONCE].float().log_softmax(-1)
        new = test[first : first + POSITIONS_AT_ONCE].float().log_softmax(-1)
        found.append((ref.exp() * (ref - new)).sum(-1))
        same += (ref.argmax(-1) == new.argmax(-1)).sum()
    return torch.cat(found), same


def _blocks(kl: Tensor) -> Tensor:
    """Mean of each block of about ``BLOCK`` positions."""
    parts = kl.double().tensor_split(max(1, kl.numel() // BLOCK))
    return torch.stack([part.mean() for part in parts]).cpu()
