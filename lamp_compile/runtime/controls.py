"""Hot settings: tau, floor level and error budget of every site, as tensors that a compiled graph reads.

They are changed in place, so changing them recompiles nothing and moves no plane byte.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lamp_compile.errors import OptionError
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
    """The hot tensors of all sites of one model, by site name.

    Attributes:
        changes: How often settings were changed, by (site, who).
        holder: Who holds tau; empty for everyone.
    """

    def __init__(self) -> None:
        self._sites: dict[str, SiteControls] = {}
        self.changes: Counter[tuple[str, str]] = Counter()
        self.holder = ""

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
            self._sites[site.name] = made = SiteControls.of(site, kv_heads, device)
            if not torch.compiler.is_compiling():
                for tensor in (made.tau, made.floor, made.budget):  # changed in place: CUDA graphs need no copy of them
                    torch._dynamo.mark_static_address(tensor, guard=False)
        return self._sites[site.name]

    def set(
        self,
        *,
        tau: float | Sequence[float] | None = None,
        floor: int | Sequence[int] | None = None,
        budget: float | Sequence[float] | None = None,
        sites: str | Iterable[str] | None = None,
        by: str = "user",
    ) -> None:
        """Change settings in place, of all sites or of those named; one number, or one per kv head.

        Args:
            tau: Threshold of the rule.
            floor: Least precision.
            budget: The guard's.
            sites: Whose; None for all.
            by: Who asks, for the counters.

        Raises:
            OptionError: Unknown site, impossible value, wrong number of heads; or a controller holds tau.
        """
        if tau is not None and self.holder and by != self.holder:
            raise OptionError(
                f"a {self.holder} holds tau", where="Controls.set", fix="fast.lamp.controller.stop() first"
            )
        names = hot_values.chosen_sites(self._sites, sites)
        changes = [
            (tensor, _per_head(value, tensor.shape[0], f"{field} of {name}"))
            for field, value in (("tau", tau), ("floor", floor), ("budget", budget))
            if value is not None
            for name, tensor in ((name, getattr(self._sites[name], field)) for name in names)
        ]
        for tensor, values in changes:  # all are possible, so change all
            tensor.copy_(values)
        for name in names if changes else ():
            self.changes[(name, by)] += 1


class Writer:
    """Puts tau into force from another thread: on a GPU by a stream of its own, so that the model's is not waited for.
    A step under way may see the new value in its later layers."""

    def __init__(self, controls: Controls) -> None:
        self._controls = controls
        self._staged: dict[str, Tensor] = {}
        self._streams: dict[torch.device, Any] = {}

    def write(self, site: str, tau: Sequence[float]) -> None:
        """Set one site's tau, one number per kv head."""
        target = self._controls[site].tau
        if target.device.type != "cuda":
            self._controls.set(tau=tau, sites=site, by=self._controls.holder or "controller")
            return
        if target.device not in self._streams:
            self._streams[target.device] = torch.cuda.Stream(target.device)  # type: ignore[no-untyped-call]
        if site not in self._staged:
            self._staged[site] = torch.empty(target.shape, pin_memory=True)
        staged, stream = self._staged[site], self._streams[target.device]
        stream.synchronize()  # its own: writes before this one
        staged.copy_(_per_head(tau, target.shape[0], f"tau of {site}"))
        with torch.cuda.stream(stream):
            target.copy_(staged, non_blocking=True)
        self._controls.changes[(site, self._controls.holder or "controller")] += 1


def _per_head(value: float | Sequence[float], kv_heads: int, where: str) -> Tensor:
    return torch.tensor(hot_values.per_head(value, kv_heads, where), dtype=torch.float32)
