"""The layers of ``NestedCache``: planes where LAMP acts, float tensors where it does not.

One tensor per layer and plane: views of one big tensor cost Inductor full copies.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from lamp_compile.errors import CacheError
from lamp_compile.plan import SitePlan
from lamp_compile.runtime import checks, formats, guard, kernels, layout, prompt, shadow
from lamp_compile.runtime.allocation import zeros
from lamp_compile.runtime.attend_in_parts import attend_in_parts
from lamp_compile.runtime.controls import SiteControls
from lamp_compile.runtime.fused_ops import inference_only, settings  # importing it registers torch.ops.lamp
from lamp_compile.runtime.growable_layer import GrowableLayer
from lamp_compile.runtime.ledger import Ledger
from lamp_compile.runtime.plane_handle import PlaneHandle

PLANES = ("k_high", "k_residual", "k_scale", "v_high", "v_residual", "v_scale")


@dataclass(frozen=True)
class LayerShape:
    """Sizes of one layer's keys and values, known before the first of them comes."""

    kv_heads: int
    head_dim: int
    value_dim: int
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True)
class LayerSpec:
    """What one cache layer needs to know: its plan, the model's hot tensors, the frozen balance ``[G, D]``."""

    plan: SitePlan
    controls: SiteControls
    balance: Tensor | None = None
    launch: str = ""
    """How kernels cut the work (``plan.LaunchPlan.text``)."""
    ledger: Ledger = field(default_factory=Ledger)
    """Where the model's counters are kept."""
    network: Any = None
    """The gate that predicts this site's importance (``network.layer.SiteNetwork``); None looks ahead exactly."""
    shape: LayerShape | None = None
    """Of the keys and values that the model was seen to make; None where that is not known."""

    def __deepcopy__(self, memo: dict[int, Any]) -> LayerSpec:
        """A copied cache still obeys its model's settings."""
        return self


class FloatLayer(GrowableLayer):
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


