"""Fourth launch: refine what matters.

Programs share the list of a kv head evenly. For each sub-tile on it they compute the exact difference to what the
look-ahead added: weights and values from both planes, minus weights and values from the high plane, rounded as they
were there.
Where everything is refined the look-ahead has read nothing, and this is the whole attention in one pass.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lamp_compile.runtime.kernels._device import (
    EMPTY,
    key_range,
    over_parts,
    query_of,
    settings_of,
    wait_for_launch,
)
from lamp_compile.runtime.kernels.correct import corrected
from lamp_compile.runtime.kernels.decide import shared_by


@triton.jit
def by_rows(x, to_row, PACK: tl.constexpr, GP: tl.constexpr):
    """``[n, columns]`` -> ``[n, GP]``: columns of the same row into one, each by its factor."""
    return tl.sum(tl.reshape(x * to_row[None, :], (x.shape[0], PACK, GP)), 1)


@triton.jit
def of_split(
    PARTIAL, META, slot, row, valid, GP: tl.constexpr, HALF_V: tl.constexpr, HP_V: tl.constexpr, FIELDS: tl.constexpr
):  # fmt: skip
    """What a program of the look-ahead has left of rows ``[n]``: maximum, sum, sum of p times squared value scale,
    largest key scale, and both halves of the output ``[HP_V, n]``, which it has not written where no key is seen."""
    meta, half_v = META + slot * FIELDS * GP + row, tl.arange(0, HP_V)
    source = PARTIAL + (slot * GP + row)[None, :] * (2 * HALF_V) + half_v[:, None]
    inside = valid[None, :] & (half_v < HALF_V)[:, None]
    upper, lower = tl.load(source, mask=inside, other=0.0), tl.load(source + HALF_V, mask=inside, other=0.0)
    return tl.load(meta), tl.load(meta + GP), tl.load(meta + 2 * GP), tl.load(meta + 3 * GP), upper, lower


@triton.jit(
    do_not_specialize=["queries", "first_token", "keys", "subtiles", "slots", "splits", "chunks"],
    do_not_specialize_on_alignment=["START", "LENGTHS"],
)
def refine(
    Q8, ROWINFO, KH, KL, KS, VH, VL, VS, MASK, BIAS, START, LENGTHS, PARTIAL, META, ENERGY,
    HOT, HOT_PLACES, TAKEN, COUNTS,
    mask_b, mask_h, mask_s, mask_key, bias_b, bias_h, bias_s, bias_key, start_stride, length_stride,
    kv_heads, queries, first_token, keys, plane_keys, subtiles, slots, splits, chunks, scale, softcap,
    GROUP: tl.constexpr, GP: tl.constexpr, PACK: tl.constexpr, TOKENS: tl.constexpr, HALF_K: tl.constexpr,
    HP_K: tl.constexpr, HALF_V: tl.constexpr, HP_V: tl.constexpr, BN: tl.constexpr, TILE: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, HAS_MASK: tl.constexpr,
    KEY_MASK: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_START: tl.constexpr, HAS_LENGTHS: tl.constexpr, PAGED: tl.constexpr, ASM: tl.constexpr,
    FIELDS: tl.constexpr, CHUNKS_P2: tl.constexpr, PDL: tl.constexpr, LISTED: tl.constexpr,
    FOLD: tl.constexpr,
):  # fmt: skip
    """Corrections of one block of rows by its share of the sub-tiles in HOT, as one more partial result; programs that
    TAKEN (``decide.py``) has no work for leave none. With LISTED, of a head whose levels were known before (COUNTS,
    ``predict.py``), these are what the look-ahead has left out: nothing is taken back, and their energies are
    written for the audit.

    META ``[.., slots, FIELDS, GP]`` takes maximum, sum, sum of p times squared value scale, largest key scale,
    sub-tiles seen where everything is refined, sums of squared weights, and of these times squared value scales.
    """
    segment, bg, block = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    b, g = bg // kv_heads, bg % kv_heads
    COLUMNS: tl.constexpr = PACK * GP
    column, rows = tl.arange(0, COLUMNS), tl.arange(0, GP)
    row = column % GP
    token = first_token + block * TOKENS + row // GROUP
    lo, hi, position = key_range(
        b, first_token + block * TOKENS, tl.minimum(first_token + block * TOKENS + TOKENS, queries) - 1, START, LENGTHS,
        start_stride, length_stride, keys, queries, HAS_START, HAS_LENGTHS, CAUSAL, WINDOW,
    )  # fmt: skip
    place = bg.to(tl.int64) * tl.num_programs(2) + block
    slot = place * slots + splits + segment
    # What the first launch has left was there before the one ahead of this one began.
    _, all_refined = settings_of(ROWINFO, place, GP)
    q_upper, q_lower, factor, query_sum, origin = query_of(Q8, ROWINFO, place, row, scale, GP, HP_K)
    cold_offset, offset = query_sum * 0.5, query_sum * 8.0
    wait_for_launch(PDL)
    HOT += place * subtiles
    HOT_PLACES += place * subtiles
    # The head of its list and the look-ahead's result that it joins first, read before it is known whether they exist.
    entry = segment * PACK + tl.arange(0, PACK)
    early = tl.maximum(tl.minimum(entry, subtiles - 1), 0)
    tiles = tl.load(HOT + early)
    places = tiles
    if PAGED:
        places = tl.load(HOT_PLACES + early).to(tl.int64)
    joined = place * slots + tl.minimum(segment, splits - 1)
    split_top, mass, value_mass, split_most, upper, lower = of_split(
        PARTIAL, META, joined, row, column < GROUP * TOKENS, GP, HALF_V, HP_V, FIELDS
    )
    count, filled, taking = shared_by(TAKEN, place, chunks, tl.num_programs(0), PACK, CHUNKS_P2)
    if segment >= taking:
        return
    tiles, places = tl.where(entry < count, tiles, 0), tl.where(entry < count, places, 0)
    known = all_refined
    if LISTED:
        use = tl.load(COUNTS + bg * 4 + 1) != 0
        known, all_refined = known | use, all_refined & (use == 0)
    delta = tl.where(known, 0.0, 1.0)
    row_position = position + token
    head = (g * GROUP + row % GROUP).to(tl.int64)
    real = tl.minimum(token, queries - 1).to(tl.int64)  # of the last block some tokens may be none
    mask_rows = b.to(tl.int64) * mask_b + head * mask_h + real * mask_s
    bias_rows = b.to(tl.int64) * bias_b + head * bias_h + real * bias_s
    plane = (g if PAGED else bg).to(tl.int64) * plane_keys
    KH += plane * HALF_K
    KL += plane * HALF_K
    VH += plane * HALF_V
    VL += plane * HALF_V
    KS += plane
    VS += plane

    # Its share of the look-ahead's results: the first is what its sums begin with, others, where programs are few, are
    # joined at the end, relative to the same maximum.
    mine = segment < filled
    top = tl.maximum(tl.where(mine, split_top, EMPTY), EMPTY)
    for split in range(segment + taking, filled, taking):
        top = tl.maximum(top, tl.load(META + (place * slots + split) * FIELDS * GP + row))
    share = tl.exp2(split_top - top)
    mine &= column < GP  # the columns of the first sub-tile
    written = (mine & (split_top > EMPTY))[None, :]
    upper = tl.where(written, upper * share[None, :], 0.0)
    lower = tl.where(written, lower * share[None, :], 0.0)
    at_first = (tl.arange(0, FOLD) == 0)[:, None] & mine[None, :]  # a sum may be NaN where nothing is written
    mass = tl.where(at_first, (mass * share)[None, :], 0.0)
    value_mass = tl.where(at_first, (value_mass * share)[None, :], 0.0)
    counted = (row < GROUP * TOKENS) & (token < queries) & ((row % GROUP == 0) | (TOKENS == 1))
    if KEY_MASK:
        MASK += b.to(tl.int64) * mask_b
    first, stride = segment * PACK, taking * PACK
    if LISTED:
        energies = ENERGY + place * subtiles * GP
        if known:
            upper, lower, shift, mass, value_mass, square, value_square, k_most, seen_tiles, top = corrected(
                KH, KL, KS, VH, VL, VS, MASK, BIAS, energies, HOT, HOT_PLACES, q_upper, q_lower, factor, cold_offset,
                offset, origin, first, count, stride, tiles, places, upper, lower, mass, value_mass, top, counted,
                row_position, mask_rows, bias_rows, lo, hi, mask_key, bias_key, softcap, 0.0, GROUP, GP, PACK, TOKENS,
                HALF_K, HP_K, HALF_V, HP_V, BN, TILE, CAUSAL, WINDOW, SOFTCAP, HAS_MASK, KEY_MASK, HAS_BIAS, PAGED, ASM,
                FOLD, False,
            )  # fmt: skip
        else:
            upper, lower, shift, mass, value_mass, square, value_square, k_most, seen_tiles, top = corrected(
                KH, KL, KS, VH, VL, VS, MASK, BIAS, energies, HOT, HOT_PLACES, q_upper, q_lower, factor, cold_offset,
                offset, origin, first, count, stride, tiles, places, upper, lower, mass, value_mass, top, counted,
                row_position, mask_rows, bias_rows, lo, hi, mask_key, bias_key, softcap, delta, GROUP, GP, PACK, TOKENS,
                HALF_K, HP_K, HALF_V, HP_V, BN, TILE, CAUSAL, WINDOW, SOFTCAP, HAS_MASK, KEY_MASK, HAS_BIAS, PAGED, ASM,
                FOLD, True,
            )  # fmt: skip
    else:
        upper, lower, shift, mass, value_mass, square, value_square, k_most, seen_tiles, top = corrected(
            KH, KL, KS, VH, VL, VS, MASK, BIAS, ENERGY, HOT, HOT_PLACES, q_upper, q_lower, factor, cold_offset, offset,
            origin, first, count, stride, tiles, places, upper, lower, mass, value_mass, top, counted, row_position,
            mask_rows, bias_rows, lo, hi, mask_key, bias_key, softcap, delta, GROUP, GP, PACK, TOKENS, HALF_K, HP_K,
            HALF_V, HP_V, BN, TILE, CAUSAL, WINDOW, SOFTCAP, HAS_MASK, KEY_MASK, HAS_BIAS, PAGED, ASM, FOLD, True,
        )  # fmt: skip

    # Columns of the same row into one.
    base = tl.max(over_parts(top, PACK, GP), 0)
    to_row = tl.exp2(top - tl.reshape(tl.broadcast_to(base[None, :], (PACK, GP)), (COLUMNS,)))
    moved = tl.sum(shift, 0)[None, :]
    upper_rows, lower_rows = by_rows(upper + moved, to_row, PACK, GP), by_rows(lower + moved, to_row, PACK, GP)
    masses = tl.sum(by_rows(mass, to_row, PACK, GP), 0)
    value_masses = tl.sum(by_rows(value_mass, to_row, PACK, GP), 0)
    most = tl.maximum(tl.max(tl.max(k_most, 0), 0), tl.max(tl.where(mine, split_most, 0.0), 0))
    half_v = tl.arange(0, HP_V)
    stored = (rows < GROUP * TOKENS)[None, :] & (half_v < HALF_V)[:, None]
    for split in range(segment + taking, filled, taking):
        other_top, other_mass, other_value, other_most, other_upper, other_lower = of_split(
            PARTIAL, META, place * slots + split, rows, rows < GROUP * TOKENS, GP, HALF_V, HP_V, FIELDS
        )
        part, seen = tl.exp2(other_top - base), (other_top > EMPTY)[None, :]
        masses += other_mass * part
        value_masses += other_value * part
        most = tl.maximum(most, tl.max(other_most, 0))
        upper_rows += tl.where(seen, other_upper, 0.0) * part[None, :]
        lower_rows += tl.where(seen, other_lower, 0.0) * part[None, :]
    meta = META + slot * FIELDS * GP + rows
    tl.store(meta, base)
    tl.store(meta + GP, masses)
    tl.store(meta + 2 * GP, value_masses)
    tl.store(meta + 3 * GP, most + tl.zeros((GP,), tl.float32))
    all_count = tl.where(all_refined, tl.sum(seen_tiles, 0), 0.0)
    tl.store(meta + 4 * GP, all_count + tl.zeros((GP,), tl.float32))
    tl.store(meta + 5 * GP, tl.sum(by_rows(square, to_row * to_row, PACK, GP), 0))
    tl.store(meta + 6 * GP, tl.sum(by_rows(value_square, to_row * to_row, PACK, GP), 0))
    target = PARTIAL + (slot * GP + rows)[None, :] * (2 * HALF_V) + half_v[:, None]
    tl.store(target, upper_rows, mask=stored)
    tl.store(target + HALF_V, lower_rows, mask=stored)
