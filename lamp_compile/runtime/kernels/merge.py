"""Fifth and sixth launch: join the partial results of a row, rotate its output back, write its certificate; then the
fallback guard, once per sequence and kv head."""

from __future__ import annotations

import triton
import triton.language as tl

from lamp_compile.runtime.kernels._device import EMPTY, LOG2E, ROW_FIELDS, wait_for_launch
from lamp_compile.runtime.kernels.decide import NOTES, shared_by

PEAK_SQUARE = tl.constexpr(119.0 * 119.0 / 7.5)
"""Mean square of a stored row's channels in units of its scale (``formats._base.mean_square_of_peak``)."""


@triton.jit
def sign_rows(SIGNS, j, columns, DIM: tl.constexpr):
    """Rows j of the rotation (``_device.rotated``)."""
    inside = (j < DIM)[:, None] & (columns < DIM)[None, :]
    return tl.load(SIGNS + j[:, None] * DIM + columns[None, :], mask=inside, other=0)


@triton.jit
def one_of(
    PARTIAL, META, first_slot, part, parts, row, columns, GP: tl.constexpr, FIELDS: tl.constexpr,
    VALUE_DIM: tl.constexpr,
):  # fmt: skip
    """Of some partial results of one row: maxima, and outputs ``[n, VP]``."""
    there = part < parts
    top = tl.load(META + (first_slot + part) * FIELDS * GP + row, mask=there, other=EMPTY)
    at = PARTIAL + ((first_slot + part) * GP + row)[:, None] * VALUE_DIM + columns[None, :]
    return top, tl.load(at, mask=there[:, None] & (columns < VALUE_DIM)[None, :], other=0.0)


@triton.jit
def weighed(top, got, written, most):
    """Outputs by their share; those without a key were not written."""
    got = tl.where((written & (top > EMPTY))[:, None], got, 0.0)
    return got * tl.exp2(tl.where(written, top, EMPTY) - most)[:, None]


