"""What a selection rule is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Rule:
    """One way to say how much a sub-tile matters.

    Attributes:
        name: What plans call it.
        importance: ``(weights z, scores y, live)``, each ``[B, H, S, T, subtile]`` -> importance ``[B, H, S, T]``. A
            sub-tile is refined when its importance exceeds tau, so every rule puts its importance on tau's scale.
        source: Where it comes from.
        control: A control for measurements, not to be used in a plan.
    """

    name: str
    importance: Callable[[Tensor, Tensor, Tensor], Tensor]
    source: str
    control: bool = False
