"""Fifth launch: join the partial results of a row, rotate its output back, write its certificate. Then the fallback
guard, once per sequence and kv head: in a launch of its own, the sixth, where several programs join the rows of a kv
head."""

from __future__ import annotations

import triton
import triton.language as tl

from lamp_compile.runtime.kernels._device import EMPTY, LOG2E, ROW_FIELDS, rotation, turned, wait_for_launch
from lamp_compile.runtime.kernels.decide import NOTES, shared_by

PEAK_SQUARE = tl.constexpr(119.0 * 119.0 / 7.5)
"""Mean square of a stored row's channels in units of its scale (``formats._base.mean_square_of_peak``)."""


@triton.jit
def some_of(
    PARTIAL, META, part, parts, rows, valid, columns, GP: tl.constexpr, FIELDS: tl.constexpr,
    VALUE_DIM: tl.constexpr,
):  # fmt: skip
    """Of some partial results ``[n]`` of rows ``[R]``: maxima ``[n, R]``, and outputs ``[n, R, VP]``."""
    there = (part < parts)[:, None] & valid[None, :]
    top = tl.load(META + (part[:, None] * (FIELDS * GP) + rows[None, :]), mask=there, other=EMPTY)
    at = PARTIAL + (part[:, None] * (GP * VALUE_DIM) + rows[None, :] * VALUE_DIM)[:, :, None] + columns[None, None, :]
    return top, tl.load(at, mask=there[:, :, None] & (columns < VALUE_DIM)[None, None, :], other=0.0)


@triton.jit
def weighed(top, got, written, most):
    """Outputs by their share; those without a key were not written."""
    written = tl.broadcast_to(written[:, None], top.shape)
    got = tl.where((written & (top > EMPTY))[:, :, None], got, 0.0)
    return got * tl.exp2(tl.where(written, top, EMPTY) - most[None, :])[:, :, None]


