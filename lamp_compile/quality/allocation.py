"""Which precision each site gets, from what each costs in bits and in KL: a greedy walk along lower convex hulls.

The KL of small independent errors in several layers is the sum of the KLs of each alone (to first order in the squared
errors; ``calibrate`` measures how well that holds). Then the best choice at a budget of bits is that of a Lagrangian:
every unit has the same price of a bit. The hulls' segments, steepest first, are that choice for every price.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

KEPT = -1.0
"""The tau that stands for a site left as the model has it."""


@dataclass(frozen=True)
class Option:
    """One setting of one unit (a site, or one kv head of it).

    Attributes:
        tau: Threshold of the rule; 0 reads both planes of everything, ``KEPT`` keeps the original attention.
        bits: What it adds to the bits read per stored value of the whole model.
        kl: What it adds to the mean KL, in nats.
    """

    tau: float
    bits: float
    kl: float


def allocate(units: Mapping[str, Sequence[Option]], bits: float) -> dict[str, Option]:
    """The options with the least sum of KL within a sum of bits; the cheapest of each unit where even they exceed it.

    Args:
        units: Options of each unit, one at least.
        bits: Budget.
    """
    chosen = {name: hull(options)[0] for name, options in units.items()}
    spent = sum(option.bits for option in chosen.values())
    blocked: set[str] = set()
    for name, before, option in _steps(units):
        more = option.bits - before.bits
        if name in blocked or spent + more > bits:
            blocked.add(name)  # its later steps build on this one
            continue
        spent += more
        chosen[name] = option
    return chosen


def cheapest(units: Mapping[str, Sequence[Option]], kl: float) -> dict[str, Option] | None:
    """The options that minimise the sum of bits with a sum of KL of at most ``kl``; None where there are none."""
    chosen = {name: hull(options)[0] for name, options in units.items()}
    total = sum(option.kl for option in chosen.values())
    for name, _, option in _steps(units):
        if total <= kl:
            return chosen
        total += option.kl - chosen[name].kl
        chosen[name] = option
    return chosen if total <= kl * (1 + 1e-12) else None


def hull(options: Sequence[Option]) -> list[Option]:
    """The options on the lower convex hull of KL over bits, from the fewest bits on."""
    found: list[Option] = []
    for option in sorted(options, key=lambda o: (o.bits, o.kl)):
        if found and option.kl >= found[-1].kl:
            continue
        while len(found) > 1 and _slope(found[-2], found[-1]) >= _slope(found[-1], option):
            found.pop()
        found.append(option)
    return found


def between(options: Sequence[Option], points: int = 4) -> list[Option]:
    """Options and ``points`` more between each two neighbours with tau above 0: log KL and bits are taken as linear in
    log tau."""
    made = [option for option in options if option.tau <= 0]
    measured = sorted((option for option in options if option.tau > 0), key=lambda o: o.tau)
    made += measured[-1:]
    for first, second in pairwise(measured):
        made.append(first)
        for index in range(1, points + 1):
            share = index / (points + 1)
            logs = [math.log(max(o.kl, 1e-12)) for o in (first, second)]
            made.append(
                Option(
                    float(f"{first.tau ** (1 - share) * second.tau**share:.4g}"),
                    first.bits * (1 - share) + second.bits * share,
                    math.exp(logs[0] * (1 - share) + logs[1] * share),
                )
            )
    return made


def _steps(units: Mapping[str, Sequence[Option]]) -> list[tuple[str, Option, Option]]:
    """Every segment of every hull, the one that saves most KL for a bit first; those of one unit stay in order."""
    found = []
    for name, options in units.items():
        corners = hull(options)
        found += [(name, a, b) for a, b in pairwise(corners)]
    return sorted(found, key=lambda step: _slope(step[1], step[2]))


def _slope(a: Option, b: Option) -> float:
    """Change of KL per bit from a to b; minus infinity where no bit is needed."""
    return (b.kl - a.kl) / (b.bits - a.bits) if b.bits > a.bits else -math.inf
