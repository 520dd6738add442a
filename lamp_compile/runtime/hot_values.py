"""Values of tau, floor level and error budget, checked: what the controls of every runtime share. No torch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from lamp_compile.errors import OptionError
from lamp_compile.ir import Floor

FIELDS = ("tau", "floor", "budget")


def per_head(value: float | Sequence[float], kv_heads: int, where: str) -> list[float]:
    """One value per kv head from one number or as many as there are heads; ``where`` starts with the field's name.

    Raises:
        OptionError: Another number of values, or an impossible one.
    """
    several = isinstance(value, Sequence) and not isinstance(value, str)
    values = [float(v) for v in value] if several else [float(value)] * kv_heads  # type: ignore[union-attr, arg-type]
    if len(values) != kv_heads:
        raise OptionError(
            f"{len(values)} values for {kv_heads} kv heads", where=where, fix="one number, or one per kv head"
        )
    name = where.split()[0]
    for v in values:
        allowed = v in set(map(float, Floor)) if name == "floor" else v > 0 if name == "budget" else 0 <= v < math.inf
        if not allowed:
            raise OptionError(f"{v!r} is not possible", where=where, fix="tau >= 0, floor 0, 1 or 2, budget > 0")
    return values


def chosen_sites(known: Iterable[str], sites: str | Iterable[str] | None) -> list[str]:
    """The sites meant: all for None.

    Raises:
        OptionError: One of them is unknown.
    """
    known = list(known)
    names = known if sites is None else [sites] if isinstance(sites, str) else list(sites)
    for name in names:
        if name not in known:
            raise OptionError(f"unknown site {name!r}", where="Controls.set", fix=f"one of {', '.join(known)}")
    return names
