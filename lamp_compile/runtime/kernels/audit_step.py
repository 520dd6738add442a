"""Last launch at a site with a look-ahead network: the audit of what was predicted (``network/audit.py``), and then the
fallback guard, once per sequence and kv head, in place. The audit's evidence are the energies that the
look-ahead and the refinement have written of what they read."""

from __future__ import annotations

import triton
import triton.language as tl

from lamp_compile.runtime.kernels._device import LOG2E, key_range, wait_for_launch
from lamp_compile.runtime.kernels.merge import guard_step
from lamp_compile.runtime.kernels.predict import sequence_length, skip_threshold


@triton.jit
def importance_of(ENERGY, lead, tile, read, lse, GP: tl.constexpr):
    """The importance of sub-tiles by what was read of them: the most of all rows, and whether it is a number."""
    rows = tl.arange(0, GP)
    energy = tl.load(ENERGY + (lead + tile)[:, None] * GP + rows[None, :], mask=read, other=float("-inf"))
    seen = read & ((lse == float("-inf")) == 0)[None, :]  # a row that sees no key has no importance
    found = tl.where(seen, tl.exp2(energy - lse[None, :]), 0.0)
    return tl.max(found, 1), tl.max((found != found).to(tl.int32), 1) == 0


@triton.jit
def with_flag(flags, where, bit: tl.constexpr):
    """``guard._set``."""
    return tl.where(where & (tl.floor(flags / bit) % 2.0 == 0.0), flags + bit, flags)


@triton.jit
def trust_step(TRUST, excess, expense, stepped, limit, too_long, raised, broken, HOLD: tl.constexpr,
               AUDIT_WINDOW: tl.constexpr, LAVISH: tl.constexpr, MOST_EXCESS: tl.constexpr):  # fmt: skip
    """The end of ``audit.arbitrate`` for one row, which was judged by what was known before it."""
    held = tl.load(TRUST + 2)
    believed = (held == 0.0) & (too_long == 0) & (raised == 0)
    excess_mean, expense_mean = tl.load(TRUST), tl.load(TRUST + 1)
    excess_mean += (excess - excess_mean) / AUDIT_WINDOW
    expense_mean += (expense - expense_mean) / AUDIT_WINDOW
    missed = (excess_mean > tl.minimum(limit, MOST_EXCESS)) & believed
    lavish = (expense_mean > LAVISH) & believed
    no_number = broken & believed
    dropped = missed | lavish | no_number
    clear = dropped | (believed == 0)
    flags = with_flag(tl.load(TRUST + 3), missed, 1.0)
    flags = with_flag(flags, lavish, 2.0)
    flags = with_flag(flags, no_number, 4.0)
    flags = with_flag(flags, too_long, 8.0)
    use = believed & (broken == 0)
    if stepped:
        tl.store(TRUST, tl.where(clear, 0.0, excess_mean))
        tl.store(TRUST + 1, tl.where(clear, 0.0, expense_mean))
        tl.store(TRUST + 2, tl.where(dropped | raised, HOLD * 1.0, tl.maximum(held - 1.0, 0.0)))
        tl.store(TRUST + 3, flags)
        tl.store(TRUST + 4, tl.load(TRUST + 4) + 1.0)
        tl.store(TRUST + 5, tl.load(TRUST + 5) + (use == 0).to(tl.float32))
        tl.store(TRUST + 6, tl.load(TRUST + 6) + dropped.to(tl.float32))


