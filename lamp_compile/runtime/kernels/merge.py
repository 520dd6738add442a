"""Fourth and fifth launch: join the partial results of a row, rotate its output back, write its certificate; then the
fallback guard, once per sequence and kv head."""

from __future__ import annotations

import triton
import triton.language as tl

from lamp_compile.runtime.kernels._device import EMPTY, LOG2E, wait_for_launch

PEAK_SQUARE = tl.constexpr(119.0 * 119.0 / 7.5)
"""Mean square of a stored row's channels in units of its scale (``formats._base.mean_square_of_peak``)."""


@triton.jit(do_not_specialize=["queries", "first_token", "all_blocks", "slots", "splits"])
def merge(
    PARTIAL, META, ROWINFO, SINKS, SIGNS, OUT, LSE, CERTIFICATE, EVIDENCE, COUNTS,
    kv_heads, heads, queries, first_token, all_blocks, slots, splits, scale, root,
    GROUP: tl.constexpr, GP: tl.constexpr, TOKENS: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    VP: tl.constexpr, FIELDS: tl.constexpr, SEGMENTS_P2: tl.constexpr, CHUNK: tl.constexpr, COLUMNS: tl.constexpr,
    ROTATE: tl.constexpr, HAS_SINKS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One row: OUT ``[B, H, S, Dv]``, LSE ``[B, H, S]`` (natural), CERTIFICATE ``[B, H, S, 3]``, EVIDENCE
    ``[B, H, S, 3]`` (live, squared relative error, not finite), COUNTS ``[B*G, blocks, 2]`` (live, refined)."""
    wait_for_launch(PDL)
    row, bg, block = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    b, g = bg // kv_heads, bg % kv_heads
    head = g * GROUP + row % GROUP
    token = first_token + block * TOKENS + row // GROUP
    if token < queries:
        place = bg.to(tl.int64) * tl.num_programs(2) + block
        first_slot = place * slots + splits  # what the refinement left; it has taken in the look-ahead's results
        segments = slots - splits
        index = tl.arange(0, SEGMENTS_P2)
        inside = index < segments
        meta = META + (first_slot + index) * FIELDS * GP + row
        top = tl.load(meta, mask=inside, other=EMPTY)
        most = tl.max(top, 0)
        seen = most > EMPTY
        if HAS_SINKS:
            sink = tl.load(SINKS + head).to(tl.float32) * LOG2E
            most = tl.where(seen, tl.maximum(most, sink), most)
        share = tl.exp2(top - most)
        keys_total = tl.sum(tl.load(meta + GP, mask=inside, other=0.0) * share, 0)
        total = keys_total
        if HAS_SINKS:
            total += tl.where(seen, tl.exp2(sink - most), 0.0)
        # A NaN among the maxima is not seen by a maximum; it is by a sum.
        spoilt = tl.sum(tl.where(inside, top * 0.0, 0.0), 0) + total * 0.0
        inverse = tl.where(seen, 1.0 / total, 0.0) + spoilt

        columns = tl.arange(0, VP)
        x = tl.zeros((VP,), tl.float32)
        for first in range(0, segments, CHUNK):
            part = first + tl.arange(0, CHUNK)
            there = part < segments
            part_top = tl.load(META + (first_slot + part) * FIELDS * GP + row, mask=there, other=EMPTY)
            weight, there = tl.exp2(part_top - most), there & (part_top > EMPTY)  # the others were not written
            at = PARTIAL + ((first_slot + part) * GP + row)[:, None] * VALUE_DIM + columns[None, :]
            got = tl.load(at, mask=there[:, None] & (columns < VALUE_DIM)[None, :], other=0.0)
            x += tl.sum(got * weight[:, None], 0)
        x = tl.where(seen, x * inverse, spoilt)
        square = tl.sum(x * x, 0)
        place_out = ((b * heads + head) * queries + token).to(tl.int64)
        target = OUT + place_out * VALUE_DIM
        if ROTATE:
            for first in range(0, VALUE_DIM, COLUMNS):
                j = first + tl.arange(0, COLUMNS)
                at = SIGNS + j[:, None] * VALUE_DIM + columns[None, :]
                signs = tl.load(at, mask=(j < VALUE_DIM)[:, None] & (columns < VALUE_DIM)[None, :], other=0)
                turned = tl.sum(signs.to(tl.float32) * x[None, :], 1) * root
                tl.store(target + j, turned.to(OUT.dtype.element_ty), mask=j < VALUE_DIM)
        else:
            tl.store(target + columns, x.to(OUT.dtype.element_ty), mask=columns < VALUE_DIM)

        # Certificate: every sum in units of the final weights; the largest key scale stands for all keys.
        lse = most + tl.log2(total)
        cold = tl.load(META + first_slot * FIELDS * GP + 4 * GP + row)
        old = tl.where(cold == float("-inf"), 0.0, tl.exp2(2.0 * (cold - lse)) * 256.0)
        one = tl.exp2(top - lse)
        step = tl.load(ROWINFO + place * 4 * GP + row)
        norm = tl.load(ROWINFO + (place * 4 + 2) * GP + row)
        rounding = tl.where(norm == 0.0, 0.0, step * step) * (DIM * PEAK_SQUARE)
        k_most = tl.max(tl.load(meta + 3 * GP, mask=inside, other=0.0), 0)
        scores = scale * scale / 12.0 * (k_most * k_most)
        value_mass = tl.maximum(tl.sum(tl.load(meta + 2 * GP, mask=inside, other=0.0) * one, 0), 0.0)
        squares = tl.sum(tl.load(meta + 5 * GP, mask=inside, other=0.0) * one * one, 0)
        squares += tl.sum(tl.load(meta + 7 * GP, mask=inside, other=0.0), 0) * old
        hot_value = tl.sum(tl.load(meta + 6 * GP, mask=inside, other=0.0) * one * one, 0)
        cold_value = tl.sum(tl.load(meta + 8 * GP, mask=inside, other=0.0), 0) * old
        first_sum = scores * (norm * squares + rounding * tl.maximum(keys_total / total, 0.0))
        # The int8 softmax row of the look-ahead adds at most 3 % to the value error of its own sub-tile.
        second_sum = (hot_value + cold_value * 1.03) * (VALUE_DIM / 12.0)
        third_sum = scores * (norm * (hot_value + cold_value) + rounding * value_mass) * (VALUE_DIM * PEAK_SQUARE)
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
            tl.store(counts, tl.sum(tl.load(meta + 9 * GP, mask=inside, other=0.0), 0))
            tl.store(counts + 1, tl.sum(tl.load(meta + 10 * GP, mask=inside, other=0.0), 0))


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
