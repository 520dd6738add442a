"""Shadow steps: a share of steps also runs without approximation, and the difference is the true error.

The exact path attends, with softmax in float32 and the query as it is, over the best copy of keys and values that
exists. What that is decides what the error includes:

* ``exact copies``: the plan has ``exact_tier="host"``; everything that LAMP does to attention is in the error.
* ``16-bit planes``: the site stores bf16 or fp16.
* ``both planes``: keys and values read back at 8 bits. In the error are the choice of sub-tiles, the high plane, the
  rounding of queries and of softmax weights; the rounding of storage to 8 bits is not.

Keys and values of earlier tokens are those that LAMP computed; the error is that of this step.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lamp_compile.ir import Precision
from lamp_compile.runtime import formats, layout

if TYPE_CHECKING:
    from lamp_compile.runtime.cache_layers import NestedLayer

COPIES, SIXTEEN, PLANES = "exact copies", "16-bit planes", "both planes"
SCORES = (
    "causal", "window", "scale", "softcap", "keys", "k_format", "v_format", "rotation", "subtile", "site",
)  # fmt: skip
_measuring: ContextVar[Measure | None] = ContextVar("lamp_shadow", default=None)


def current() -> Measure | None:
    """The shadow step that is being measured, if one is."""
    return _measuring.get()


class Schedule:
    """Which steps are shadowed: one in each stretch of 1 / share steps, at a place drawn from a seeded generator, so
    that it cannot keep time with the work.

    Args:
        share: Of all steps, 0 to 1.
        seed: Of the places.
    """

    def __init__(self, share: float, seed: int = 0) -> None:
        self.share, self._draws = share, random.Random(seed)
        self._step = self._stretch = 0
        self._next = self._place(0)

    def _place(self, least: int) -> int:
        if self.share <= 0.0:
            return 0
        return max(least, int((self._stretch + self._draws.random()) / self.share))

    def due(self) -> bool:
        """Whether the next step is one. Each call is a step."""
        now = self._step
        self._step += 1
        if self.share <= 0.0 or now < self._next:
            return False
        self._stretch += 1
        self._next = self._place(now + 1)
        return True


@dataclass
class SiteError:
    """The true relative error of one site's output in shadow steps."""

    basis: str
    rows: int = 0
    square: float = 0.0
    """Sum over rows of the squared relative error."""
    largest: float = 0.0
    over_budget: int = 0
    """Rows beyond the guard's budget, those that are not finite included."""
    nonfinite: int = 0
    """Rows that are not finite on either way; they stay out of the sums."""


