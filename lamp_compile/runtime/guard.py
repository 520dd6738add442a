"""The fallback guard: accumulates the certificate per slot and kv head, and raises the floor level when it exceeds
its budget.

Functional: ``step`` takes state and statistics and returns new ones; the caller writes them back. It acts from the next
attention on.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lamp_compile.ir import Floor, Precision
from lamp_compile.runtime import certificate as certificates

ERROR, FLOOR, HOLD, FLAGS = range(4)
"""Fields of the state, float32 ``[B, G, 4]``: mean squared relative error over the window, floor level raised by the
guard, steps left to hold it, sticky flags."""
STATE_FIELDS = 4

NONFINITE = 1
"""Flag: a NaN or infinity was seen in an output or a certificate."""
EXACT_MISSING = 2
"""Flag: level 2 was called for and the site has no exact keys and values; both planes are used."""

STEPS, LIVE, REFINED, EXACT, RAISED, LOWERED, BAD = range(7)
"""Fields of the statistics, int64 ``[B, G, 7]``: steps; live sub-tiles, of these refined, of these exact; and every
change of the floor by its reason: raised because over budget, lowered by hysteresis, steps with a non-finite output
(each sets the floor to ``Floor.EXACT``)."""
STATS_FIELDS = 7


def new_state(batch: int, kv_heads: int, device: torch.device | str = "cpu") -> Tensor:
    """A fresh state ``[B, G, 4]``."""
    return torch.zeros(batch, kv_heads, STATE_FIELDS, dtype=torch.float32, device=device)


def new_stats(batch: int, kv_heads: int, device: torch.device | str = "cpu") -> Tensor:
    """Fresh statistics ``[B, G, 7]``."""
    return torch.zeros(batch, kv_heads, STATS_FIELDS, dtype=torch.int64, device=device)


def step(
    out: Tensor,
    lse: Tensor,
    certificate: Tensor,
    levels: Tensor,
    state: Tensor,
    stats: Tensor,
    floor: Tensor,
    budget: Tensor,
    *,
    window: int,
    hold: int,
    hysteresis: float,
    exact: bool,
) -> tuple[Tensor, Tensor]:
    """One step of the guard.

    The squared relative error (estimate / |out|)^2, its mean over the live rows of a kv head, enters a running mean
    over ``window`` steps. Above ``budget^2`` the floor rises by one level and is held for ``hold`` steps, and the mean
    starts anew; below ``(hysteresis * budget)^2``, once held, it sinks by one. A non-finite row raises it to
    ``Floor.EXACT`` at once.

    Args:
        out: ``[B, H, S, Dv]``.
        lse: ``[B, H, S]``; rows at -inf saw no key and stay out.
        certificate: ``[B, H, S, 3]``.
        levels: ``[B, G, S, T]``, for the statistics.
        state: ``[B, G, 4]``, or ``[1, G, 4]`` where slots have no identity (a graph without a cache): the batch is
            then pooled.
        stats: ``[B, G, 7]`` or ``[1, G, 7]``, like state.
        floor: The floor set from outside, ``[G]`` or ``[B, G]``.
        budget: Relative error allowed, ``[G]`` or ``[B, G]``; infinity switches the guard off.
    """
    kv_heads = state.shape[1]
    pooled = state.shape[0] == 1 and out.shape[0] > 1
    error, stepped, bad = _evidence(out, lse, certificate, kv_heads, pooled)

    mean = state[..., ERROR] + (error - state[..., ERROR]) / window
    held = (state[..., HOLD] - 1).clamp_min(0.0)
    level = state[..., FLOOR]
    limit = budget.reshape(-1, kv_heads).float().square()
    over = (mean > limit) & stepped
    under = (mean < hysteresis * hysteresis * limit) & (held == 0) & (level > 0) & ~over & stepped
    raised = torch.where(over, (level + 1).clamp_max(float(Floor.EXACT)), torch.where(under, level - 1, level))
    raised = torch.where(bad, float(Floor.EXACT), raised)
    changed = over | bad
    effective = torch.maximum(raised, floor.reshape(-1, kv_heads).float())
    flags = _set(state[..., FLAGS], bad, NONFINITE)
    flags = _set(flags, (effective >= Floor.EXACT) & (not exact), EXACT_MISSING)
    new_state = torch.stack(
        (torch.where(changed, 0.0, mean), raised, torch.where(changed, float(hold), held), flags), dim=-1
    )
    new_state = torch.where((stepped | bad)[..., None], new_state, state)
    counts = torch.stack(
        (
            stepped,
            *_tile_counts(levels, pooled),
            (raised > level) & ~bad,
            raised < level,
            bad,
        ),
        dim=-1,
    )
    return new_state, stats + counts.to(torch.int64)


def _evidence(
    out: Tensor, lse: Tensor, certificate: Tensor, kv_heads: int, pooled: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Of this step, per slot and kv head ``[B, G]``: mean squared relative error of its finite live rows, whether any
    row was live, whether any was not finite."""
    seen = lse != -torch.inf
    finite = out.isfinite().all(-1) & certificate.isfinite().all(-1) & ~lse.isnan() & (lse != torch.inf)
    square = certificates.estimate(out.float(), certificate).square()
    size = out.float().square().sum(-1)
    relative = torch.where(seen & finite, square / size.clamp_min(torch.finfo(torch.float32).tiny), 0.0)
    rows = _pool((seen & finite).float(), kv_heads, pooled).clamp_min(1.0)
    error = _pool(relative, kv_heads, pooled) / rows
    bad = _pool((seen & ~finite).float(), kv_heads, pooled) > 0
    return error, _pool(seen.float(), kv_heads, pooled) > 0, bad


def flag_names(flags: int) -> list[str]:
    """The sticky flags in words, for reports."""
    names = {
        NONFINITE: "a NaN or infinity reached the output",
        EXACT_MISSING: "level 2 was called for without an exact tier; both planes are used",
    }
    return [text for bit, text in names.items() if int(flags) & bit]


def _pool(x: Tensor, kv_heads: int, pooled: bool) -> Tensor:
    """``[B, H, S]`` -> sums ``[B, G]`` (or ``[1, G]``)."""
    summed = x.reshape(x.shape[0], kv_heads, -1).sum(-1)
    return summed.sum(0, keepdim=True) if pooled else summed


def _set(flags: Tensor, where: Tensor, bit: int) -> Tensor:
    """Set a sticky bit in flags that are stored as small whole floats."""
    return torch.where(where & (torch.floor(flags / bit) % 2 == 0), flags + bit, flags)


def _tile_counts(levels: Tensor, pooled: bool) -> tuple[Tensor, Tensor, Tensor]:
    def count(where: Tensor) -> Tensor:
        total = where.sum((2, 3))
        return total.sum(0, keepdim=True) if pooled else total

    return count(levels > Precision.SKIP), count(levels >= Precision.BOTH), count(levels == Precision.EXACT)
