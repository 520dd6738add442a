"""The layers of ``NestedCache``: planes where LAMP acts, growable float tensors where it does not.

One tensor per layer and plane (views of one big tensor cost Inductor full copies), all with static addresses, so that a
decode step that writes into them can be captured in a CUDA graph. Whatever belongs to a sequence (planes, scales, the
guard's state and statistics) follows reorder, crop, reset, selection and growth.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import StaticLayer

from lamp_compile.errors import CacheError
from lamp_compile.plan import SitePlan
from lamp_compile.runtime import formats, guard, layout
from lamp_compile.runtime import ops as _ops  # noqa: F401  (registers torch.ops.lamp)
from lamp_compile.runtime.controls import SiteControls
from lamp_compile.runtime.plane_handle import PlaneHandle

PLANES = ("k_high", "k_residual", "k_scale", "v_high", "v_residual", "v_scale")
LENGTH_STEPS = 4
"""Capacities are rounded up to an eighth to a quarter of their size, so that nearby lengths share one compiled
graph."""


@dataclass(frozen=True)
class LayerSpec:
    """What one cache layer needs to know: its plan, the model's hot tensors, the frozen balance ``[G, D]``."""

    plan: SitePlan
    controls: SiteControls
    balance: Tensor | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> LayerSpec:
        """A copied cache still obeys its model's settings."""
        return self