@triton.jit(
    do_not_specialize=["rows", "blocks", "keys", "subtiles", "tiles", "slots", "splits", "trained"],
    do_not_specialize_on_alignment=["START", "LENGTHS"],
)
def audit_step(
    EVIDENCE, GUARD_COUNTS, STATE, STATS, FLOOR, BUDGET, ENERGY, PREDICTED, LEVELS, COUNTS, META, LSE, TAU, LIMIT,
    MARGIN, START, LENGTHS, HISTORY, TRUST,
    floor_b, budget_b, tau_b, start_stride, length_stride, kv_heads, rows, blocks, keys, subtiles, tiles, slots,
    splits, trained, skip, window, hold, hysteresis,
    GROUP: tl.constexpr, GP: tl.constexpr, BN: tl.constexpr, CHUNK: tl.constexpr, FIELDS: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, HAS_START: tl.constexpr, HAS_LENGTHS: tl.constexpr,
    SKIPS: tl.constexpr, AUDIT_WINDOW: tl.constexpr, HOLD: tl.constexpr, SLACK: tl.constexpr, CEILING: tl.constexpr,
    LAVISH: tl.constexpr, MOST_EXCESS: tl.constexpr, DECAY: tl.constexpr, TRUST_FIELDS: tl.constexpr,
    ROWS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The arguments up to BUDGET as of ``guard_step``. HISTORY ``[B*G, tiles, 2]`` and TRUST ``[B*G, 7]`` are written.

    Importance is relative to the final log-sum-exp where the gate was used, to the look-ahead's where it was not; where
    the guard's floor has everything refined there is no look-ahead, and both planes speak.
    """
    wait_for_launch(PDL)
    bg = tl.program_id(0)
    b, g = bg // kv_heads, bg % kv_heads
    row = tl.arange(0, GP)
    valid = row < GROUP
    lead = bg.to(tl.int64) * subtiles
    tau = tl.load(TAU + b * tau_b + g)
    use, broken = tl.load(COUNTS + bg * 4 + 1) != 0, tl.load(COUNTS + bg * 4 + 2) != 0
    floors = tl.load(COUNTS + bg * 4 + 3)  # as the step found them
    raised, all_refined = (floors & 1) != 0, (floors & 2) != 0
    final = tl.load(LSE + bg * GROUP + row, mask=valid, other=0.0) * LOG2E
    looked = tl.load(META + ((bg.to(tl.int64) * slots + splits) * FIELDS + 4) * GP + row)
    lse = tl.where(use | all_refined, final, looked)
    lo, hi, _ = key_range(
        b, 0, 0, START, LENGTHS, start_stride, length_stride, keys, 1, HAS_START, HAS_LENGTHS, CAUSAL, WINDOW
    )
    length = sequence_length(b, LENGTHS, length_stride, keys, HAS_LENGTHS)
    trust = TRUST + bg * TRUST_FIELDS
    threshold = -1.0
    stands_for = 1.0
    if SKIPS:
        threshold = skip_threshold(length, tl.load(MARGIN + g), skip, BN)
        steps = tl.load(trust + 4)
        whole = steps - tl.floor(steps / AUDIT_WINDOW) * AUDIT_WINDOW == 0.0
        stands_for = tl.where(use & whole, AUDIT_WINDOW * 1.0, 1.0)
    allowed = tl.zeros((CHUNK,), tl.float32)
    left = tl.zeros((CHUNK,), tl.float32)
    gone = tl.zeros((CHUNK,), tl.float32)
    is_hot = tl.zeros((CHUNK,), tl.float32)
    said_hot = tl.zeros((CHUNK,), tl.float32)
    any_live = tl.zeros((CHUNK,), tl.int32)
    for first in range(0, tiles, CHUNK):
        tile = first + tl.arange(0, CHUNK)
        alive = (tile >= lo // BN) & (tile * BN < hi) & (lo < hi)
        level = tl.load(LEVELS + lead + tile, mask=alive, other=0)
        said = tl.load(PREDICTED + lead + tile, mask=alive, other=0.0)
        read = alive & (level != 0)
        exact, is_number = importance_of(ENERGY, lead, tile, read[:, None] & valid[None, :], lse, GP)
        exact = tl.where(read, exact, said)
        live = alive & is_number & ((said < 0.0) == 0)
        seen = tl.where(live, exact, 0.0)
        history = HISTORY + (bg.to(tl.int64) * tiles + tile) * 2
        inside = tile < tiles
        mean = tl.load(history + 1, mask=inside, other=0.0)
        tl.store(history, seen, mask=inside)
        tl.store(history + 1, DECAY * mean + (1.0 - DECAY) * seen, mask=inside)
        weight = tl.where(said <= threshold, stands_for, 1.0)
        weight = tl.where(read, weight, 0.0)
        square = weight * seen * seen
        allowed += tl.where(seen <= tau, square, 0.0)
        left += tl.where(live & (said <= tau), square, 0.0)
        gone += tl.where(live & (said <= threshold), weight * seen, 0.0)
        is_hot += (live & (seen > tau)).to(tl.float32)
        said_hot += (live & (said > tau)).to(tl.float32)
        any_live |= live.to(tl.int32)
    excess = tl.sum(left, 0) / tl.maximum(tl.sum(allowed, 0) + SLACK * tau * tau, 1.1754944e-38)
    if SKIPS:
        per_tile: tl.constexpr = BN**0.25
        excess = tl.maximum(excess, tl.sum(gone, 0) * per_tile / skip)
    trust_step(
        trust, tl.minimum(excess, CEILING), tl.sum(said_hot, 0) / (tl.sum(is_hot, 0) + SLACK),
        tl.max(any_live, 0) != 0, tl.load(LIMIT + g), length > trained, raised, broken, HOLD, AUDIT_WINDOW, LAVISH,
        MOST_EXCESS,
    )  # fmt: skip
    guard_step(
        EVIDENCE, GUARD_COUNTS, STATE, STATS, FLOOR, BUDGET, floor_b, budget_b, kv_heads, rows, blocks, window, hold,
        hysteresis, ROWS, False,
    )  # fmt: skip
