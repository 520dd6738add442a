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
    LOG2E,
    key_range,
    over_parts,
    query_of,
    wait_for_launch,
)
from lamp_compile.runtime.kernels.correct import corrected


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
def decide(
    ENERGY, OTHER, PEAK, place, subtiles, tile, end, row_valid, tau, lse, largest,
    GROUP: tl.constexpr, GP: tl.constexpr, TOKENS: tl.constexpr, BN: tl.constexpr, RULE: tl.constexpr,
):  # fmt: skip
    """Which sub-tiles ``[SEGMENT]`` of those looked at (they begin before ``end``) to refine: one decision for all rows
    that share them. Also, by how many tokens each is seen; and what the others, which stay at the high plane, add to
    the certificate: sums of squared weights, and of these times squared value scales ``[GP]``."""
    rows = tl.arange(0, GP)
    looked = tile * BN < end
    read = looked[:, None] & row_valid[None, :]
    at = (place * subtiles + tile)[:, None] * GP + rows[None, :]
    energy = tl.load(ENERGY + at, mask=read, other=DEAD)
    bar = tl.log2(tau)
    # Not "above the bar" but "not below it": what is NaN cannot be judged and is refined.
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
    if TOKENS == 1:
        tokens_live = tl.max(live.to(tl.int32), 1)
    else:  # several tokens: the first head stands for its group
        tokens_live = tl.sum((live & ((rows % GROUP == 0) & row_valid)[None, :]).to(tl.int32), 1)
    z = tl.where(live & (hot == 0)[:, None], tl.exp2(2.0 * (energy - lse[None, :])), 0.0)
    v_peaks = tl.load(PEAK + place * subtiles + tile, mask=looked, other=0.0)
    return hot, tokens_live, tl.sum(z, 0), tl.sum(z * (v_peaks * v_peaks)[:, None], 0)


@triton.jit
def decided(ENERGY, PEAK, LEVELS, place, subtiles, tile, end, row_valid, tau, lse, known,
            GP: tl.constexpr, BN: tl.constexpr):  # fmt: skip
    """``decide`` of one token by the energy rule, where ``known`` says that LEVELS decides."""
    rows = tl.arange(0, GP)
    looked = tile * BN < end
    level = tl.load(LEVELS + tile, mask=looked, other=0).to(tl.int32)
    listed = looked & (level == 1)  # all that live where the gate is not used
    read = listed[:, None] & row_valid[None, :]
    energy = tl.load(ENERGY + (place * subtiles + tile)[:, None] * GP + rows[None, :], mask=read, other=DEAD)
    above = (energy <= (tl.log2(tau) + lse)[None, :]) == 0
    live = ((energy < EMPTY) == 0) & read
    hot = tl.max((above & live).to(tl.int32), 1)
    hot = tl.where(known, (level == 2).to(tl.int32), hot)
    tokens_live = tl.where(known, (level != 0).to(tl.int32), tl.max(live.to(tl.int32), 1))
    z = tl.where(live & (hot == 0)[:, None], tl.exp2(2.0 * (energy - lse[None, :])), 0.0)
    v_peaks = tl.load(PEAK + place * subtiles + tile, mask=listed & (hot == 0), other=0.0)
    return hot, tokens_live, tl.sum(z, 0), tl.sum(z * (v_peaks * v_peaks)[:, None], 0)


@triton.jit
def by_rows(x, to_row, PACK: tl.constexpr, GP: tl.constexpr):
    """``[n, columns]`` -> ``[n, GP]``: columns of the same row into one, each by its factor."""
    return tl.sum(tl.reshape(x * to_row[None, :], (x.shape[0], PACK, GP)), 1)


