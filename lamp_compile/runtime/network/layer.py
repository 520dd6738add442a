"""The cache layer of a site whose importance is predicted: planes, and what the gate keeps of each sequence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lamp_compile.runtime import reference
from lamp_compile.runtime.arguments import Scores
from lamp_compile.runtime.cache_layers import LayerSpec, NestedLayer
from lamp_compile.runtime.fused_ops import inference_only
from lamp_compile.runtime.network import audit
from lamp_compile.runtime.network import gate as gates
from lamp_compile.runtime.network import ops as _ops  # importing it registers the operators
from lamp_compile.runtime.network.gate import Gate
from lamp_compile.runtime.plane_handle import PlaneHandle


@dataclass(frozen=True)
class SiteNetwork:
    """A gate at one site: its weights on the site's device, and how its summaries are laid out."""

    gate: Gate
    group: int
    """Keys per summary."""
    trained: int
    """Tokens of the longest sequence it was trained on."""
    skip: float = 0.0
    """Softmax mass that a row may lose to sub-tiles that are not read; 0 reads all."""

    def __deepcopy__(self, memo: dict[int, Any]) -> SiteNetwork:
        """Copies of a cache share the weights."""
        return self


class NetworkLayer(NestedLayer):
    """Planes, and per sequence: summaries of keys ``[B, G, N / group, R]``, importance at the step before and its
    running mean ``[B, G, T, 2]``, and how far the gate is trusted ``[B, G, 7]``.

    A step of one token is predicted. Several tokens at a time (a prompt) have all keys at hand and are looked at
    exactly; only measurements (``reference_only``) predict for each of them, as decoding would.
    """

    per_sequence: tuple[str, ...] = (*NestedLayer.per_sequence, "summary", "history", "trust")
    summary: Tensor
    history: Tensor
    trust: Tensor

    def __init__(self, spec: LayerSpec, capacity: int) -> None:
        super().__init__(spec, capacity)
        assert spec.network is not None
        self.network: SiteNetwork = spec.network
        gate = spec.network.gate
        self._now = (gate.query, gate.query_bias, gate.age[0].contiguous(), gate.extra[0].contiguous(), gate.limit,
                     gate.margin)  # fmt: skip

    def _allocate(self, batch: int, kv_heads: int, capacity: int) -> dict[str, Tensor]:
        made = super()._allocate(batch, kv_heads, capacity)
        keys, tiles = made["k_scale"].shape[2], made["k_scale"].shape[2] // self.plan.subtile
        like: dict[str, Any] = {"device": self.device}
        made["summary"] = torch.zeros(
            batch, kv_heads, keys // self.network.group, self.network.gate.rank, dtype=torch.float16, **like
        )
        made["history"] = torch.zeros(batch, kv_heads, tiles, 2, **like)
        made["trust"] = audit.new(batch, kv_heads, self.device)
        return made

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[PlaneHandle, PlaneHandle]:
        """Quantise new rows ``[B, G, n, D]`` into the planes and summarise the groups they fall into; gives back
        handles of all keys and values.

        Raises:
            CacheError: See ``admit``.
        """
        handles = super().update(key_states, value_states, *args, **kwargs)
        rows, gate = int(key_states.shape[-2]), self.network.gate
        torch.ops.lamp.summarize(
            self.k_high, self.k_residual, self.k_scale, self.summary, gate.key, gate.key_bias,
            self._position() - rows, None, rows=rows, group=self.network.group, k_format=self.plan.k_format,
            site=self.name,
        )  # fmt: skip
        return handles

    def _run(self, q: Tensor, seen: tuple[Tensor | None, ...], options: dict[str, Any]) -> Tensor:
        compiling = torch.compiler.is_compiling()
        if q.shape[2] > 1 and (compiling or not self.reference_only):
            return super()._run(q, seen, options)
        controls = self.controls
        hot = (controls.tau, controls.floor, controls.budget, self.state, self.stats)
        options = {**options, "trained": self.network.trained, "skip": self.network.skip}
        one = q.shape[2] == 1
        if one and not (compiling or self.reference_only):
            out: Tensor = torch.ops.lamp.fused_predicted(
                q, *self.planes, *hot, self.balance, *seen, self.summary, self.history, self.trust, *self._now,
                **options, room=self.max_cache_len, pages=self.max_cache_len // self.plan.tile,
            )  # fmt: skip
            return inference_only(out, q)
        kept = (self.history, self.trust, *self._now[4:])
        how = {name: options[name] for name in ("causal", "window", "scale", "softcap")}
        if one:
            predicted = self._predict(q, seen, None, **how)
            out, *new = torch.ops.lamp.attention.predicted(
                q, *self.planes, *hot, self.balance, *seen, predicted, *kept, **options
            )
        else:
            exact = _ops.exact_importance(q, self.planes, (self.balance, *seen), options)
            predicted = self._predict(q, seen, exact, **how)
            out, *new = _ops.attend_arbitrated(
                q, self.planes, hot, (self.balance, *seen), (exact, predicted), kept, options
            )
        for held, made in zip((self.state, self.stats, self.history, self.trust), new, strict=True):
            held.copy_(made)
        return out if compiling else inference_only(out, q)

    def _predict(self, q: Tensor, seen: tuple[Tensor | None, ...], exact: Tensor | None, **how: Any) -> Tensor:
        plan, room = self.plan, self.max_cache_len
        found: Tensor = torch.ops.lamp.predict(
            q, self.summary, self.history, *self._now[:4], exact, self.balance, *seen, **how, keys=room,
            rotation=plan.rotation, query_bits=plan.query_bits, subtile=plan.subtile, room=room,
            pages=room // plan.tile, site=self.name,
        )  # fmt: skip
        return found

    def forecast(self, q: Tensor, steps: int, scale: float | None = None) -> Tensor:
        """Log importance ``[B, H, 1, T]`` that the gate expects ``steps`` (0 ... W) tokens on, from the query
        ``[B, H, 1, D]`` of the newest token: what to fetch ahead where keys lie in slower memory."""
        plan, gate = self.plan, self.network.gate
        scores = Scores(q.shape[-1] ** -0.5 if scale is None else scale, 0.0, plan.rotation, plan.query_bits)
        projected = gates.project(reference.prepare_query(q, self.balance, scores), gate.query, gate.query_bias)
        key = torch.arange(self.max_cache_len, device=q.device)
        groups = (key < self.cumulative_length).reshape(1, 1, 1, -1, self.network.group).any(-1)
        tiles = (key < self.cumulative_length + steps).reshape(1, 1, 1, -1, plan.subtile).any(-1)
        query = gates.look_forward(projected, gate, steps)
        said = gates.content(query, self.summary, groups, tiles.shape[-1], scores.scale)
        return gates.predict(said, self.history[:, :, None], tiles, gate.age[steps], gate.extra[steps])[0]

    def network_report(self) -> dict[str, Any]:
        """Steps predicted and not, and what went wrong, in words. Reads the device."""
        steps, exact, dropped = (float(self.trust[..., f].sum()) for f in (audit.STEPS, audit.EXACT, audit.DROPPED))
        bits = {
            bit for flags in self.trust[..., audit.FLAGS].flatten().tolist() for bit in audit.WORDS if int(flags) & bit
        }
        return {
            "predicted_share": 1.0 - exact / steps if steps else 0.0,
            "dropped": int(dropped),
            "excess": self.trust[..., audit.EXCESS].amax(0).tolist(),
            "network_flags": audit.flag_names(sum(bits)),
        }
