"""Hot settings of a session, tau, floor level and error budget of every site, as inputs that its graph reads.

The same names and rules as ``runtime/controls.py``. They are changed in place and act from the next step on.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lamp_compile.runtime import hot_values
from lamp_compile.runtime.ort.artifact import Site

Values = NDArray[np.float32]


@dataclass(frozen=True)
class SiteControls:
    """The settings of one site, float32 ``[G]`` each: views of what is bound to the session."""

    tau: Values
    floor: Values
    budget: Values


class Controls:
    """The settings of all sites of a session, by site name.

    Attributes:
        inputs: The arrays behind them, by the name of the graph's input.
    """

    def __init__(self, sites: Sequence[Site]) -> None:
        self._sites: dict[str, SiteControls] = {}
        self.inputs: dict[str, Values] = {}
        shared = [site for site in sites if site.row is not None]
        rows = max((site.row for site in shared if site.row is not None), default=-1) + 1
        for site in sites:
            views = {}
            for field, name in site.controls.items():
                shape = (site.kv_heads,) if site.row is None else (rows, site.kv_heads)
                whole = self.inputs.setdefault(name, np.zeros(shape, np.float32))
                views[field] = whole if site.row is None else whole[site.row]
                views[field][:] = hot_values.per_head(site.plan[field], site.kv_heads, f"{field} of {site.name}")
            self._sites[site.name] = SiteControls(**views)

    def __getitem__(self, site: str) -> SiteControls:
        return self._sites[site]

    def __contains__(self, site: object) -> bool:
        return site in self._sites

    def __iter__(self) -> Iterator[str]:
        return iter(self._sites)

    def __len__(self) -> int:
        return len(self._sites)

    def set(
        self,
        *,
        tau: float | Sequence[float] | None = None,
        floor: int | Sequence[int] | None = None,
        budget: float | Sequence[float] | None = None,
        sites: str | Iterable[str] | None = None,
    ) -> None:
        """Change settings in place, of all sites or of those named; one number, or one per kv head.

        Raises:
            OptionError: Unknown site, impossible value, wrong number of heads. Nothing has changed then.
        """
        given: dict[str, Any] = {"tau": tau, "floor": floor, "budget": budget}
        changes = []
        for name in hot_values.chosen_sites(self._sites, sites):
            for field, value in given.items():
                if value is not None:
                    view = getattr(self._sites[name], field)
                    changes.append((view, hot_values.per_head(value, view.shape[0], f"{field} of {name}")))
        for view, values in changes:  # all are possible, so change all
            view[:] = values