@triton.jit(
    do_not_specialize=["queries", "first_token", "keys", "subtiles", "slots", "splits", "segments", "least_tiles"],
    do_not_specialize_on_alignment=["START", "LENGTHS", "TABLE"],
)
def refine(
    Q8, ROWINFO, KH, KL, KS, VH, VL, VS, TAU, FLOOR, STATE, SINKS, MASK, BIAS, START, LENGTHS, TABLE, PARTIAL, META,
    ENERGY, OTHER, PEAK, LEVELS, COUNTS,
    tau_b, floor_b, mask_b, mask_h, mask_s, mask_key, bias_b, bias_h, bias_s, bias_key, start_stride, length_stride,
    table_stride, kv_heads, queries, first_token, keys, plane_keys, subtiles, slots, splits, segments, least_tiles,
    scale, softcap,
    GROUP: tl.constexpr, GP: tl.constexpr, PACK: tl.constexpr, TOKENS: tl.constexpr, HALF_K: tl.constexpr,
    HP_K: tl.constexpr, HALF_V: tl.constexpr, HP_V: tl.constexpr, BN: tl.constexpr, TILE: tl.constexpr,
    RULE: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, HAS_MASK: tl.constexpr,
    KEY_MASK: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_START: tl.constexpr, HAS_LENGTHS: tl.constexpr, PAGED: tl.constexpr, ASM: tl.constexpr,
    FIELDS: tl.constexpr, SPLITS_P2: tl.constexpr, SEGMENT: tl.constexpr, HAS_SINKS: tl.constexpr,
    PDL: tl.constexpr, LISTED: tl.constexpr,
):  # fmt: skip
    """Corrections of one segment for one block of rows, as one more partial result. With LISTED, of a head whose LEVELS
    were known before (COUNTS, ``predict.py``), the sub-tiles that the look-ahead has left out for it: nothing is taken
    back, and their energies are written for the audit."""
    wait_for_launch(PDL)
    segment, bg, block = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    b, g = bg // kv_heads, bg % kv_heads
    COLUMNS: tl.constexpr = PACK * GP
    column, rows = tl.arange(0, COLUMNS), tl.arange(0, GP)
    row = column % GP
    token = first_token + block * TOKENS + row // GROUP
    row_valid = (rows < GROUP * TOKENS) & (first_token + block * TOKENS + rows // GROUP < queries)
    lo, hi, position = key_range(
        b, first_token + block * TOKENS, tl.minimum(first_token + block * TOKENS + TOKENS, queries) - 1, START, LENGTHS,
        start_stride, length_stride, keys, queries, HAS_START, HAS_LENGTHS, CAUSAL, WINDOW,
    )  # fmt: skip
    place = bg.to(tl.int64) * tl.num_programs(2) + block
    slot = place * slots + splits + segment
    # A short sequence has fewer segments than the longest.
    taking = tl.minimum(segments, tl.maximum(1, tl.cdiv(tl.cdiv(hi, BN) - lo // BN, least_tiles)))
    if segment >= taking:
        nothing = tl.zeros((GP,), tl.float32)
        tl.store(META + slot * FIELDS * GP + rows, nothing + EMPTY)
        for field in tl.static_range(1, FIELDS):
            tl.store(META + (slot * FIELDS + field) * GP + rows, nothing)
        return
    tau = tl.load(TAU + b * tau_b + g)
    all_refined = (tl.load(FLOOR + b * floor_b + g) >= 1.0) | (tl.load(STATE + bg * 4 + 1) >= 1.0) | (tau <= 0.0)
    known = all_refined
    if LISTED:
        use = tl.load(COUNTS + bg * 4 + 1) != 0
        known, all_refined = known | use, all_refined & (use == 0)
    delta = tl.where(known, 0.0, 1.0)
    lse, largest = looked_ahead(
        META, SINKS, place, slots, splits, g * GROUP + rows % GROUP, row_valid, GP, FIELDS, SPLITS_P2, HAS_SINKS
    )

    tile = lo // BN + segment + tl.arange(0, SEGMENT) * taking
    if LISTED:
        hot, tokens_live, cold_square, cold_value = decided(
            ENERGY, PEAK, LEVELS + bg.to(tl.int64) * subtiles, place, subtiles, tile, tl.where(all_refined, 0, hi),
            row_valid, tau, lse, known, GP, BN,
        )  # fmt: skip
    else:
        hot, tokens_live, cold_square, cold_value = decide(
            ENERGY, OTHER, PEAK, place, subtiles, tile, tl.where(all_refined, 0, hi), row_valid, tau, lse, largest,
            GROUP, GP, TOKENS, BN, RULE,
        )  # fmt: skip
    live_count, hot_count = tl.sum(tokens_live, 0), tl.sum(tokens_live * hot, 0)
    hot = tl.where(all_refined, (tile * BN < hi).to(tl.int32), hot)
    order, count = tl.cumsum(hot, 0), tl.sum(hot, 0)

    q_upper, q_lower, factor, query_sum, origin = query_of(Q8, ROWINFO, place, row, scale, GP, HP_K)
    cold_offset, offset = query_sum * 0.5, query_sum * 8.0
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

    # This segment's share of the look-ahead's own partial results is joined at the end, relative to the same maximum.
    base = tl.full((GP,), EMPTY, tl.float32)
    for split in range(segment, splits, taking):
        base = tl.maximum(base, tl.load(META + (place * slots + split) * FIELDS * GP + rows))
    top = tl.reshape(tl.broadcast_to(base[None, :], (PACK, GP)), (COLUMNS,))
    counted = (row < GROUP * TOKENS) & ((row % GROUP == 0) | (TOKENS == 1))
    if KEY_MASK:
        MASK += b.to(tl.int64) * mask_b
    if LISTED:
        energies = ENERGY + place * subtiles * GP
        if known:
            upper, lower, shift, mass, value_mass, square, value_square, k_most, seen_tiles, top = corrected(
                KH, KL, KS, VH, VL, VS, TABLE, MASK, BIAS, energies, q_upper, q_lower, factor, cold_offset, offset,
                origin, order, hot, tile, count, top, counted, row_position, mask_rows, bias_rows, lo, hi, mask_key,
                bias_key, softcap, 0.0, GROUP, GP, PACK, TOKENS, HALF_K, HP_K, HALF_V, HP_V, BN, TILE, CAUSAL, WINDOW,
                SOFTCAP, HAS_MASK, KEY_MASK, HAS_BIAS, PAGED, ASM, False,
            )  # fmt: skip
        else:
            upper, lower, shift, mass, value_mass, square, value_square, k_most, seen_tiles, top = corrected(
                KH, KL, KS, VH, VL, VS, TABLE, MASK, BIAS, energies, q_upper, q_lower, factor, cold_offset, offset,
                origin, order, hot, tile, count, top, counted, row_position, mask_rows, bias_rows, lo, hi, mask_key,
                bias_key, softcap, delta, GROUP, GP, PACK, TOKENS, HALF_K, HP_K, HALF_V, HP_V, BN, TILE, CAUSAL, WINDOW,
                SOFTCAP, HAS_MASK, KEY_MASK, HAS_BIAS, PAGED, ASM, True,
            )  # fmt: skip
    else:
        upper, lower, shift, mass, value_mass, square, value_square, k_most, seen_tiles, top = corrected(
            KH, KL, KS, VH, VL, VS, TABLE, MASK, BIAS, ENERGY, q_upper, q_lower, factor, cold_offset, offset, origin,
            order, hot, tile, count, top, counted, row_position, mask_rows, bias_rows, lo, hi, mask_key, bias_key,
            softcap, delta, GROUP, GP, PACK, TOKENS, HALF_K, HP_K, HALF_V, HP_V, BN, TILE, CAUSAL, WINDOW, SOFTCAP,
            HAS_MASK, KEY_MASK, HAS_BIAS, PAGED, ASM, True,
        )  # fmt: skip

    # Columns of the same row into one.
    base = tl.max(over_parts(top, PACK, GP), 0)
    to_row = tl.exp2(top - tl.reshape(tl.broadcast_to(base[None, :], (PACK, GP)), (COLUMNS,)))
    moved = tl.sum(shift, 0)[None, :]
    upper_rows, lower_rows = by_rows(upper + moved, to_row, PACK, GP), by_rows(lower + moved, to_row, PACK, GP)
    masses = tl.sum(by_rows(mass, to_row, PACK, GP), 0)
    value_masses = tl.sum(by_rows(value_mass, to_row, PACK, GP), 0)
    most = tl.max(tl.max(k_most, 0), 0)
    half_v = tl.arange(0, HP_V)
    stored = (rows < GROUP * TOKENS)[None, :] & (half_v < HALF_V)[:, None]
    for split in range(segment, splits, taking):
        meta = META + (place * slots + split) * FIELDS * GP + rows
        split_top = tl.load(meta)
        share = tl.exp2(split_top - base)
        written = stored & (split_top > EMPTY)[None, :]
        masses += tl.load(meta + GP) * share
        value_masses += tl.load(meta + 2 * GP) * share
        most = tl.maximum(most, tl.max(tl.load(meta + 3 * GP), 0))
        source = PARTIAL + ((place * slots + split) * GP + rows)[None, :] * (2 * HALF_V) + half_v[:, None]
        upper_rows += tl.load(source, mask=written, other=0.0) * share[None, :]
        lower_rows += tl.load(source + HALF_V, mask=written, other=0.0) * share[None, :]
    meta = META + slot * FIELDS * GP + rows
    tl.store(meta, base)
    tl.store(meta + GP, masses)
    tl.store(meta + 2 * GP, value_masses)
    tl.store(meta + 3 * GP, most + tl.zeros((GP,), tl.float32))
    tl.store(meta + 4 * GP, lse)
    tl.store(meta + 5 * GP, tl.sum(by_rows(square, to_row * to_row, PACK, GP), 0))
    tl.store(meta + 6 * GP, tl.sum(by_rows(value_square, to_row * to_row, PACK, GP), 0))
    tl.store(meta + 7 * GP, cold_square)
    tl.store(meta + 8 * GP, cold_value)
    all_count = tl.sum(seen_tiles, 0)
    tl.store(meta + 9 * GP, tl.where(all_refined, all_count, live_count.to(tl.float32)) + tl.zeros((GP,), tl.float32))
    tl.store(meta + 10 * GP, tl.where(all_refined, all_count, hot_count.to(tl.float32)) + tl.zeros((GP,), tl.float32))
    target = PARTIAL + (slot * GP + rows)[None, :] * (2 * HALF_V) + half_v[:, None]
    tl.store(target, upper_rows, mask=stored)
    tl.store(target + HALF_V, lower_rows, mask=stored)