def rounded_capacity(keys: int, tile: int = layout.TILE) -> int:
    """Keys to allocate for ``keys`` keys: whole tiles, few different sizes."""
    tiles = max(1, layout.tiles_for(keys, tile))
    step = max(1, 1 << max(0, (tiles - 1).bit_length() - LENGTH_STEPS + 1))
    return -(-tiles // step) * step * tile


class _GrowableLayer(StaticLayer):  # type: ignore[misc]
    """Per-sequence tensors that follow every cache operation, and grow. Subclasses name them and say how to widen
    them."""

    is_compileable = True
    is_sliding = False
    is_croppable = True
    per_sequence: tuple[str, ...] = ()
    max_cache_len: int
    cumulative_length: Tensor

    def __init__(self, capacity: int, name: str) -> None:
        super().__init__(max_cache_len=capacity)
        self.name = name
        self.batch_size = -1
        # Upper bound of the length, kept on the host: growth can be decided without asking the device at each step.
        self._longest = 0

    def _allocate(self, batch: int, kv_heads: int, capacity: int) -> dict[str, Tensor]:
        """Fresh per-sequence tensors."""
        raise NotImplementedError

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate for the batch, heads and sizes of these keys ``[B, G, n, D]`` and values ``[B, G, n, Dv]``."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.batch_size, self.num_heads = key_states.shape[:2]
        self.k_head_dim, self.v_head_dim = key_states.shape[-1], value_states.shape[-1]
        self._check_device()
        self.cumulative_length = self.cumulative_length.to(self.device)
        self._install(self._allocate(self.batch_size, self.num_heads, self.max_cache_len))
        if not torch.compiler.is_compiling():
            torch._dynamo.mark_static_address(self.cumulative_length)
        self.is_initialized = True

    def _check_device(self) -> None:
        """Raise where something the layer needs is elsewhere."""

    def _install(self, tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            setattr(self, name, tensor)
            if not torch.compiler.is_compiling():
                torch._dynamo.mark_static_address(tensor)

    def admit(self, key_states: Tensor, value_states: Tensor) -> int:
        """Make ready for new rows; gives back how many. Nothing is overwritten before everything is checked.

        Raises:
            CacheError: Another batch size than the rows held, or more rows than a captured graph has room for.
        """
        rows = int(key_states.shape[-2])
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if key_states.shape[0] != self.batch_size:
            self._change_batch(key_states, value_states)
        if torch.compiler.is_compiling():
            if rows > self.max_cache_len:
                raise CacheError(
                    f"{rows} new tokens do not fit into a cache of {self.max_cache_len}",
                    where=self.name,
                    fix="call cache.ensure_capacity(tokens) before the compiled call",
                )
            return rows
        self._longest += rows
        if self._longest > self.max_cache_len:
            self._longest = int(self.cumulative_length) + rows
            if self._longest > self.max_cache_len:
                self.ensure_capacity(rounded_capacity(self._longest))
        return rows

    def _change_batch(self, key_states: Tensor, value_states: Tensor) -> None:
        if torch.compiler.is_compiling() or int(self.cumulative_length):
            raise CacheError(
                f"the cache holds {self.batch_size} sequences and {key_states.shape[0]} came",
                where=self.name,
                fix="one cache per batch, or cache.reset(), batch_select_indices(...), batch_repeat_interleave(...)",
            )
        self.lazy_initialization(key_states, value_states)

    def ensure_capacity(self, keys: int) -> None:
        """Grow to hold ``keys`` keys; contents are kept. The tensors move, so a compiled graph is made anew for the
        new size."""
        if keys <= self.max_cache_len:
            return
        self.max_cache_len = rounded_capacity(keys)
        if not self.is_initialized:
            return
        wider = self._allocate(self.batch_size, self.num_heads, self.max_cache_len)
        for name, tensor in wider.items():
            old = getattr(self, name)
            if old.shape == tensor.shape:
                tensor.copy_(old)
            else:
                tensor[:, :, : old.shape[2]] = old
        self._install(wider)

    def reset(self) -> None:
        """Forget all sequences; the memory and its addresses stay."""
        if self.is_initialized:
            for name in self.per_sequence:
                getattr(self, name).zero_()
        self.cumulative_length.zero_()
        self._longest = 0

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest tokens: a negative number counts those to remove, a positive one is the length to keep."""
        count = int(tokens_to_remove)
        if count > 0:
            self.cumulative_length.clamp_(max=count)
        elif count < 0:
            self.cumulative_length.sub_(-count).clamp_(min=0)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Sequence i becomes what sequence ``beam_idx[i]`` was, in place."""
        if self.is_initialized:
            for name in self.per_sequence:
                tensor = getattr(self, name)
                tensor.copy_(tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each sequence ``repeats`` times in a row."""
        if self.is_initialized:
            self._install({name: getattr(self, name).repeat_interleave(repeats, dim=0) for name in self.per_sequence})
            self.batch_size *= repeats

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences ``indices`` only."""
        if self.is_initialized:
            self._install({name: getattr(self, name)[indices].contiguous() for name in self.per_sequence})
            self.batch_size = int(getattr(self, self.per_sequence[0]).shape[0])

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values, scales included."""
        if not self.is_initialized:
            return 0
        tensors = [getattr(self, name) for name in self.per_sequence if name not in ("state", "stats")]
        return sum(t.numel() * t.element_size() for t in tensors)


class FloatLayer(_GrowableLayer):
    """Keys and values as they come, for a layer that LAMP leaves alone."""

    per_sequence = ("keys", "values")

    def _allocate(self, batch: int, kv_heads: int, capacity: int) -> dict[str, Tensor]:
        like: dict[str, Any] = {"dtype": self.dtype, "device": self.device}
        return {
            "keys": torch.zeros(batch, kv_heads, capacity, self.k_head_dim, **like),
            "values": torch.zeros(batch, kv_heads, capacity, self.v_head_dim, **like),
        }

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append rows; gives back all keys and values ``[B, G, capacity, D]``."""
        rows = self.admit(key_states, value_states)
        positions = torch.arange(rows, device=self.device) + self.cumulative_length
        self.keys.index_copy_(2, positions, key_states)
        self.values.index_copy_(2, positions, value_states)
        self.cumulative_length.add_(rows)
        return self.keys, self.values


class NestedLayer(_GrowableLayer):
    """One layer's planes, scales, guard state and statistics. ``keys`` and ``values`` stay None."""

    per_sequence = (*PLANES, "state", "stats")
    k_high: Tensor
    k_residual: Tensor
    k_scale: Tensor
    v_high: Tensor
    v_residual: Tensor
    v_scale: Tensor
    state: Tensor
    stats: Tensor

    def __init__(self, spec: LayerSpec, capacity: int) -> None:
        super().__init__(capacity, spec.plan.name)
        self.spec = spec
        # Looked up here, outside any graph.
        self._formats = formats.get(spec.plan.k_format), formats.get(spec.plan.v_format)

    @property
    def plan(self) -> SitePlan:
        """The site's row of the plan."""
        return self.spec.plan

    @property
    def controls(self) -> SiteControls:
        """The model's hot tensors for this site."""
        return self.spec.controls

    @property
    def balance(self) -> Tensor | None:
        """Divisor of the key channels ``[G, D]``."""
        return self.spec.balance

    def _check_device(self) -> None:
        tau = self.controls.tau
        if tau.shape[0] != self.num_heads:
            raise CacheError(
                f"a layer with {self.num_heads} kv heads, the cache was made for {tau.shape[0]}",
                where=self.name,
                fix="make the cache with `fast.lamp.cache()` of the model that uses it",
            )
        if tau.device != self.device:
            raise CacheError(
                f"keys on {self.device}, the compiled model's settings on {tau.device}",
                where=self.name,
                fix="move the model before lamp_compile.compile(model)",
            )

    def _allocate(self, batch: int, kv_heads: int, capacity: int) -> dict[str, Tensor]:
        tile = self.plan.tile
        lead = (batch, kv_heads, layout.tiles_for(capacity, tile))
        k_format, v_format = self._formats
        (k_high, k_residual), (v_high, v_residual) = (
            k_format.plane_widths(self.k_head_dim),
            v_format.plane_widths(self.v_head_dim),
        )

        def scales() -> Tensor:
            return torch.zeros(*lead[:2], lead[2] * tile, dtype=torch.float16, device=self.device)

        return {
            "k_high": torch.zeros(*lead, tile, k_high, dtype=k_format.plane_dtype, device=self.device),
            "k_residual": torch.zeros(*lead, tile, k_residual, dtype=k_format.plane_dtype, device=self.device),
            "k_scale": scales(),
            "v_high": torch.zeros(*lead, v_high, tile, dtype=v_format.plane_dtype, device=self.device),
            "v_residual": torch.zeros(*lead, v_residual, tile, dtype=v_format.plane_dtype, device=self.device),
            "v_scale": scales(),
            "state": guard.new_state(batch, kv_heads, self.device),
            "stats": guard.new_stats(batch, kv_heads, self.device),
        }

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[PlaneHandle, PlaneHandle]:
        """Quantise new rows ``[B, G, n, D]`` into the planes; gives back handles of all keys and values.

        Raises:
            CacheError: See ``admit``.
        """
        rows = self.admit(key_states, value_states)
        plan = self.plan
        k_high, k_residual, k_scale, v_high, v_residual, v_scale = torch.ops.lamp.quantize(
            key_states, value_states, self.balance,
            k_format=plan.k_format, v_format=plan.v_format, rotation=plan.rotation, tile=0, site=self.name,
        )  # fmt: skip
        positions = torch.arange(rows, device=self.device) + self.cumulative_length
        layout.write_keys(self.k_high, k_high, positions)
        layout.write_values(self.v_high, v_high, positions)
        if self.k_residual.shape[-1]:
            layout.write_keys(self.k_residual, k_residual, positions)
        if self.v_residual.shape[-2]:
            layout.write_values(self.v_residual, v_residual, positions)
        layout.write_scales(self.k_scale, k_scale, positions)
        layout.write_scales(self.v_scale, v_scale, positions)
        self.cumulative_length.add_(rows)
        return PlaneHandle(self, False, key_states.dtype), PlaneHandle(self, True, value_states.dtype)

    def attend(
        self, q: Tensor, mask: Tensor | None, bias: Tensor | None, sinks: Tensor | None,
        *, causal: str, window: int, scale: float, softcap: float,
    ) -> Tensor:  # fmt: skip
        """Attention of q ``[B, H, S, D]`` over the planes -> ``[B, H, S, Dv]``; the guard's state is written back in
        place."""
        plan, hot = self.plan, self.controls
        out: Tensor
        out, state, stats = torch.ops.lamp.attention.cached(
            q, self.k_high, self.k_residual, self.k_scale, self.v_high, self.v_residual, self.v_scale,
            hot.tau, hot.floor, hot.budget, self.state, self.stats, self.balance,
            mask, bias, sinks, None, self.cumulative_length.reshape(1), None,
            causal=causal, window=window, scale=scale, softcap=softcap, keys=self.max_cache_len,
            k_format=plan.k_format, v_format=plan.v_format, rotation=plan.rotation,
            rule=plan.rule, query_bits=plan.query_bits, subtile=plan.subtile,
            guard_window=plan.guard.window, guard_hold=plan.guard.hold, hysteresis=plan.guard.hysteresis,
            site=self.name,
        )  # fmt: skip
        self.state.copy_(state)
        self.stats.copy_(stats)
        return out