@triton.jit(do_not_specialize=["queries", "first_token", "all_blocks", "slots", "splits", "chunks"])
def merge(
    PARTIAL, META, TAKEN, NOTED, ROWINFO, SINKS, SIGNS, OUT, LSE, CERTIFICATE, EVIDENCE, COUNTS,
    kv_heads, heads, queries, first_token, all_blocks, slots, splits, chunks, scale, root,
    GROUP: tl.constexpr, GP: tl.constexpr, PACK: tl.constexpr, TOKENS: tl.constexpr, DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr, VP: tl.constexpr, FIELDS: tl.constexpr, SEGMENTS_P2: tl.constexpr,
    CHUNKS_P2: tl.constexpr, CHUNK: tl.constexpr, COLUMNS: tl.constexpr,
    ROTATE: tl.constexpr, HAS_SINKS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One row: OUT ``[B, H, S, Dv]``, LSE ``[B, H, S]`` (natural), CERTIFICATE ``[B, H, S, 3]``, EVIDENCE
    ``[B, H, S, 3]`` (live, squared relative error, not finite), COUNTS ``[B*G, blocks, 2]`` (live, refined)."""
    columns = tl.arange(0, VP)
    if ROTATE:  # no launch ahead of this one makes these: read while it ends
        j = tl.arange(0, COLUMNS)
        signs = sign_rows(SIGNS, j, columns, VALUE_DIM)
    wait_for_launch(PDL)
    row, bg, block = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    b, g = bg // kv_heads, bg % kv_heads
    head = g * GROUP + row % GROUP
    token = first_token + block * TOKENS + row // GROUP
    if token < queries:
        place = bg.to(tl.int64) * tl.num_programs(2) + block
        first_slot = place * slots + splits  # what the refinement left; it has taken in the look-ahead's results
        index, part = tl.arange(0, SEGMENTS_P2), tl.arange(0, CHUNK)
        # All of this is read before any of it is used: every sum below waits for all warps. Of programs of the
        # refinement that had nothing to do it holds anything.
        _, _, segments = shared_by(TAKEN, place, chunks, slots - splits, PACK, CHUNKS_P2)
        inside = index < slots - splits
        meta = META + (first_slot + index) * FIELDS * GP + row
        top = tl.load(meta, mask=inside, other=EMPTY)
        part_top, got = one_of(
            PARTIAL, META, first_slot, part, slots - splits, row, columns, GP, FIELDS, VALUE_DIM
        )  # fmt: skip
        mass = tl.load(meta + GP, mask=inside, other=0.0)
        value_mass = tl.load(meta + 2 * GP, mask=inside, other=0.0)
        k_most = tl.load(meta + 3 * GP, mask=inside, other=0.0)
        hot_square = tl.load(meta + 5 * GP, mask=inside, other=0.0)
        hot_value = tl.load(meta + 6 * GP, mask=inside, other=0.0)
        seen_tiles = tl.load(meta + 4 * GP, mask=inside, other=0.0)
        chunk = tl.arange(0, CHUNKS_P2)
        notes, noted = NOTED + (place * chunks + chunk) * NOTES * GP + row, chunk < chunks
        cold = tl.load(NOTED + place * chunks * NOTES * GP + row)
        cold_square = tl.load(notes + GP, mask=noted, other=0.0)
        cold_value = tl.load(notes + 2 * GP, mask=noted, other=0.0)
        live, refined = tl.load(notes + 3 * GP, mask=noted, other=0.0), tl.load(notes + 4 * GP, mask=noted, other=0.0)
        step = tl.load(ROWINFO + place * ROW_FIELDS * GP + row)
        norm = tl.load(ROWINFO + (place * ROW_FIELDS + 2) * GP + row)
        inside = index < segments
        top = tl.where(inside, top, EMPTY)
        most = tl.max(top, 0)
        seen = most > EMPTY
        if HAS_SINKS:
            sink = tl.load(SINKS + head).to(tl.float32) * LOG2E
            most = tl.where(seen, tl.maximum(most, sink), most)

        parts = weighed(part_top, got, part < segments, most)
        for first in range(CHUNK, segments, CHUNK):
            part = first + tl.arange(0, CHUNK)
            part_top, got = one_of(PARTIAL, META, first_slot, part, segments, row, columns, GP, FIELDS, VALUE_DIM)
            parts += weighed(part_top, got, part < segments, most)

        share = tl.exp2(top - most)
        mass = tl.where(inside, mass, 0.0)
        keys_total = tl.sum(mass * share, 0)
        total = keys_total
        if HAS_SINKS:
            total += tl.where(seen, tl.exp2(sink - most), 0.0)
        # A NaN among the maxima is not seen by a maximum; it is by a sum.
        spoilt = tl.sum(tl.where(inside, top * 0.0, 0.0), 0) + total * 0.0
        inverse = tl.where(seen, 1.0 / total, 0.0) + spoilt
        x = tl.where(seen, tl.sum(parts, 0) * inverse, spoilt)
        square = tl.sum(x * x, 0)
        place_out = ((b * heads + head) * queries + token).to(tl.int64)
        target = OUT + place_out * VALUE_DIM
        if ROTATE:
            turned = tl.sum(signs.to(tl.float32) * x[None, :], 1) * root
            tl.store(target + j, turned.to(OUT.dtype.element_ty), mask=j < VALUE_DIM)
            for first in range(COLUMNS, VALUE_DIM, COLUMNS):
                j = first + tl.arange(0, COLUMNS)
                signs = sign_rows(SIGNS, j, columns, VALUE_DIM)
                turned = tl.sum(signs.to(tl.float32) * x[None, :], 1) * root
                tl.store(target + j, turned.to(OUT.dtype.element_ty), mask=j < VALUE_DIM)
        else:
            tl.store(target + columns, x.to(OUT.dtype.element_ty), mask=columns < VALUE_DIM)

        # Certificate: every sum in units of the final weights; the largest key scale stands for all keys.
        lse = most + tl.log2(total)
        old = tl.where(cold == float("-inf"), 0.0, tl.exp2(2.0 * (cold - lse)) * 256.0)
        one = tl.exp2(top - lse)
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
        tl.store(LSE + place_out, tl.where(seen, lse * (1.0 / LOG2E), float("-inf")) + spoilt)
        tl.store(CERTIFICATE + place_out * 3, first_sum)
        tl.store(CERTIFICATE + place_out * 3 + 1, second_sum)
        tl.store(CERTIFICATE + place_out * 3 + 2, third_sum)

        estimate = first_sum * square + second_sum + third_sum
        bad = ((estimate + square + spoilt) * 0.0 != 0.0) | (seen & ((total > 0.0) == 0))
        counted = (seen | bad) & (bad == 0)
        tl.store(EVIDENCE + place_out * 3, counted.to(tl.float32))
        tl.store(EVIDENCE + place_out * 3 + 1, tl.where(counted, estimate / tl.maximum(square, 1.1754944e-38), 0.0))
        tl.store(EVIDENCE + place_out * 3 + 2, bad.to(tl.float32))
        if row == 0:
            counts = COUNTS + (bg.to(tl.int64) * all_blocks + block) * 2
            counted_tiles = tl.sum(tl.where(inside, seen_tiles, 0.0), 0)
            tl.store(counts, tl.sum(live, 0) + counted_tiles)
            tl.store(counts + 1, tl.sum(refined, 0) + counted_tiles)


@triton.jit(do_not_specialize=["rows", "blocks"])
def guard_step(
    EVIDENCE, COUNTS, STATE, STATS, FLOOR, BUDGET, floor_b, budget_b, kv_heads, rows, blocks, window, hold, hysteresis,
    ROWS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """``runtime.guard.step`` for one sequence and kv head, in place. Its heads are neighbours, so EVIDENCE is read as
    ``[B*G, rows, 3]``; COUNTS ``[B*G, blocks, 2]``."""
    wait_for_launch(PDL)
    bg = tl.program_id(0)
    b, g = bg // kv_heads, bg % kv_heads
    count = 0.0
    error = 0.0
    bad_rows = 0.0
    for first in range(0, rows, ROWS):
        row = first + tl.arange(0, ROWS)
        at = EVIDENCE + (bg.to(tl.int64) * rows + row) * 3
        count += tl.sum(tl.load(at, mask=row < rows, other=0.0), 0)
        error += tl.sum(tl.load(at + 1, mask=row < rows, other=0.0), 0)
        bad_rows += tl.sum(tl.load(at + 2, mask=row < rows, other=0.0), 0)
    live = tl.full((), 0, tl.int64)
    refined = tl.full((), 0, tl.int64)
    for first in range(0, blocks, ROWS):
        block = first + tl.arange(0, ROWS)
        at = COUNTS + (bg.to(tl.int64) * blocks + block) * 2
        live += tl.sum(tl.load(at, mask=block < blocks, other=0.0).to(tl.int64), 0)
        refined += tl.sum(tl.load(at + 1, mask=block < blocks, other=0.0).to(tl.int64), 0)

    state = STATE + bg * 4
    level = tl.load(state + 1)
    hold_left = tl.load(state + 2)
    flags = tl.load(state + 3)
    old = tl.load(state)
    stepped = (count > 0.0) | (bad_rows > 0.0)
    bad = bad_rows > 0.0
    mean = old + (error / tl.maximum(count, 1.0) - old) / window
    held = tl.maximum(hold_left - 1.0, 0.0)
    budget = tl.load(BUDGET + b * budget_b + g)
    limit = budget * budget
    over = (mean > limit) & stepped
    under = (mean < hysteresis * hysteresis * limit) & (held == 0.0) & (level > 0.0) & (over == 0) & stepped
    raised = tl.where(over, tl.minimum(level + 1.0, 2.0), tl.where(under, level - 1.0, level))
    raised = tl.where(bad, 2.0, raised)
    changed = over | bad
    effective = tl.maximum(raised, tl.load(FLOOR + b * floor_b + g))
    flags = tl.where(bad & (tl.floor(flags) % 2.0 == 0.0), flags + 1.0, flags)
    flags = tl.where((effective >= 2.0) & (tl.floor(flags / 2.0) % 2.0 == 0.0), flags + 2.0, flags)
    if stepped:
        tl.store(state, tl.where(changed, 0.0, mean))
        tl.store(state + 1, raised)
        tl.store(state + 2, tl.where(changed, hold * 1.0, held))
        tl.store(state + 3, flags)
    stats = STATS + bg * 7
    tl.store(stats, tl.load(stats) + stepped.to(tl.int64))
    tl.store(stats + 1, tl.load(stats + 1) + live)
    tl.store(stats + 2, tl.load(stats + 2) + refined)
    tl.store(stats + 4, tl.load(stats + 4) + ((raised > level) & (bad == 0)).to(tl.int64))
    tl.store(stats + 5, tl.load(stats + 5) + (raised < level).to(tl.int64))
    tl.store(stats + 6, tl.load(stats + 6) + bad.to(tl.int64))
