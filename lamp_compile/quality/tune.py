"""Which way of cutting the kernels' work is fastest for a shape on this device, and whether it beats bf16 there.

Planes are random and a given share of the sub-tiles is refined; the cut changes the order of sums, no more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lamp_compile.errors import InputError
from lamp_compile.launch_plan import LaunchPlan
from lamp_compile.plan import SitePlan
from lamp_compile.quality.timing import milliseconds
from lamp_compile.runtime import fused_ops as _fused_ops  # noqa: F401  (registers torch.ops.lamp)
from lamp_compile.runtime import guard, kernels, layout

CHOICES: dict[str, tuple[int, ...]] = {
    "programs": (4, 8, 12, 16),
    "stages": (2, 3, 4),
    "most_finished": (0, 128, 1024),
    "most_paired": (0, 128, 1024),
    "paired_programs": (4, 5, 6),
    "refine_programs": (4, 8, 12, 16),
    "refine_stages": (2, 3),
    "merge_chunk": (16, 64, 256),
    "most_splits": (64, 128),
    "most_segments": (32, 50, 64, 128),
    "dependent": (0, 1),
}
"""What is tried of each field, one field after the other."""
GAIN = 0.99
"""Another choice is taken when it needs less than this share of the time: less is noise."""
CACHE, MOST_COPIES = 128 << 20, 16
"""Bytes that no GPU's cache holds, and copies of small planes made to have as many."""
SHARE = 0.1
"""Refined share where none is given: what the default plan refines on real text."""


@dataclass(frozen=True)
class Shape:
    """Attention of one new token over ``length`` cached ones, in ``batch`` sequences."""

    batch: int
    length: int
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int

    @property
    def name(self) -> str:
        """As ``--case`` takes it."""
        return f"{self.batch}x{self.length}"


@dataclass(frozen=True)
class Tuned:
    """One shape's outcome, in milliseconds: the defaults, the best cut, bf16 SDPA."""

    shape: Shape
    default_ms: float
    best_ms: float
    bf16_ms: float
    launch: LaunchPlan

    @property
    def ratio(self) -> float:
        """How many times as fast as bf16 SDPA without a mask."""
        return self.bf16_ms / self.best_ms


