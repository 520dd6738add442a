"""Third launch: decide, with the finished log-sum-exp of the same query, and refine what matters.

A program takes every ``segments``-th sub-tile of one kv head, so that clusters of important keys (the newest, the
first) spread over programs. For each sub-tile it refines it computes the exact difference to what the look-ahead
added: weights and values from both planes, minus weights and values from the high plane, rounded as they were there.
Where everything is refined the look-ahead has read nothing, and this is the whole attention in one pass.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lamp_compile.runtime.kernels._device import (
    DEAD,
    EMPTY,
    HEADROOM,
    LOG2E,
    MAGIC,
    MAGIC_BITS,
    finite_scale,
    key_range,
    lower_bytes,
    lower_nibbles,
    over_parts,
    to_columns,
    upper_bytes,
    upper_nibbles,
    weigh,
)
from lamp_compile.runtime.kernels.look_ahead import (
    dither,
    key_places,
    load_keys,
    load_values,
    round_row,
    scores_of,
    seen_scores,
)


@triton.jit
def looked_ahead(META, SINKS, place, slots, splits, head, valid,
                 GP: tl.constexpr, FIELDS: tl.constexpr, SPLITS_P2: tl.constexpr, HAS_SINKS: tl.constexpr):  # fmt: skip
    """Of the rows: log2 of the sum over all looked-ahead keys (and the sink), -inf without a live key; the largest
    importance of rules other than energy."""
    index, rows = tl.arange(0, SPLITS_P2), tl.arange(0, GP)
    meta = META + (place * slots + index)[:, None] * FIELDS * GP + rows[None, :]
    inside = (index < splits)[:, None] & valid[None, :]
    top = tl.load(meta, mask=inside, other=EMPTY)
    total = tl.load(meta + GP, mask=inside, other=0.0)
    most = tl.max(top, 0)
    total = tl.sum(total * tl.exp2(top - most[None, :]), 0)
    if HAS_SINKS:
        sink = tl.load(SINKS + head).to(tl.float32) * LOG2E
        new = tl.maximum(most, sink)
        total = tl.where(total == 0.0, 0.0, total * tl.exp2(most - new) + tl.exp2(sink - new))
        most = new
    largest = tl.max(tl.load(meta + 4 * GP, mask=inside, other=DEAD), 0)
    return most + tl.log2(total), largest


@triton.jit
def picked(first, order, hot, tile, PACK: tl.constexpr):
    """The chosen sub-tiles first .. first + PACK - 1 of a segment ``[PACK]``; 0 behind the last."""
    wanted = first + 1 + tl.arange(0, PACK)
    match = (order[:, None] == wanted[None, :]) & (hot == 1)[:, None]
    return tl.sum(tl.where(match, tile[:, None], 0), 0)


@triton.jit
def refine(
    Q8, ROWINFO, KH, KL, KS, VH, VL, VS, TAU, FLOOR, STATE, SINKS, MASK, BIAS, START, LENGTHS, TABLE, PARTIAL, META,
    ENERGY, OTHER, PEAK,
    tau_b, floor_b, mask_b, mask_h, mask_s, mask_key, bias_b, bias_h, bias_s, bias_key, start_stride, length_stride,
    table_stride, kv_heads, queries, first_token, keys, plane_keys, subtiles, slots, splits, segments, scale, softcap,
    GROUP: tl.constexpr, GP: tl.constexpr, PACK: tl.constexpr, TOKENS: tl.constexpr, HALF_K: tl.constexpr,
    HP_K: tl.constexpr, HALF_V: tl.constexpr, HP_V: tl.constexpr, BN: tl.constexpr, TILE: tl.constexpr,
    RULE: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, HAS_MASK: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_START: tl.constexpr, HAS_LENGTHS: tl.constexpr, PAGED: tl.constexpr, ASM: tl.constexpr,
    FIELDS: tl.constexpr, SPLITS_P2: tl.constexpr, SEGMENT: tl.constexpr, HAS_SINKS: tl.constexpr,
):  # fmt: skip
    """Corrections of one segment for one block of rows, as one more partial result."""
    segment, bg, block = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    b, g = bg // kv_heads, bg % kv_heads
    COLUMNS: tl.constexpr = PACK * GP
    CROSSED: tl.constexpr = (CAUSAL != 0 and TOKENS > 1) or HAS_MASK or HAS_BIAS
    MASKED: tl.constexpr = CROSSED and not HAS_BIAS or HAS_MASK
    column, rows = tl.arange(0, COLUMNS), tl.arange(0, GP)
    row, part = column % GP, column // GP
    token = first_token + block * TOKENS + row // GROUP
    row_valid = (rows < GROUP * TOKENS) & (first_token + block * TOKENS + rows // GROUP < queries)
    lo, hi, position = key_range(
        b, first_token + block * TOKENS, tl.minimum(first_token + block * TOKENS + TOKENS, queries) - 1, START, LENGTHS,
        start_stride, length_stride, keys, queries, HAS_START, HAS_LENGTHS, CAUSAL, WINDOW,
    )  # fmt: skip
    tau = tl.load(TAU + b * tau_b + g)
    all_refined = (tl.load(FLOOR + b * floor_b + g) >= 1.0) | (tl.load(STATE + bg * 4 + 1) >= 1.0) | (tau <= 0.0)
    delta = tl.where(all_refined, 0.0, 1.0)
    place = bg.to(tl.int64) * tl.num_programs(2) + block
    lse, largest = looked_ahead(
        META, SINKS, place, slots, splits, g * GROUP + rows % GROUP, row_valid, GP, FIELDS, SPLITS_P2, HAS_SINKS
    )

    # Which sub-tiles of this segment: one decision for all rows that share them.
    tile = lo // BN + segment + tl.arange(0, SEGMENT) * segments
    inside = tile * BN < hi
    at = (place * subtiles + tile)[:, None] * GP + rows[None, :]
    looked = tile * BN < tl.where(all_refined, 0, hi)  # what the look-ahead has seen
    read = looked[:, None] & row_valid[None, :]
    energy = tl.load(ENERGY + at, mask=read, other=DEAD)
    bar = tl.log2(tau)
    if RULE == 0:
        hot = (energy <= (bar + lse)[None, :]) == 0
    else:
        other = tl.load(OTHER + at, mask=read, other=DEAD)
        if RULE == 1:
            hot = (other + 1.0 <= (bar + lse)[None, :]) == 0
        else:
            hot = (other <= (bar + largest)[None, :]) == 0
    live = ((energy < EMPTY) == 0) & read
    hot = tl.max((hot & live).to(tl.int32), 1)
    hot = tl.where(all_refined, inside.to(tl.int32), hot)
    order = tl.cumsum(hot, 0)
    count = tl.sum(hot, 0)
    one_per_token = ((rows % GROUP == 0) & row_valid)[None, :]
    live_count = tl.sum(tl.sum((live & one_per_token).to(tl.int32), 1), 0)
    hot_count = tl.sum(tl.sum((live & one_per_token & (hot != 0)[:, None]).to(tl.int32), 1), 0)
    # What stays at the high plane: its share of the certificate, from energies and largest value scales.
    z = tl.where(live & (hot == 0)[:, None], tl.exp2(2.0 * (energy - lse[None, :])), 0.0)
    v_peaks = tl.load(PEAK + place * subtiles + tile, mask=looked, other=0.0)
    cold_square = tl.sum(z, 0)
    cold_value = tl.sum(z * (v_peaks * v_peaks)[:, None], 0)

    info = ROWINFO + place * 4 * GP + row
    factor = tl.load(info) * (scale * LOG2E)
    query_sum = tl.load(info + GP)
    cold_offset = query_sum * 0.5 + tl.load(info + 3 * GP) * 128.0
    half_k = tl.arange(0, HP_K)
    query = Q8 + place * GP * 2 * HP_K + row[None, :] * (2 * HP_K) + half_k[:, None]
    q_upper, q_lower = tl.load(query), tl.load(query + HP_K)
    row_position = position + token
    head = (g * GROUP + row % GROUP).to(tl.int64)
    mask_rows = b.to(tl.int64) * mask_b + head * mask_h + token.to(tl.int64) * mask_s
    bias_rows = b.to(tl.int64) * bias_b + head * bias_h + token.to(tl.int64) * bias_s
    plane = (g if PAGED else bg).to(tl.int64) * plane_keys
    if PAGED:
        TABLE += b * table_stride
    KH += plane * HALF_K
    KL += plane * HALF_K
    VH += plane * HALF_V
    VL += plane * HALF_V
    KS += plane
    VS += plane
    thresholds = dither(BN)
    key, parts = tl.arange(0, BN), tl.arange(0, PACK)

    top = tl.full((COLUMNS,), EMPTY, tl.float32)
    upper = tl.zeros((HP_V, COLUMNS), tl.float32)
    lower = tl.zeros((HP_V, COLUMNS), tl.float32)
    rounded_cold = tl.zeros((BN, COLUMNS), tl.float32)
    rounded = tl.zeros((BN, COLUMNS), tl.float32)
    mass = tl.zeros((BN, COLUMNS), tl.float32)
    mass_cold = tl.zeros((BN, COLUMNS), tl.float32)
    value_cold = tl.zeros((BN, COLUMNS), tl.float32)
    key_mass = tl.zeros((BN, COLUMNS), tl.float32)
    both_mass = tl.zeros((BN, COLUMNS), tl.float32)
    hot_key = tl.zeros((COLUMNS,), tl.float32)
    hot_value = tl.zeros((COLUMNS,), tl.float32)
    hot_both = tl.zeros((COLUMNS,), tl.float32)
    seen_tiles = tl.zeros((COLUMNS,), tl.float32)
    next_tiles = picked(0, order, hot, tile, PACK)
    at_scale = key_places(key[:, None] + next_tiles[None, :] * BN, hi, TABLE, TILE, PAGED)
    next_k, next_v = tl.load(KS + at_scale), tl.load(VS + at_scale)
    for i in range(0, count, PACK):
        tiles = next_tiles
        k_narrow, v_narrow = finite_scale(next_k), finite_scale(next_v)
        next_tiles = picked(i + PACK, order, hot, tile, PACK)
        at_scale = key_places(key[:, None] + next_tiles[None, :] * BN, hi, TABLE, TILE, PAGED)
        next_k, next_v = tl.load(KS + at_scale), tl.load(VS + at_scale)
        product = tl.full((BN, COLUMNS), MAGIC_BITS, tl.int32)
        low_product = tl.zeros((BN, COLUMNS), tl.int32)
        full = tl.full((BN, COLUMNS), MAGIC_BITS, tl.int32)
        for u in tl.static_range(PACK):
            n0 = tl.sum(tl.where(parts == u, tiles, 0), 0) * BN
            at_key = key_places(n0 + key, hi, TABLE, TILE, PAGED)
            k_high = load_keys(KH, at_key, HALF_K, HP_K)
            k_low = load_keys(KL, at_key, HALF_K, HP_K)
            mine = (part == u)[None, :]
            q_up, q_down = tl.where(mine, q_upper, 0), tl.where(mine, q_lower, 0)
            product = tl.dot(upper_nibbles(k_high, ASM), q_up, product, out_dtype=tl.int32)
            low_product = tl.dot(lower_nibbles(k_high, ASM), q_down, low_product, out_dtype=tl.int32)
            full = tl.dot(upper_bytes(k_high, k_low, ASM), q_up, full, out_dtype=tl.int32)
            full = tl.dot(lower_bytes(k_high, k_low, ASM), q_down, full, out_dtype=tl.int32)
        k_scale, v_scale = to_columns(k_narrow, PACK, GP), to_columns(v_narrow, PACK, GP)
        y_cold = scores_of(product + (low_product << 4), k_scale, cold_offset, factor, softcap, SOFTCAP)
        y = scores_of(full, k_scale, query_sum * 8.0, factor, softcap, SOFTCAP)
        # Keys beyond the ends, and all of a part without a sub-tile, are seen by nobody.
        starts = tl.where(i + parts < count, tiles * BN, hi)
        j_all = to_columns(key[:, None] + starts[None, :], PACK, GP)
        v_scale = tl.where((j_all >= lo) & (j_all < hi), v_scale, 0.0)
        k_scale = tl.where((j_all >= lo) & (j_all < hi), k_scale, 0.0)
        y_cold = seen_scores(
            y_cold, j_all, lo, hi, row_position, MASK, mask_key, BIAS, bias_key, mask_rows, bias_rows, CAUSAL, WINDOW,
            TOKENS, HAS_MASK, HAS_BIAS,
        )  # fmt: skip
        y = seen_scores(
            y, j_all, lo, hi, row_position, MASK, mask_key, BIAS, bias_key, mask_rows, bias_rows, CAUSAL, WINDOW,
            TOKENS, HAS_MASK, HAS_BIAS,
        )  # fmt: skip
        local, local_cold = tl.max(y, 0), tl.max(y_cold, 0)
        p, p_cold = tl.exp2(y - local[None, :]), tl.exp2(y_cold - local_cold[None, :])
        v_peak = tl.max(v_scale, 0)
        above = tl.maximum(local, tl.where(delta > 0.0, local_cold, DEAD))
        if tl.max(above - top, 0) > HEADROOM:
            new = tl.maximum(top, above)
            keep = tl.exp2(top - new)
            upper, lower, mass, mass_cold = upper * keep, lower * keep, mass * keep, mass_cold * keep
            rounded, rounded_cold, value_cold = rounded * keep, rounded_cold * keep, value_cold * keep
            key_mass, both_mass = key_mass * keep, both_mass * keep
            hot_key, hot_value, hot_both = hot_key * keep * keep, hot_value * keep * keep, hot_both * keep * keep
            top = new
        gain, back = tl.exp2(local - top), tl.exp2(local_cold - top) * delta

        # The refined row takes two int8 products, 15 bits of weight; the row to take back is rounded as it was.
        x = weigh(p, v_scale * (16256.0 / tl.maximum(v_peak, 1e-30))[None, :], MASKED) + MAGIC
        steps = x.to(tl.int32, bitcast=True)
        coarse, fine = ((steps >> 7) & 127).to(tl.int8), (steps & 127).to(tl.int8)
        p8_cold, whole_cold = round_row(p_cold, v_scale, v_peak, thresholds, MASKED)
        unit, unit_cold = (gain * (v_peak / 16256.0))[None, :], (back * (v_peak / 127.0))[None, :]
        a = tl.zeros((HP_V, COLUMNS), tl.int32)
        c = tl.zeros((HP_V, COLUMNS), tl.int32)
        a_fine = tl.zeros((HP_V, COLUMNS), tl.int32)
        c_fine = tl.zeros((HP_V, COLUMNS), tl.int32)
        a_cold = tl.full((HP_V, COLUMNS), MAGIC_BITS, tl.int32)
        c_cold = tl.full((HP_V, COLUMNS), MAGIC_BITS, tl.int32)
        for u in tl.static_range(PACK):
            n0 = tl.sum(tl.where(parts == u, tiles, 0), 0) * BN
            at_value = key_places(n0 + key, hi, TABLE, TILE, PAGED)
            v_high = load_values(VH, at_value, TILE, HALF_V, HP_V)
            v_low = load_values(VL, at_value, TILE, HALF_V, HP_V)
            mine = (part == u)[None, :]
            my_coarse, my_fine, my_cold = tl.where(mine, coarse, 0), tl.where(mine, fine, 0), tl.where(mine, p8_cold, 0)
            up, down = upper_bytes(v_high, v_low, ASM), lower_bytes(v_high, v_low, ASM)
            a = tl.dot(up, my_coarse, a, out_dtype=tl.int32)
            a_fine = tl.dot(up, my_fine, a_fine, out_dtype=tl.int32)
            c = tl.dot(down, my_coarse, c, out_dtype=tl.int32)
            c_fine = tl.dot(down, my_fine, c_fine, out_dtype=tl.int32)
            a_cold = tl.dot(upper_nibbles(v_high, ASM), my_cold, a_cold, out_dtype=tl.int32)
            c_cold = tl.dot(lower_nibbles(v_high, ASM), my_cold, c_cold, out_dtype=tl.int32)
        upper += ((a << 7) + a_fine).to(tl.float32) * unit
        upper -= (a_cold.to(tl.float32, bitcast=True) - MAGIC) * unit_cold
        lower += ((c << 7) + c_fine).to(tl.float32) * unit
        lower -= (c_cold.to(tl.float32, bitcast=True) - MAGIC) * (unit_cold * 16.0)
        rounded += (x - MAGIC) * unit
        rounded_cold += whole_cold * unit_cold
        weight, weight_cold = p * gain[None, :], p_cold * back[None, :]
        mass += weight
        mass_cold += weight_cold
        kk, vv = k_scale * k_scale, v_scale * v_scale
        value_cold += weigh(weight_cold, vv, MASKED)
        weighed_key = weigh(weight, kk, MASKED)
        key_mass += weighed_key
        both_mass += weigh(weighed_key, vv, MASKED)
        square_key = weighed_key * weight
        hot_key += tl.sum(square_key, 0)
        hot_value += tl.sum(weigh(weight * weight, vv, MASKED), 0)
        hot_both += tl.sum(weigh(square_key, vv, MASKED), 0)
        seen_tiles += ((local < EMPTY) == 0).to(tl.float32)

    # Columns of the same row into one; lo averages -1/2 and the lower nibbles carry + 8, the bytes carry + 8.
    together = tl.max(over_parts(top, PACK, GP), 0)
    to_row = tl.exp2(top - tl.reshape(tl.broadcast_to(together[None, :], (PACK, GP)), (COLUMNS,)))
    less, more = tl.sum(rounded, 0)[None, :] * 8.0, tl.sum(rounded_cold, 0)[None, :]
    upper = tl.sum(tl.reshape((upper - less + 0.5 * more) * to_row[None, :], (HP_V, PACK, GP)), 1)
    lower = tl.sum(tl.reshape((lower - less + 128.5 * more) * to_row[None, :], (HP_V, PACK, GP)), 1)
    slot = place * slots + splits + segment
    meta = META + slot * FIELDS * GP + rows
    masses, taken = tl.sum(mass, 0) * to_row, tl.sum(mass_cold, 0) * to_row
    tl.store(meta, together)
    tl.store(meta + GP, tl.sum(over_parts(masses - taken, PACK, GP), 0))
    tl.store(meta + 2 * GP, -tl.sum(over_parts(tl.sum(value_cold, 0) * to_row, PACK, GP), 0))
    tl.store(meta + 3 * GP, tl.sum(over_parts(masses, PACK, GP), 0))
    tl.store(meta + 4 * GP, tl.sum(over_parts(tl.sum(key_mass, 0) * to_row, PACK, GP), 0))
    tl.store(meta + 5 * GP, tl.sum(over_parts(tl.sum(both_mass, 0) * to_row, PACK, GP), 0))
    tl.store(meta + 6 * GP, tl.sum(over_parts(hot_key * to_row * to_row, PACK, GP), 0))
    tl.store(meta + 7 * GP, tl.sum(over_parts(hot_value * to_row * to_row, PACK, GP), 0))
    tl.store(meta + 8 * GP, tl.sum(over_parts(hot_both * to_row * to_row, PACK, GP), 0))
    tl.store(meta + 9 * GP, cold_square)
    tl.store(meta + 10 * GP, cold_value)
    all_count = tl.sum(tl.where(row % GROUP == 0, tl.where(row < GROUP * TOKENS, seen_tiles, 0.0), 0.0), 0)
    tl.store(meta + 11 * GP, tl.where(all_refined, all_count, live_count.to(tl.float32)) + tl.zeros((GP,), tl.float32))
    tl.store(meta + 12 * GP, tl.where(all_refined, all_count, hot_count.to(tl.float32)) + tl.zeros((GP,), tl.float32))
    half_v = tl.arange(0, HP_V)
    target = PARTIAL + (slot * GP + rows)[None, :] * (2 * HALF_V) + half_v[:, None]
    stored = (rows < GROUP * TOKENS)[None, :] & (half_v < HALF_V)[:, None]
    tl.store(target, upper, mask=stored)
    tl.store(target + HALF_V, lower, mask=stored)
