"""Find the site that hurts: binary search on fuel, the number of sites that are rewritten."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lamp_compile.errors import InputError


@dataclass(frozen=True)
class Bisection:
    """What the search found.

    Attributes:
        culprit: The site whose rewrite takes the KL over the limit; None where even all sites together stay below it.
        fuel: Sites rewritten when that happens, the culprit last; the number of sites where nothing hurts.
        before: KL with one site fewer.
        after: KL with the culprit.
        limit: The KL allowed.
        steps: Every measurement, ``(fuel, KL)`` in the order made.
    """

    culprit: str | None
    fuel: int
    before: float
    after: float
    limit: float
    steps: tuple[tuple[int, float], ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        return asdict(self)


def bisect(
    sites: Sequence[str],
    measure: Callable[[int], float],
    limit: float,
    on_step: Callable[[int, float], None] | None = None,
) -> Bisection:
    """The first site, in the order of rewriting, that takes the KL over ``limit``.

    Needs about log2(sites) + 2 measurements. Whatever the KL does in between, the site named is one whose rewrite
    crosses the limit: ``measure(fuel - 1) <= limit < measure(fuel)``. A KL that is no number counts as over the limit.

    Args:
        sites: Names in the order that fuel counts them.
        measure: Fuel -> mean KL with the first so many sites rewritten.
        limit: KL allowed. Every site adds a little: take it above the sum of what healthy sites cost.
        on_step: Called after each measurement.

    Raises:
        InputError: No sites, or the limit is exceeded with nothing rewritten.
    """
    if not sites:
        raise InputError("there are no sites to search", where="bisect", fix="`lamp-compile explain` says why")
    steps: list[tuple[int, float]] = []

    def kl(fuel: int) -> float:
        steps.append((fuel, measure(fuel)))
        if on_step is not None:
            on_step(*steps[-1])
        return steps[-1][1]

    good, bad = 0, len(sites)
    before, after = kl(good), kl(bad)
    if not before <= limit:
        raise InputError(
            f"KL {before:.2e} with nothing rewritten is over the limit {limit:.2e}",
            where="bisect",
            fix="a larger limit: this is the noise of the measurement itself",
        )
    if after <= limit:
        return Bisection(None, bad, after, after, limit, tuple(steps))
    while bad - good > 1:
        middle = (good + bad) // 2
        value = kl(middle)
        if value <= limit:
            good, before = middle, value
        else:
            bad, after = middle, value
    return Bisection(sites[bad - 1], bad, before, after, limit, tuple(steps))
