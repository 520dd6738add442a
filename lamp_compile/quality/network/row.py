"""The row ``lamp_network``: the plan with a look-ahead network, at the refined share of the exact look-ahead."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from lamp_compile.errors import OptionError
from lamp_compile.plan import Plan
from lamp_compile.quality.engine import Engine, Run
from lamp_compile.quality.evaluate import Evaluation, Row
from lamp_compile.quality.rows import LAMP, RowSpec

NAME = "lamp_network"
TRIES, PROBED = 7, 2
"""Taus that are tried, and windows that they are tried on."""


def lamp_network(evaluation: Evaluation, engine: Engine) -> Row:
    """Measure it on the windows of an evaluation that has measured ``lamp``.

    Sites that the network does not serve keep their exact look-ahead and their tau. The tau of those that it serves is
    chosen so that as many sub-tiles are refined in all as by the exact look-ahead, on the first windows.

    Args:
        evaluation: With the row ``lamp``.
        engine: Of the same model, compiled with the network.

    Raises:
        OptionError: ``lamp`` was not measured, or the network serves no site.
    """
    if LAMP.key not in evaluation.rows:
        raise OptionError(f"{NAME!r} comes before 'lamp'", where="rows", fix="measure that row first")
    if not served(engine.plan):
        raise OptionError(
            "the look-ahead network serves no site of this model", where="--lookahead", fix="train it on more text"
        )
    probe = evaluation.windows[:PROBED]
    wanted = share(engine, probe, with_tau(engine.plan, None))
    low, high = 1e-5, 0.9
    tau = applied_tau(engine.plan)
    for _ in range(TRIES):
        reached = share(engine, probe, with_tau(engine.plan, tau))
        if abs(reached - wanted) <= 0.005 * wanted:
            break
        low, high = (low, tau) if reached < wanted else (tau, high)
        tau = (low * high) ** 0.5 if low > 1e-5 and high < 0.9 else tau * (1.6 if reached > wanted else 1 / 1.6)
    plan = with_tau(engine.plan, tau)
    row = evaluation.measure_with(_Fixed(engine, plan), RowSpec(NAME))
    return replace(row, tau=tau)


def served(plan: Plan) -> list[str]:
    """Sites that a network serves."""
    return [row.name for row in plan.sites if row.apply and row.lookahead == "network"]


def applied_tau(plan: Plan) -> float:
    """tau of the first such site, as one number."""
    tau = next(row.tau for row in plan.sites if row.apply and row.lookahead == "network")
    return tau if isinstance(tau, float | int) else min(tau)


def with_tau(plan: Plan, tau: float | None) -> Plan:
    """The plan with this tau where a network serves; without any network for None."""
    changes: dict[str, object] = {"lookahead": "exact", "skip": 0.0} if tau is None else {"tau": tau}
    names = served(plan)
    return replace(plan, sites=tuple(replace(row, **changes) if row.name in names else row for row in plan.sites))  # type: ignore[arg-type]


def share(engine: Engine, windows: Tensor, plan: Plan) -> float:
    """Refined share over windows ``[n, N]``."""
    live = refined = 0
    for index in range(windows.shape[0]):
        for site in engine.run(windows[index : index + 1], plan).tiles.values():
            seen, hot = (int(n) for n in site.counts.tolist())
            live, refined = live + seen, refined + hot
    return refined / max(1, live)


class _Fixed:
    """An engine whose plan is this one."""

    def __init__(self, engine: Engine, plan: Plan) -> None:
        self._engine, self._plan = engine, plan

    @property
    def plan(self) -> Plan:
        return self._plan

    def run(self, ids: Tensor, plan: Plan) -> Run:
        return self._engine.run(ids, plan)
