"""The changeable tensors of every site, made once by site name, and the nodes that read them in a graph."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import Node

from lamp_compile.errors import ModelError
from lamp_compile.ir import AttentionSite
from lamp_compile.passes.patterns._values import tensor
from lamp_compile.passes.state_host import Host
from lamp_compile.plan import SitePlan
from lamp_compile.runtime import guard, kernels, rotation
from lamp_compile.runtime.controls import Controls


class HotTensors:
    """tau, floor and budget (``runtime.controls``), and the guard's state ``[1, G, 4]`` and statistics ``[1, G, 7]``.

    Compiling a site again (another sequence length, a second call of the backend for one compile) finds the same
    tensors.

    Args:
        controls: Settings to share with others, such as a KV cache; new ones when left out.
    """

    def __init__(self, controls: Controls | None = None) -> None:
        self.controls = Controls() if controls is None else controls
        self.states: dict[str, tuple[Tensor, Tensor]] = {}
        self._balance: dict[str, Tensor] = {}

    def of(self, row: SitePlan, kv_heads: int, device: torch.device) -> dict[str, Tensor]:
        """All tensors of one site by name; ``balance`` only where the plan has one.

        Raises:
            ModelError: A site of this name has other kv heads or lives on another device.
        """
        controls = self.controls.get_or_create(row, kv_heads, device)
        if controls.tau.shape[0] != kv_heads or controls.tau.device.type != device.type:
            held = f"{controls.tau.shape[0]} on {controls.tau.device}"
            raise ModelError(
                f"{kv_heads} kv heads on {device}, but the settings of this name are for {held}",
                where=f"site {row.name}",
                fix="use one lamp_compile.backend(...) object per model, and move the model before compiling it",
            )
        if row.name not in self.states:
            made = (guard.new_state(1, kv_heads, device), guard.new_stats(1, kv_heads, device))
            for t in made:
                torch._dynamo.mark_static_address(t, guard=False)
            self.states[row.name] = made
        state, stats = self.states[row.name]
        found = {
            "tau": controls.tau,
            "floor": controls.floor,
            "budget": controls.budget,
            "state": state,
            "stats": stats,
        }
        if row.balance is not None:
            if row.name not in self._balance:
                self._balance[row.name] = torch.tensor(row.balance, dtype=torch.float32, device=device)
            found["balance"] = self._balance[row.name]
        return found


class Wires:
    """The nodes that read a site's changeable tensors."""

    def __init__(self, host: Host, hot: HotTensors) -> None:
        self._host, self._hot = host, hot

    def nodes(self, site: AttentionSite, row: SitePlan) -> dict[str, Node | None]:
        """``tau``, ``floor``, ``budget``, ``state``, ``stats`` and ``balance`` (None without one) of a site.

        A site over a cache has them in the cache; any other gets them from the host.
        """
        names = ("tau", "floor", "budget", "state", "stats", "balance")
        _make_rotations(site, row)
        if site.cache is not None:
            return {name: site.cache.nodes[name] for name in names}
        q = tensor(site.q)
        assert q is not None
        tensors = self._hot.of(row, site.kv_heads, q.device)
        return {name: self._host.node(site.name, name, tensors[name]) if name in tensors else None for name in names}


def _make_rotations(site: AttentionSite, row: SitePlan) -> None:
    """Make the rotation matrices now: made at the first call, they would lie in a CUDA graph's private memory."""
    q = tensor(site.q)
    assert q is not None
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    like = torch.empty((), dtype=dtype, device=q.device)
    for size in (site.head_dim, site.value_dim):
        rotation.matrix(size, row.rotation, like)
    kernels.prepare(q.device, row.rotation, site.head_dim, site.value_dim)