class Bench:
    """Planes of one shape on a device, and the time of attention over them.

    Args:
        shape: What to measure.
        site: A row of the plan: rule, format, sub-tile.
        device: Where; kernels must run there (or ``measure`` times the reference).
        share: Refined share of the sub-tiles.
        repeats: Timings of which the median counts.
    """

    def __init__(self, shape: Shape, site: SitePlan, device: torch.device, share: float = SHARE, repeats: int = 15):
        self.shape, self.site, self.device, self.repeats = shape, site, device, repeats
        self.q = torch.randn(shape.batch, shape.heads, 1, shape.head_dim, device=device).bfloat16()
        self.lengths = torch.full((1,), shape.length, dtype=torch.int64, device=device)
        self.planes = self._planes()
        # Copies in turn, so that no case is measured out of the cache that a model's other layers would have emptied.
        held = sum(plane.nbytes for plane in self.planes)
        self.copies = min(MOST_COPIES, -(-CACHE // held)) if device.type == "cuda" else 1
        tau = self._tau(share)
        heads = shape.kv_heads
        self.hot = (
            torch.full((heads,), tau, device=device), torch.zeros(heads, device=device),
            torch.full((heads,), 1e9, device=device), guard.new_state(shape.batch, heads, device),
            guard.new_stats(shape.batch, heads, device),
        )  # fmt: skip

    def why_not(self) -> str | None:
        """Why no kernel attends to these planes, or None."""
        options = {**self._common(), "v_format": self.site.v_format}
        return kernels.why_not_attend(self.q, self.planes, self.hot[3], options)

    def milliseconds(self, launch: LaunchPlan) -> float:
        """Attention over the planes, cut this way."""
        sets = [self.planes, *(tuple(p.clone() for p in self.planes) for _ in range(self.copies - 1))]
        return milliseconds([partial(self._attend, launch, planes) for planes in sets], self.repeats, self.device)

    def bf16_milliseconds(self) -> float:
        """SDPA over bf16 keys and values, without a mask."""
        shape = self.shape
        lead = (shape.batch, shape.kv_heads, shape.length)

        def calls() -> Iterator[Callable[[], Tensor]]:
            for _ in range(self.copies):
                k, v = (
                    torch.randn(*lead, dim, device=self.device, dtype=torch.bfloat16)
                    for dim in (shape.head_dim, shape.value_dim)
                )
                yield partial(F.scaled_dot_product_attention, self.q, k, v, enable_gqa=True)

        return milliseconds([*calls()], self.repeats, self.device)

    def _attend(self, launch: LaunchPlan, planes: tuple[Tensor, ...]) -> Tensor:
        site = self.site
        out: Tensor = torch.ops.lamp.fused_attention(
            self.q, *planes, *self.hot, None, None, None, None, None, self.lengths, None, **self._common(),
            v_format=site.v_format, guard_window=site.guard.window, guard_hold=site.guard.hold,
            hysteresis=site.guard.hysteresis, launch=launch.text(),
        )  # fmt: skip
        return out

    def _common(self) -> dict[str, Any]:
        site = self.site
        return dict(
            causal="bottom_right", window=0, scale=None, softcap=0.0, keys=self.shape.length, k_format=site.k_format,
            rotation=site.rotation, rule=site.rule, query_bits=site.query_bits, subtile=site.subtile, site="tune",
        )  # fmt: skip

    def _planes(self) -> tuple[Tensor, ...]:
        """Of one random sequence, once for each."""
        shape, site = self.shape, self.site
        k, v = (
            torch.randn(1, shape.kv_heads, shape.length, dim, device=self.device)
            for dim in (shape.head_dim, shape.value_dim)
        )
        made = torch.ops.lamp.quantize(
            k, v, None, k_format=site.k_format, v_format=site.v_format, rotation=site.rotation, tile=site.tile,
            site="tune",
        )  # fmt: skip
        return tuple(plane.expand(shape.batch, *plane.shape[1:]).contiguous() for plane in made)

    def _tau(self, share: float) -> float:
        """The threshold above which this share of the first sequence's sub-tiles lies."""
        importance = torch.ops.lamp.look_ahead(
            self.q[:1], self.planes[0][:1], self.planes[2][:1], None, None, None, None, None, self.lengths, None,
            **self._common(),
        )  # fmt: skip
        live = importance[importance >= 0].sort().values
        return float(live[min(len(live) - 1, int((1 - share) * len(live)))])


def nothing_on(device: torch.device) -> str | None:
    """Why there is nothing to tune on a device, or None."""
    if reason := kernels.why_not_model(device):
        return reason
    return None if kernels.target_name(device) else "kernels for CPUs cut their work by shapes alone"


def tune(bench: Bench, progress: Callable[[str], None] = lambda text: None) -> Tuned:
    """Try the choices one field after the other, keeping what is faster.

    Raises:
        InputError: No kernel runs on that device.
    """
    if reason := nothing_on(bench.device) or bench.why_not():
        raise InputError(f"nothing to tune: {reason}", where=f"device {bench.device}", fix="a CUDA or ROCm device")
    best = LaunchPlan()
    default = time_of_best = bench.milliseconds(best)
    for candidate in candidates(best):
        changed = replace(best, **candidate)
        if changed == best:
            continue
        found = bench.milliseconds(changed)
        progress(f"{bench.shape.name} {candidate}: {found:.4f} ms")
        if found < GAIN * time_of_best:
            best, time_of_best = changed, found
    return Tuned(bench.shape, default, time_of_best, bench.bf16_milliseconds(), best)


def candidates(start: LaunchPlan) -> Iterator[dict[str, int]]:
    """One field at a time."""
    for name, values in CHOICES.items():
        for value in values:
            if value != getattr(start, name):
                yield {name: value}


def check_length(length: int) -> None:
    """Raise InputError unless keys of this length fill whole tiles."""
    if length % layout.SUBTILE:
        raise InputError(f"a length of {length}", where="--case", fix=f"a multiple of {layout.SUBTILE}")