class NestedLayer(GrowableLayer):
    """One layer's planes, scales, guard state and statistics. ``keys`` and ``values`` stay None."""

    per_sequence: tuple[str, ...] = (*PLANES, "state", "stats")
    reference_only = False
    """Attend by the reference everywhere: there every query decides for itself, in kernels those of a forward may share
    decisions."""
    has_exact = False
    """Whether level 2 finds keys and values as they came."""
    k_high: Tensor
    k_residual: Tensor
    k_scale: Tensor
    v_high: Tensor
    v_residual: Tensor
    v_scale: Tensor
    state: Tensor
    stats: Tensor
    by_kernel: bool
    """Whether a kernel stores new rows; found when the planes are made, outside any graph."""

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

    @property
    def planes(self) -> tuple[Tensor, ...]:
        """The six tensors of keys and values, in the operators' order."""
        return (self.k_high, self.k_residual, self.k_scale, self.v_high, self.v_residual, self.v_scale)

    def _install(self, tensors: dict[str, Tensor]) -> None:
        super()._install(tensors)
        if not tensors:
            return
        plan = self.plan
        reason = kernels.why_not_store(self.planes, plan.k_format, plan.v_format, self.dtype)
        self.by_kernel = reason is None and self.dtype in checks.DTYPES

    def _check_device(self) -> None:
        tau = self.controls.tau
        if tau.shape[0] != self.num_heads:
            raise CacheError(
                f"a layer with {self.num_heads} kv heads, the cache was made for {tau.shape[0]}",
                where=self.name,
                fix="make the cache with `fast.lamp.cache()` of the model that uses it",
            )
        for tensor in (tau, self.balance):
            if tensor is not None and tensor.device != self.device:
                raise CacheError(
                    f"keys on {self.device}, the compiled model's settings on {tensor.device}",
                    where=self.name,
                    fix="move the model before lamp_compile.compile(model)",
                )
        checks.balance(self.name, self.balance, self.num_heads, self.k_head_dim, self.batch_size)
        if not torch.compiler.is_compiling():
            kernels.prepare(self.device, self.plan.rotation, self.k_head_dim, self.v_head_dim)

    def _allocate(self, batch: int, kv_heads: int, capacity: int) -> dict[str, Tensor]:
        tile = self.plan.tile
        lead = (batch, kv_heads, layout.tiles_for(capacity, tile))
        k_format, v_format = self._formats
        (k_high, k_residual), (v_high, v_residual) = (
            k_format.plane_widths(self.k_head_dim),
            v_format.plane_widths(self.v_head_dim),
        )
        lanes = self._by_lanes(k_high, v_high)
        keys = [(*lead, *layout.key_shape(tile, width, lanes)) for width in (k_high, k_residual)]
        values = [(*lead, *layout.value_shape(tile, width, lanes)) for width in (v_high, v_residual)]
        scales = ((*lead[:2], lead[2] * tile), torch.float16)
        return zeros(
            {
                "k_high": (keys[0], k_format.plane_dtype),
                "k_residual": (keys[1], k_format.plane_dtype),
                "k_scale": scales,
                "v_high": (values[0], v_format.plane_dtype),
                "v_residual": (values[1], v_format.plane_dtype),
                "v_scale": scales,
                "state": ((batch, kv_heads, guard.STATE_FIELDS), torch.float32),
                "stats": ((batch, kv_heads, guard.STATS_FIELDS), torch.int64),
            },
            self.device,
            apart=("state", "stats"),  # the ledger reads them when the cache is gone
        )

    def _by_lanes(self, k_width: int, v_width: int) -> bool:
        """Whether planes of these widths lie by lanes: where a CPU's kernels read them, and those faster. A cache that
        grows stays as it is."""
        if self.is_initialized:
            return layout.by_lanes(self.k_high)
        plan = self.plan
        return (
            self.device.type == "cpu"
            and plan.k_format == plan.v_format == kernels.FORMAT
            and plan.rule in kernels.RULES
            and plan.query_bits == 8
            and self.dtype != torch.float64
            and 2 * max(k_width, v_width) <= kernels.LARGEST_DIM
            and layout.lanes_fit(plan.tile, k_width, v_width)
            and kernels.cpu.by_lanes()
        )

    def exact_rows(self) -> tuple[Tensor, Tensor]:
        """Keys ``[B, G, held, D]`` and values as they came, where ``has_exact``."""
        raise NotImplementedError

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[PlaneHandle, PlaneHandle]:
        """Quantise new rows ``[B, G, n, D]`` into the planes; gives back handles of all keys and values.

        Raises:
            CacheError: See ``admit``.
        """
        # A graph must not look at what the host counts: it would be made anew when that changes.
        compiling = torch.compiler.is_compiling()
        fresh = not compiling and prompt.is_one(self, key_states, value_states, self._longest == 0)
        rows = self.admit(key_states, value_states)
        plan = self.plan
        if self.by_kernel:
            self._append(key_states, value_states, self._position(), None)
            self.cumulative_length.add_(rows)
            return self._handles(PlaneHandle, key_states, value_states, fresh)
        k_high, k_residual, k_scale, v_high, v_residual, v_scale = torch.ops.lamp.quantize(
            key_states, value_states, self.balance,
            k_format=plan.k_format, v_format=plan.v_format, rotation=plan.rotation, tile=0, site=self.name,
        )  # fmt: skip
        positions = torch.arange(rows, device=self.device) + self.cumulative_length
        layout.write_keys(self.k_high, k_high, positions)
        layout.write_values(self.v_high, v_high, positions)
        if k_residual.shape[-1]:
            layout.write_keys(self.k_residual, k_residual, positions)
        if v_residual.shape[-1]:
            layout.write_values(self.v_residual, v_residual, positions)
        layout.write_scales(self.k_scale, k_scale, positions)
        layout.write_scales(self.v_scale, v_scale, positions)
        self.cumulative_length.add_(rows)
        return self._handles(PlaneHandle, key_states, value_states, fresh)

    def _append(self, k: Tensor, v: Tensor, positions: Tensor, table: Tensor | None) -> None:
        """Store rows by ``lamp::append``. On GPUs, outside graphs, rows that are just what the planes were made for go
        to the kernel at once: a prompt passes here once a layer, and dispatch and checks take as long as the launch."""
        plan = self.plan
        if not torch.compiler.is_compiling() and k.is_cuda and self.by_kernel and self._expects(k, v):
            kernels.append(k, v, self.planes, self.balance, positions, table, plan.rotation)
            return
        torch.ops.lamp.append(
            k, v, *self.planes, self.balance, positions, table, plan.k_format, plan.v_format, plan.rotation, self.name
        )

    def _expects(self, k: Tensor, v: Tensor) -> bool:
        """Whether these are plain tensors of the sizes, dtype and device that the layer was laid out for, and nobody
        looks at operators."""
        batch, kv_heads, rows, dim = k.shape
        return (
            type(k) is type(v) is Tensor
            and (batch, kv_heads, dim) == (self.batch_size, self.num_heads, self.k_head_dim)
            and rows > 0
            and v.shape == (batch, kv_heads, rows, self.v_head_dim)
            and k.dtype == v.dtype == self.dtype
            and k.device == v.device == self.device
            and not is_in_torch_dispatch_mode()
        )

    def _handles(self, kind: type[PlaneHandle], k: Tensor, v: Tensor, fresh: bool) -> tuple[PlaneHandle, PlaneHandle]:
        """Of all keys and values, after these rows were stored; ``fresh``: they are all, for attention to read."""
        return kind(self, False, k.dtype, k if fresh else None), kind(self, True, v.dtype, v if fresh else None)

    def reset(self) -> None:
        """Forget all sequences; what was counted of them stays in the model's ledger."""
        if self.is_initialized:
            self.spec.ledger.retire([(self.name, self.stats)])
        super().reset()

    def _position(self) -> Tensor:
        """Where the next row goes ``[1]``. In a graph it is computed: AOTInductor takes a view of a buffer that is all
        zeros when a program is compiled for a constant."""
        if torch.compiler.is_compiling():
            return torch.arange(1, device=self.device) + self.cumulative_length
        return self.cumulative_length.reshape(1)

    def attend(
        self, q: Tensor, mask: Tensor | None, bias: Tensor | None, sinks: Tensor | None,
        *, causal: str, window: int, scale: float, softcap: float,
    ) -> Tensor:  # fmt: skip
        """Attention of q ``[B, H, S, D]`` over the planes -> ``[B, H, S, Dv]``; the guard's state is written back in
        place."""
        seen = (mask, bias, sinks, None, self.cumulative_length.reshape(1), None)
        return self._attend(q, seen, causal=causal, window=window, scale=scale, softcap=softcap)

    def _attend(self, q: Tensor, seen: tuple[Tensor | None, ...], **how: Any) -> Tensor:
        """``seen`` as of ``runtime/ops.py``. Where a shadow step is measured, the exact path runs beside."""
        plan = self.plan
        options: dict[str, Any] = dict(
            **how, keys=self.max_cache_len,
            k_format=plan.k_format, v_format=plan.v_format, rotation=plan.rotation,
            rule=plan.rule, query_bits=plan.query_bits, subtile=plan.subtile,
            guard_window=plan.guard.window, guard_hold=plan.guard.hold, hysteresis=plan.guard.hysteresis,
            site=self.name, launch=self.spec.launch,
        )  # fmt: skip
        if not torch.compiler.is_compiling() and (measure := shadow.current()) is not None:
            return measure.attend(self, q, seen, options)
        return self._run(q, seen, options)

    def _run(self, q: Tensor, seen: tuple[Tensor | None, ...], options: dict[str, Any]) -> Tensor:
        """Call the operator for attention: the fused one where a kernel serves it; in a graph always the meeting point,
        which the passes expand and fuse."""
        controls = self.controls
        hot = (controls.tau, controls.floor, controls.budget, self.state, self.stats)
        out: Tensor
        if self.reference_only:
            out, state, stats = attend_in_parts(q, self.planes, hot, (self.balance, *seen), options)
        elif torch.compiler.is_compiling() or kernels.why_not_attend(q, self.planes, self.state, options) is not None:
            out, state, stats = torch.ops.lamp.attention.cached(q, *self.planes, *hot, self.balance, *seen, **options)
        else:
            return inference_only(
                torch.ops.lamp.fused_attention(q, *self.planes, *hot, self.balance, *seen, *settings(options)), q
            )
        self.state.copy_(state)
        self.stats.copy_(stats)
        return out
