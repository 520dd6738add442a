"""The last two launches at a site with a look-ahead network. Beside the rows that are merged, the audit holds what was
predicted (``network/audit.py``) against the energies that look-ahead and refinement have written of what they read;
then its evidence moves the trust, and the certificate the guard, once per sequence and kv head, in place."""

from __future__ import annotations

import triton
import triton.language as tl

from lamp_compile.runtime.kernels._device import key_range, settings_of, wait_for_launch
from lamp_compile.runtime.kernels.decide import NOTES, looked_ahead, shared_by
from lamp_compile.runtime.kernels.merge import guard_step, merge
from lamp_compile.runtime.kernels.predict import sequence_length, skip_threshold

EVIDENCE_FIELDS = tl.constexpr(6)
"""Of a part: energies allowed and left below the bar, mass skipped, sub-tiles that are hot and that were said to be,
whether any is live."""


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


@triton.jit
def audit_part(
    ENERGY, PREDICTED, LEVELS, COUNTS, META, TAKEN, NOTED, ROWINFO, SINKS, MARGIN, START, LENGTHS, HISTORY, TRUST,
    AUDIT, part, parts, bg, start_stride, length_stride, kv_heads, keys, subtiles, tiles, slots, splits, chunks, skip,
    GROUP: tl.constexpr, GP: tl.constexpr, PACK: tl.constexpr, CHUNKS_P2: tl.constexpr, BN: tl.constexpr,
    CHUNK: tl.constexpr, FIELDS: tl.constexpr,
    SEGMENTS_P2: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, HAS_SINKS: tl.constexpr,
    HAS_START: tl.constexpr, HAS_LENGTHS: tl.constexpr, SKIPS: tl.constexpr, AUDIT_WINDOW: tl.constexpr,
    DECAY: tl.constexpr, TRUST_FIELDS: tl.constexpr,
):  # fmt: skip
    """CHUNK sub-tiles of one sequence and kv head: their history, and their share of the evidence.

    Importance is relative to the final log-sum-exp where the gate was used, to the look-ahead's where it was not; where
    everything is refined all the same there is no look-ahead, and both planes speak.
    """
    b, g = bg // kv_heads, bg % kv_heads
    row = tl.arange(0, GP)
    valid = row < GROUP
    lead = bg.to(tl.int64) * subtiles
    tau, _ = settings_of(ROWINFO, bg.to(tl.int64), GP)
    use, floors = tl.load(COUNTS + bg * 4 + 1) != 0, tl.load(COUNTS + bg * 4 + 3)
    refined_meta = META + splits * FIELDS * GP  # what the refinement left
    _, taking = shared_by(TAKEN, bg, chunks, slots - splits, PACK, CHUNKS_P2)
    final, _, _ = looked_ahead(
        refined_meta, SINKS, bg.to(tl.int64), slots, taking, g * GROUP + row % GROUP, valid, GP,
        FIELDS, SEGMENTS_P2, HAS_SINKS, 0,
    )  # fmt: skip
    looked = tl.load(NOTED + bg * chunks * NOTES * GP + row)
    lse = tl.where(use | ((floors & 2) != 0), final, looked)
    lo, hi, _ = key_range(
        b, 0, 0, START, LENGTHS, start_stride, length_stride, keys, 1, HAS_START, HAS_LENGTHS, CAUSAL, WINDOW
    )
    threshold = -1.0
    stands_for = 1.0
    if SKIPS:
        length = sequence_length(b, LENGTHS, length_stride, keys, HAS_LENGTHS)
        threshold = skip_threshold(length, tl.load(MARGIN + g), skip, BN)
        steps = tl.load(TRUST + bg * TRUST_FIELDS + 4)
        whole = steps - tl.floor(steps / AUDIT_WINDOW) * AUDIT_WINDOW == 0.0
        stands_for = tl.where(use & whole, AUDIT_WINDOW * 1.0, 1.0)
    tile = part * CHUNK + tl.arange(0, CHUNK)
    alive = (tile >= lo // BN) & (tile * BN < hi) & (lo < hi)
    level = tl.load(LEVELS + lead + tile, mask=alive, other=0)
    said = tl.load(PREDICTED + lead + tile, mask=alive, other=0.0)
    history = HISTORY + (bg.to(tl.int64) * tiles + tile) * 2
    mean = tl.load(history + 1, mask=tile < tiles, other=0.0)
    read = alive & (level != 0)
    exact, is_number = importance_of(ENERGY, lead, tile, read[:, None] & valid[None, :], lse, GP)
    exact = tl.where(read, exact, said)
    live = alive & is_number & ((said < 0.0) == 0)
    seen = tl.where(live, exact, 0.0)
    tl.store(history, seen, mask=tile < tiles)
    tl.store(history + 1, DECAY * mean + (1.0 - DECAY) * seen, mask=tile < tiles)
    weight = tl.where(said <= threshold, stands_for, 1.0)
    weight = tl.where(read, weight, 0.0)
    square = weight * seen * seen
    out = AUDIT + (bg * parts + part) * EVIDENCE_FIELDS
    tl.store(out, tl.sum(tl.where(seen <= tau, square, 0.0), 0))
    tl.store(out + 1, tl.sum(tl.where(live & (said <= tau), square, 0.0), 0))
    tl.store(out + 2, tl.sum(tl.where(live & (said <= threshold), weight * seen, 0.0), 0))
    tl.store(out + 3, tl.sum((live & (seen > tau)).to(tl.float32), 0))
    tl.store(out + 4, tl.sum((live & (said > tau)).to(tl.float32), 0))
    tl.store(out + 5, tl.max(live.to(tl.float32), 0))


@triton.jit(
    do_not_specialize=[
        "queries",
        "first_token",
        "all_blocks",
        "slots",
        "splits",
        "chunks",
        "keys",
        "subtiles",
        "tiles",
    ],
    do_not_specialize_on_alignment=["START", "LENGTHS"],
)
def merge_and_audit(
    PARTIAL, META, TAKEN, NOTED, ROWINFO, SINKS, SIGNS, OUT, LSE, CERTIFICATE, EVIDENCE, GUARD_COUNTS, ENERGY,
    PREDICTED, LEVELS, COUNTS, MARGIN, START, LENGTHS, HISTORY, TRUST, AUDIT,
    kv_heads, heads, queries, first_token, all_blocks, slots, splits, chunks, scale, root, start_stride,
    length_stride, keys, subtiles, tiles, skip,
    GROUP: tl.constexpr, GP: tl.constexpr, PACK: tl.constexpr, TOKENS: tl.constexpr, DIM: tl.constexpr,
    HALF_V: tl.constexpr, HP_V: tl.constexpr, FIELDS: tl.constexpr, SEGMENTS_P2: tl.constexpr,
    CHUNKS_P2: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr,
    ROTATE: tl.constexpr, HAS_SINKS: tl.constexpr, PDL: tl.constexpr, BN: tl.constexpr, AUDIT_CHUNK: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, HAS_START: tl.constexpr, HAS_LENGTHS: tl.constexpr,
    SKIPS: tl.constexpr, AUDIT_WINDOW: tl.constexpr, DECAY: tl.constexpr, TRUST_FIELDS: tl.constexpr,
):  # fmt: skip
    """Programs 0 .. GROUP - 1 of a kv head are ``merge``'s, of one token; the others audit AUDIT_CHUNK sub-tiles each.
    HISTORY ``[B*G, tiles, 2]`` is written; AUDIT ``[B*G, parts, 6]`` takes the evidence."""
    wait_for_launch(PDL)
    if tl.program_id(0) < GROUP:
        merge(
            PARTIAL, META, TAKEN, NOTED, ROWINFO, SINKS, SIGNS, OUT, LSE, CERTIFICATE, EVIDENCE, GUARD_COUNTS, None,
            None, None, None, kv_heads, heads, queries, first_token, all_blocks, slots, splits, chunks, scale, root, 0,
            0, 0, 0, 0.0, GROUP, GP, PACK, TOKENS, DIM, HALF_V, HP_V, FIELDS, SEGMENTS_P2, CHUNKS_P2, CHUNK, ROWS,
            ROTATE, HAS_SINKS, False, False,
        )  # fmt: skip
    else:
        audit_part(
            ENERGY, PREDICTED, LEVELS, COUNTS, META, TAKEN, NOTED, ROWINFO, SINKS, MARGIN, START, LENGTHS, HISTORY,
            TRUST, AUDIT,
            tl.program_id(0) - GROUP, tl.num_programs(0) - GROUP, tl.program_id(1), start_stride, length_stride,
            kv_heads, keys, subtiles, tiles, slots, splits, chunks, skip, GROUP, GP, PACK, CHUNKS_P2, BN, AUDIT_CHUNK,
            FIELDS, SEGMENTS_P2, CAUSAL, WINDOW, HAS_SINKS, HAS_START, HAS_LENGTHS, SKIPS, AUDIT_WINDOW, DECAY,
            TRUST_FIELDS,
        )  # fmt: skip


@triton.jit
def total(AUDIT, parts, PARTS_P2: tl.constexpr):
    """The sum of one field of all parts."""
    index = tl.arange(0, PARTS_P2)
    return tl.sum(tl.load(AUDIT + index * EVIDENCE_FIELDS, mask=index < parts, other=0.0), 0)


@triton.jit(
    do_not_specialize=["rows", "blocks", "keys", "parts", "trained"], do_not_specialize_on_alignment=["LENGTHS"]
)
def trust_and_guard(
    EVIDENCE, GUARD_COUNTS, STATE, STATS, FLOOR, BUDGET, AUDIT, COUNTS, ROWINFO, LIMIT, LENGTHS, TRUST,
    floor_b, budget_b, length_stride, kv_heads, rows, blocks, keys, parts, trained, skip, window, hold,
    hysteresis,
    GP: tl.constexpr, BN: tl.constexpr, PARTS_P2: tl.constexpr, HAS_LENGTHS: tl.constexpr, SKIPS: tl.constexpr,
    AUDIT_WINDOW: tl.constexpr, HOLD: tl.constexpr, SLACK: tl.constexpr, CEILING: tl.constexpr, LAVISH: tl.constexpr,
    MOST_EXCESS: tl.constexpr, TRUST_FIELDS: tl.constexpr, ROWS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The arguments up to BUDGET as of ``guard_step``. TRUST ``[B*G, 7]`` is written. By one warp: what it reads of
    state and trust it has read before it writes."""
    wait_for_launch(PDL)
    bg = tl.program_id(0)
    b, g = bg // kv_heads, bg % kv_heads
    AUDIT += bg * parts * EVIDENCE_FIELDS
    tau, _ = settings_of(ROWINFO, bg.to(tl.int64), GP)
    broken, raised = tl.load(COUNTS + bg * 4 + 2) != 0, (tl.load(COUNTS + bg * 4 + 3) & 1) != 0
    length = sequence_length(b, LENGTHS, length_stride, keys, HAS_LENGTHS)
    allowed, left = total(AUDIT, parts, PARTS_P2) + SLACK * tau * tau, total(AUDIT + 1, parts, PARTS_P2)
    excess = left / tl.maximum(allowed, 1.1754944e-38)
    if SKIPS:
        per_tile: tl.constexpr = BN**0.25
        excess = tl.maximum(excess, total(AUDIT + 2, parts, PARTS_P2) * per_tile / skip)
    expense = total(AUDIT + 4, parts, PARTS_P2) / (total(AUDIT + 3, parts, PARTS_P2) + SLACK)
    trust_step(
        TRUST + bg * TRUST_FIELDS, tl.minimum(excess, CEILING), expense, total(AUDIT + 5, parts, PARTS_P2) > 0.0,
        tl.load(LIMIT + g), length > trained, raised, broken, HOLD, AUDIT_WINDOW, LAVISH, MOST_EXCESS,
    )  # fmt: skip
    guard_step(
        EVIDENCE, GUARD_COUNTS, STATE, STATS, FLOOR, BUDGET, floor_b, budget_b, kv_heads, rows, blocks, window, hold,
        hysteresis, ROWS, False,
    )  # fmt: skip