class ShadowTally:
    """What all shadow steps of a model found."""

    def __init__(self) -> None:
        self.steps = self.positions = self.agreeing = 0
        self.kl = self.largest_kl = 0.0
        self.nonfinite = 0
        self.sites: dict[str, SiteError] = {}

    def add_logits(self, exact: Tensor, lamp: Tensor) -> None:
        """Compare next-token logits ``[n, V]``."""
        ref, new = exact.float().log_softmax(-1), lamp.float().log_softmax(-1)
        kl = (ref.exp() * (ref - new)).sum(-1).double()
        sound = kl.isfinite()
        counts = torch.stack(
            ((ref.argmax(-1) == new.argmax(-1)).sum().double(), kl[sound].sum(), (~sound).sum().double())
        )
        same, total, bad = counts.tolist()
        self.positions += exact.shape[0]
        self.agreeing += int(same)
        self.nonfinite += int(bad)
        self.kl += max(0.0, total)
        if bool(sound.any()):
            self.largest_kl = max(self.largest_kl, float(kl[sound].max()))

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: steps, positions, agreement, mean and largest KL in nats, and by site the true relative error."""
        sites = {}
        for name, site in self.sites.items():
            rows = site.rows - site.nonfinite
            rms = (site.square / rows) ** 0.5 if rows > 0 else 0.0
            kept = {key: value for key, value in asdict(site).items() if key != "square"}
            sites[name] = {**kept, "error": rms}
        compared = self.positions - self.nonfinite
        return {
            "steps": self.steps,
            "positions": self.positions,
            "agreement": self.agreeing / self.positions if self.positions else None,
            "kl": self.kl / compared if compared else None,
            "largest_kl": self.largest_kl if compared else None,
            "nonfinite": self.nonfinite,
            "sites": sites,
        }


class Measure:
    """One shadow step: at each site both ways on the same query; the exact one goes on to the next layer."""

    def __init__(self) -> None:
        self._found: list[tuple[NestedLayer, str, Tensor]] = []

    def attend(
        self, layer: NestedLayer, q: Tensor, seen: tuple[Tensor | None, ...], options: Mapping[str, Any]
    ) -> Tensor:
        """Exact attention of q ``[B, H, S, D]`` over a layer -> ``[B, H, S, Dv]``; LAMP's is compared and dropped."""
        # A layer's floor levels change in a step: LAMP's way runs first, as it would.
        lamp = layer._run(q, seen, dict(options))
        basis, exact = exact_attention(layer, q, seen, options)
        size = exact.double().square().sum(-1)
        wrong = (lamp.double() - exact.double()).square().sum(-1)
        budget = layer.controls.budget.double().square().repeat_interleave(q.shape[1] // layer.num_heads)
        square = torch.where(size > 0, wrong / size.clamp_min(1e-300), 0.0)
        lost = ~square.isfinite()
        over = (square > budget[None, :, None]) | lost
        square = square.masked_fill(lost, 0.0)
        numbers = ((size != 0).sum(), square.sum(), square.amax(), over.sum(), lost.sum())
        self._found.append((layer, basis, torch.stack([x.double() for x in numbers])))
        return exact

    def finish(self, tally: ShadowTally) -> list[str]:
        """Add what was found; gives back the sites whose error in this step exceeds their guard's budget. Waits for the
        device, once."""
        if not self._found:
            return []
        loud = []
        for (layer, basis, _), (rows, square, most, over, lost) in zip(
            self._found, torch.stack([found for *_, found in self._found]).tolist(), strict=True
        ):
            site = tally.sites.setdefault(layer.name, SiteError(basis))
            site.basis = basis
            site.rows += int(rows)
            site.square += square
            site.largest = max(site.largest, most**0.5)
            site.over_budget += int(over)
            site.nonfinite += int(lost)
            if lost or (rows and square / rows > float(layer.controls.budget.max()) ** 2):
                loud.append(layer.name)
        tally.steps += 1
        return loud


@contextmanager
def measuring(measure: Measure) -> Iterator[None]:
    """Within the block, layers of our cache run both ways."""
    token = _measuring.set(measure)
    try:
        yield
    finally:
        _measuring.reset(token)


def exact_attention(
    layer: NestedLayer, q: Tensor, seen: tuple[Tensor | None, ...], options: Mapping[str, Any]
) -> tuple[str, Tensor]:
    """The best that a layer can do, and what that rests on (see above).

    Args:
        layer: With the step's rows in it.
        q: ``[B, H, S, D]``.
        seen: mask, bias, sinks, start, lengths, block table.
        options: The keyword arguments of ``lamp::attention.cached``.
    """
    table = seen[-1]
    tiles = layer.k_high.shape[2] if table is None else table.shape[1]
    count = tiles * (layout.tile_of(layer.k_high) // int(options["subtile"]))
    basis, level, k, v = PLANES, Precision.BOTH, None, None
    if layer.has_exact:
        basis, level = COPIES, Precision.EXACT
        k, v = layer.exact_rows()
    elif not any(formats.get(options[name]).residual_bits for name in ("k_format", "v_format")):
        basis = SIXTEEN if layer.plan.k_format in ("bf16", "fp16") else f"{layer.plan.k_format} planes"
    shape = (q.shape[0], layer.num_heads, q.shape[2], count)
    levels = torch.full(shape, int(level), dtype=torch.uint8, device=q.device)
    out: Tensor = torch.ops.lamp.attend(
        q, *layer.planes, levels, k, v, layer.balance, *seen, query_bits=0, **{name: options[name] for name in SCORES}
    )[0]
    return basis, out
