"""Hot settings: tau, floor level and error budget of every site, as tensors that a compiled graph reads.

They are changed in place, so changing them recompiles nothing and moves no plane byte.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lamp_compile.plan import SitePlan
from lamp_compile.runtime import hot_values


@dataclass(frozen=True)
class SiteControls:
    """The hot tensors of one site, float32 ``[G]`` each."""

    tau: Tensor
    floor: Tensor
    budget: Tensor

    @staticmethod
    def of(site: SitePlan, kv_heads: int, device: torch.device | str = "cpu") -> SiteControls:
        """Tensors that start at the plan's values.

        Raises:
            OptionError: The plan lists another number of kv heads.
        """
        values = {"tau": site.tau, "floor": site.floor, "budget": site.guard.budget}
        with torch.inference_mode(False):  # they are changed in place later, anywhere
            return SiteControls(
                **{name: _per_head(v, kv_heads, f"{name} of {site.name}").to(device) for name, v in values.items()}
            )


class Controls:
    """The hot tensors of all sites of one model, by site name."""

    def __init__(self) -> None:
        self._sites: dict[str, SiteControls] = {}

    def __getitem__(self, site: str) -> SiteControls:
        return self._sites[site]

    def __contains__(self, site: object) -> bool:
        return site in self._sites

    def __iter__(self) -> Iterator[str]:
        return iter(self._sites)

    def __len__(self) -> int:
        return len(self._sites)

    def get_or_create(self, site: SitePlan, kv_heads: int, device: torch.device | str = "cpu") -> SiteControls:
        """The controls of a site; made from the plan the first time, so that a second compile finds the same
        tensors."""
        if site.name not in self._sites:
            self._sites[site.name] = SiteControls.of(site, kv_heads, device)
        return self._sites[site.name]

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
            OptionError: Unknown site, impossible value, wrong number of heads.
        """
        names = hot_values.chosen_sites(self._sites, sites)
        changes = [
            (tensor, _per_head(value, tensor.shape[0], f"{field} of {name}"))
            for field, value in (("tau", tau), ("floor", floor), ("budget", budget))
            if value is not None
            for name, tensor in ((name, getattr(self._sites[name], field)) for name in names)
        ]
        for tensor, values in changes:  # all are possible, so change all
            tensor.copy_(values)


def _per_head(value: float | Sequence[float], kv_heads: int, where: str) -> Tensor:
    return torch.tensor(hot_values.per_head(value, kv_heads, where), dtype=torch.float32)