@triton.jit(do_not_specialize=["queries", "first_token", "all_blocks", "slots", "splits", "chunks", "window", "hold"])
def merge(
    PARTIAL, META, TAKEN, NOTED, ROWINFO, SINKS, SIGNS, OUT, LSE, CERTIFICATE, EVIDENCE, COUNTS,
    STATE, STATS, FLOOR, BUDGET,
    kv_heads, heads, queries, first_token, all_blocks, slots, splits, chunks, scale, root,
    floor_b, budget_b, window, hold, hysteresis,
    GROUP: tl.constexpr, GP: tl.constexpr, PACK: tl.constexpr, TOKENS: tl.constexpr, DIM: tl.constexpr,
    HALF_V: tl.constexpr, HP_V: tl.constexpr, FIELDS: tl.constexpr, SEGMENTS_P2: tl.constexpr,
    CHUNKS_P2: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr,
    ROTATE: tl.constexpr, HAS_SINKS: tl.constexpr, GUARD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """ROWS rows: OUT ``[B, H, S, Dv]``, LSE ``[B, H, S]`` (natural), CERTIFICATE ``[B, H, S, 3]``. With GUARD, which
    wants all rows of a kv head, of one token, the guard's step; without, what it needs: EVIDENCE ``[B, H, S, 3]``
    (live, squared relative error, not finite), COUNTS ``[B*G, blocks, 2]`` (live, refined)."""
    VALUE_DIM: tl.constexpr = 2 * HALF_V
    columns, half = tl.arange(0, 2 * HP_V), tl.arange(0, HP_V)
    bg, block = tl.program_id(1), tl.program_id(2)
    b, g = bg // kv_heads, bg % kv_heads
    if ROTATE:  # no launch ahead of this one makes these: read while it ends
        first_half, second_half = rotation(SIGNS, 0, HALF_V, HP_V, True)
    if GUARD:
        known = guarded(STATE, STATS, FLOOR, BUDGET, bg, b, g, floor_b, budget_b)
    wait_for_launch(PDL)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    head = g * GROUP + rows % GROUP
    token = first_token + block * TOKENS + rows // GROUP
    valid = (rows < GROUP * TOKENS) & (token < queries)
    place = bg.to(tl.int64) * tl.num_programs(2) + block
    first_slot = place * slots + splits  # what the refinement left; it has taken in the look-ahead's results
    # Where it begins is a single number: what is added to that is the same in all programs, and takes few operations.
    PARTIAL += first_slot * (GP * VALUE_DIM)
    META += first_slot * (FIELDS * GP)
    NOTED += place * chunks * (NOTES * GP)
    ROWINFO += place * (ROW_FIELDS * GP)
    results = slots - splits
    index, part, chunk = tl.arange(0, SEGMENTS_P2), tl.arange(0, CHUNK), tl.arange(0, CHUNKS_P2)
    # All of this is read before any of it is used: every sum below waits for all warps. Of programs of the refinement
    # that had nothing to do it holds anything.
    there = (index < results)[:, None] & valid[None, :]
    meta = META + (index[:, None] * (FIELDS * GP) + rows[None, :])
    top = tl.load(meta, mask=there, other=EMPTY)
    part_top, got = some_of(PARTIAL, META, part, results, rows, valid, columns, GP, FIELDS, VALUE_DIM)
    mass = tl.load(meta + GP, mask=there, other=0.0)
    value_mass = tl.load(meta + 2 * GP, mask=there, other=0.0)
    k_most = tl.load(meta + 3 * GP, mask=there, other=0.0)
    hot_square = tl.load(meta + 5 * GP, mask=there, other=0.0)
    hot_value = tl.load(meta + 6 * GP, mask=there, other=0.0)
    # Counts are the same for all rows.
    seen_tiles = tl.load(META + (index * (FIELDS * GP) + 4 * GP), mask=index < results, other=0.0)
    noted = (chunk < chunks)[:, None] & valid[None, :]
    notes = NOTED + (chunk[:, None] * (NOTES * GP) + rows[None, :])
    cold = tl.load(NOTED + rows, mask=valid, other=0.0)
    cold_square = tl.load(notes + GP, mask=noted, other=0.0)
    cold_value = tl.load(notes + 2 * GP, mask=noted, other=0.0)
    counts = NOTED + chunk * (NOTES * GP)
    live = tl.load(counts + 3 * GP, mask=chunk < chunks, other=0.0)
    refined = tl.load(counts + 4 * GP, mask=chunk < chunks, other=0.0)
    step = tl.load(ROWINFO + rows, mask=valid, other=0.0)
    norm = tl.load(ROWINFO + 2 * GP + rows, mask=valid, other=0.0)
    _, segments = shared_by(TAKEN, place, chunks, results, PACK, CHUNKS_P2)
    tl.debug_barrier()  # or the compiler puts some of what is read behind the first sums
    inside = tl.broadcast_to((index < segments)[:, None], top.shape)
    top = tl.where(inside, top, EMPTY)
    most = tl.max(top, 0)
    seen = most > EMPTY
    if HAS_SINKS:
        sink = tl.load(SINKS + head, mask=valid, other=0.0).to(tl.float32) * LOG2E
        most = tl.where(seen, tl.maximum(most, sink), most)

    parts = weighed(part_top, got, part < segments, most)
    for first in range(CHUNK, segments, CHUNK):
        part = first + tl.arange(0, CHUNK)
        part_top, got = some_of(PARTIAL, META, part, segments, rows, valid, columns, GP, FIELDS, VALUE_DIM)
        parts += weighed(part_top, got, part < segments, most)

    share = tl.exp2(top - most[None, :])
    mass = tl.where(inside, mass, 0.0)
    keys_total = tl.sum(mass * share, 0)
    total = keys_total
    if HAS_SINKS:
        total += tl.where(seen, tl.exp2(sink - most), 0.0)
    # A NaN among the maxima is not seen by a maximum; it is by a sum.
    spoilt = tl.sum(tl.where(inside, top * 0.0, 0.0), 0) + total * 0.0
    inverse = tl.where(seen, 1.0 / total, 0.0) + spoilt
    x = tl.where(seen[:, None], tl.sum(parts, 0) * inverse[:, None], spoilt[:, None])
    square = tl.sum(x * x, 1)
    place_out = ((b * heads + head) * queries + token).to(tl.int64)
    target = OUT + place_out[:, None] * VALUE_DIM
    if ROTATE:
        upper, lower = turned(x, first_half, second_half, SIGNS, root, HALF_V, HP_V, 2, True)
        stored = valid[:, None] & (half < HALF_V)[None, :]
        tl.store(target + half[None, :], upper.to(OUT.dtype.element_ty), mask=stored)
        tl.store(target + HALF_V + half[None, :], lower.to(OUT.dtype.element_ty), mask=stored)
    else:
        stored = valid[:, None] & (columns < VALUE_DIM)[None, :]
        tl.store(target + columns[None, :], x.to(OUT.dtype.element_ty), mask=stored)

    # Certificate: every sum in units of the final weights; the largest key scale stands for all keys.
    lse = most + tl.log2(total)
    old = tl.where(cold == float("-inf"), 0.0, tl.exp2(2.0 * (cold - lse)) * 256.0)
    one = tl.exp2(top - lse[None, :])
    rounding = tl.where(norm == 0.0, 0.0, step * step) * (DIM * PEAK_SQUARE)
    largest = tl.max(tl.where(inside, k_most, 0.0), 0)
    scores = scale * scale / 12.0 * (largest * largest)
    value_masses = tl.maximum(tl.sum(tl.where(inside, value_mass, 0.0) * one, 0), 0.0)
    squares = tl.sum(tl.where(inside, hot_square, 0.0) * one * one, 0) + tl.sum(cold_square, 0) * old
    hot_values = tl.sum(tl.where(inside, hot_value, 0.0) * one * one, 0)
    cold_values = tl.sum(cold_value, 0) * old
    first_sum = scores * (norm * squares + rounding * tl.maximum(keys_total / total, 0.0))
    # The int8 softmax row of the look-ahead adds at most 3 % to the value error of its own sub-tile.
    second_sum = (hot_values + cold_values * 1.03) * (VALUE_DIM / 12.0)
    third_sum = scores * (norm * (hot_values + cold_values) + rounding * value_masses) * (VALUE_DIM * PEAK_SQUARE)
    first_sum = tl.where(seen, first_sum, 0.0)
    second_sum, third_sum = tl.where(seen, second_sum, 0.0), tl.where(seen, third_sum, 0.0)
    tl.store(LSE + place_out, tl.where(seen, lse * (1.0 / LOG2E), float("-inf")) + spoilt, mask=valid)
    tl.store(CERTIFICATE + place_out * 3, first_sum, mask=valid)
    tl.store(CERTIFICATE + place_out * 3 + 1, second_sum, mask=valid)
    tl.store(CERTIFICATE + place_out * 3 + 2, third_sum, mask=valid)

    estimate = first_sum * square + second_sum + third_sum
    bad = ((estimate + square + spoilt) * 0.0 != 0.0) | (seen & ((total > 0.0) == 0))
    counted = (seen | bad) & (bad == 0)
    error = tl.where(counted, estimate / tl.maximum(square, 1.1754944e-38), 0.0)
    counted_tiles = tl.sum(tl.where(index < segments, seen_tiles, 0.0), 0)
    all_live, all_refined = tl.sum(live, 0) + counted_tiles, tl.sum(refined, 0) + counted_tiles
    if GUARD:
        guard_update(
            STATE, STATS, bg, known, tl.sum((counted & valid).to(tl.float32), 0),
            tl.sum(tl.where(valid, error, 0.0), 0), tl.sum((bad & valid).to(tl.float32), 0), all_live.to(tl.int64),
            all_refined.to(tl.int64), window, hold, hysteresis,
        )  # fmt: skip
    else:
        tl.store(EVIDENCE + place_out * 3, counted.to(tl.float32), mask=valid)
        tl.store(EVIDENCE + place_out * 3 + 1, error, mask=valid)
        tl.store(EVIDENCE + place_out * 3 + 2, bad.to(tl.float32), mask=valid)
        if tl.program_id(0) == 0:
            counted_at = COUNTS + (bg.to(tl.int64) * all_blocks + block) * 2
            tl.store(counted_at, all_live)
            tl.store(counted_at + 1, all_refined)


@triton.jit
def guarded(STATE, STATS, FLOOR, BUDGET, bg, b, g, floor_b, budget_b):
    """What the guard's step reads of a sequence and kv head and no launch of this call writes before it."""
    state, stats = STATE + bg * 4, STATS + bg * 7
    return (
        tl.load(state), tl.load(state + 1), tl.load(state + 2), tl.load(state + 3),
        tl.load(FLOOR + b * floor_b + g), tl.load(BUDGET + b * budget_b + g),
        tl.load(stats), tl.load(stats + 1), tl.load(stats + 2), tl.load(stats + 4), tl.load(stats + 5),
        tl.load(stats + 6),
    )  # fmt: skip


@triton.jit
def guard_update(STATE, STATS, bg, known, count, error, bad_rows, live, refined, window, hold, hysteresis):
    """``runtime.guard.step`` for one sequence and kv head, in place, from sums over its rows and what is
    ``guarded``."""
    old, level, hold_left, flags, floor, budget, steps, all_live, all_refined, raises, lowerings, spoilt = known
    state, stats = STATE + bg * 4, STATS + bg * 7
    stepped = (count > 0.0) | (bad_rows > 0.0)
    bad = bad_rows > 0.0
    mean = old + (error / tl.maximum(count, 1.0) - old) / window
    held = tl.maximum(hold_left - 1.0, 0.0)
    limit = budget * budget
    over = (mean > limit) & stepped
    under = (mean < hysteresis * hysteresis * limit) & (held == 0.0) & (level > 0.0) & (over == 0) & stepped
    raised = tl.where(over, tl.minimum(level + 1.0, 2.0), tl.where(under, level - 1.0, level))
    raised = tl.where(bad, 2.0, raised)
    changed = over | bad
    effective = tl.maximum(raised, floor)
    flags = tl.where(bad & (tl.floor(flags) % 2.0 == 0.0), flags + 1.0, flags)
    flags = tl.where((effective >= 2.0) & (tl.floor(flags / 2.0) % 2.0 == 0.0), flags + 2.0, flags)
    if stepped:
        tl.store(state, tl.where(changed, 0.0, mean))
        tl.store(state + 1, raised)
        tl.store(state + 2, tl.where(changed, hold * 1.0, held))
        tl.store(state + 3, flags)
    tl.store(stats, steps + stepped.to(tl.int64))
    tl.store(stats + 1, all_live + live)
    tl.store(stats + 2, all_refined + refined)
    tl.store(stats + 4, raises + ((raised > level) & (bad == 0)).to(tl.int64))
    tl.store(stats + 5, lowerings + (raised < level).to(tl.int64))
    tl.store(stats + 6, spoilt + bad.to(tl.int64))


@triton.jit
def evidence_of(EVIDENCE, bg, first, rows, ROWS: tl.constexpr):
    """Of some rows: whether they count, their errors, whether they are not finite."""
    row = first + tl.arange(0, ROWS)
    at = EVIDENCE + (bg.to(tl.int64) * rows + row) * 3
    mask = row < rows
    return (
        tl.load(at, mask=mask, other=0.0),
        tl.load(at + 1, mask=mask, other=0.0),
        tl.load(at + 2, mask=mask, other=0.0),
    )


@triton.jit
def counts_of(COUNTS, bg, first, blocks, ROWS: tl.constexpr):
    """Of some blocks of rows: sub-tiles seen, and refined."""
    block = first + tl.arange(0, ROWS)
    at = COUNTS + (bg.to(tl.int64) * blocks + block) * 2
    mask = block < blocks
    return tl.load(at, mask=mask, other=0.0).to(tl.int64), tl.load(at + 1, mask=mask, other=0.0).to(tl.int64)


@triton.jit(do_not_specialize=["rows", "blocks"])
def guard_step(
    EVIDENCE, COUNTS, STATE, STATS, FLOOR, BUDGET, floor_b, budget_b, kv_heads, rows, blocks, window, hold, hysteresis,
    ROWS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """``runtime.guard.step`` for one sequence and kv head, in place. Its heads are neighbours, so EVIDENCE is read as
    ``[B*G, rows, 3]``; COUNTS ``[B*G, blocks, 2]``."""
    bg = tl.program_id(0)
    b, g = bg // kv_heads, bg % kv_heads
    known = guarded(STATE, STATS, FLOOR, BUDGET, bg, b, g, floor_b, budget_b)
    wait_for_launch(PDL)
    # Both are read before either is summed.
    counted, errors, bad = evidence_of(EVIDENCE, bg, 0, rows, ROWS)
    lives, refineds = counts_of(COUNTS, bg, 0, blocks, ROWS)
    count, error, bad_rows = tl.sum(counted, 0), tl.sum(errors, 0), tl.sum(bad, 0)
    live, refined = tl.sum(lives, 0), tl.sum(refineds, 0)
    for first in range(ROWS, rows, ROWS):
        counted, errors, bad = evidence_of(EVIDENCE, bg, first, rows, ROWS)
        count += tl.sum(counted, 0)
        error += tl.sum(errors, 0)
        bad_rows += tl.sum(bad, 0)
    for first in range(ROWS, blocks, ROWS):
        lives, refineds = counts_of(COUNTS, bg, first, blocks, ROWS)
        live += tl.sum(lives, 0)
        refined += tl.sum(refineds, 0)
    guard_update(STATE, STATS, bg, known, count, error, bad_rows, live, refined, window, hold, hysteresis)
