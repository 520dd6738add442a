"""What the guards of a session have seen, as numpy arrays. Fields and their order as in ``runtime/guard.py``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

STATE = ("error", "floor", "hold", "flags")
STATS = ("steps", "live", "refined", "exact", "raised", "lowered", "bad")
FLAGS = {
    1: "a NaN or infinity reached the output",
    2: "level 2 was called for without an exact tier; both planes are used",
}


@dataclass(frozen=True)
class SiteStatistics:
    """Of one site, each ``[B, G]``.

    Attributes:
        error: Root of the running mean of the squared relative error that the certificate reports.
        floor: Floor level raised by the guard.
        hold: Steps left to hold it.
        flags: Sticky bits, see ``FLAGS``.
        steps, live, refined, exact: Steps; live sub-tiles over all of them, of these refined, of these exact.
        raised, lowered, bad: Times the floor rose and sank; steps with a non-finite output.
    """

    error: NDArray[np.float32]
    floor: NDArray[np.float32]
    hold: NDArray[np.float32]
    flags: NDArray[np.int64]
    steps: NDArray[np.int64]
    live: NDArray[np.int64]
    refined: NDArray[np.int64]
    exact: NDArray[np.int64]
    raised: NDArray[np.int64]
    lowered: NDArray[np.int64]
    bad: NDArray[np.int64]

    @staticmethod
    def of(state: NDArray[Any], stats: NDArray[Any]) -> SiteStatistics:
        """From state ``[B, G, 4]`` and statistics ``[B, G, 7]``."""
        fields: dict[str, Any] = {name: state[..., i].copy() for i, name in enumerate(STATE)}
        fields |= {name: stats[..., i].copy() for i, name in enumerate(STATS)}
        fields["error"] = np.sqrt(fields["error"])
        fields["flags"] = fields["flags"].astype(np.int64)
        return SiteStatistics(**fields)

    @property
    def refined_share(self) -> float:
        """Refined sub-tiles over live ones, of all sequences and heads."""
        live = int(self.live.sum())
        return int(self.refined.sum()) / live if live else 0.0

    def report(self, site: str) -> dict[str, Any]:
        """The row of a guard report, as ``NestedCache.guard_report`` has it."""
        bits = int(np.bitwise_or.reduce(self.flags, axis=None)) if self.flags.size else 0
        return {
            "site": site,
            "steps": int(self.steps.max(initial=0)),
            "refined_share": self.refined_share,
            "raised": int(self.raised.sum()),
            "lowered": int(self.lowered.sum()),
            "bad_steps": int(self.bad.sum()),
            "floor": self.floor.max(axis=0).tolist(),
            "error": self.error.max(axis=0).tolist(),
            "flags": [text for bit, text in FLAGS.items() if bits & bit],
        }
