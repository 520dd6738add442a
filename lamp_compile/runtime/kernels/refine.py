"""Fourth launch: refine what matters.

While the decision is made its programs join the look-ahead's results; then they share the list of a kv head evenly. For
each sub-tile on it they compute the exact difference to what the look-ahead added: weights and values from both planes,
minus weights and values from the high plane, rounded as they were there.
Where everything is refined the look-ahead has read nothing, and this is the whole attention in one pass.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lamp_compile.runtime.kernels._device import (
    EMPTY,
    everywhere,
    key_range,
    over_parts,
    query_of,
    settings_of,
    wait_for_launch,
)
from lamp_compile.runtime.kernels.correct import corrected
from lamp_compile.runtime.kernels.decide import on_lists, shared_by
from lamp_compile.runtime.kernels.look_ahead import listed


@triton.jit
def by_rows(x, to_row, PACK: tl.constexpr, GP: tl.constexpr):
    """``[n, columns]`` -> ``[n, GP]``: columns of the same row into one, each by its factor."""
    return tl.sum(tl.reshape(x * to_row[None, :], (x.shape[0], PACK, GP)), 1)


@triton.jit
def of_splits(
    PARTIAL, META, lead, segment, splits, segments, row, mine, COLUMNS: tl.constexpr, GP: tl.constexpr,
    HALF_V: tl.constexpr, HP_V: tl.constexpr, FIELDS: tl.constexpr, FOLD: tl.constexpr,
):  # fmt: skip
    """What this program joins of the look-ahead's results, of rows in the columns ``mine``, those of the first
    sub-tile: both halves of the output ``[HP_V, COLUMNS]``, sums, and sums of p times squared value scale
    ``[FOLD, COLUMNS]``, largest key scale, and the maximum that these are relative to. Programs that ``shared_by``
    gives nothing to do would join results without a key."""
    half_v = tl.arange(0, HP_V)
    inside, at_first = mine[None, :] & (half_v < HALF_V)[:, None], (tl.arange(0, FOLD) == 0)[:, None] & mine[None, :]
    top = tl.full((COLUMNS,), EMPTY, tl.float32)
    upper, lower = tl.zeros((HP_V, COLUMNS), tl.float32), tl.zeros((HP_V, COLUMNS), tl.float32)
    mass, value_mass = tl.zeros((FOLD, COLUMNS), tl.float32), tl.zeros((FOLD, COLUMNS), tl.float32)
    most = tl.zeros((COLUMNS,), tl.float32)
    for split in range(segment, splits, segments):
        slot = lead + split
        meta, source = META + slot * FIELDS * GP + row, PARTIAL + (slot * GP + row)[None, :] * (2 * HALF_V)
        # Past the first cache: what an earlier step left at the same addresses must not be found there.
        one_upper = tl.load(source + half_v[:, None], mask=inside, other=0.0, cache_modifier=".cg")
        one_lower = tl.load(source + HALF_V + half_v[:, None], mask=inside, other=0.0, cache_modifier=".cg")
        one_top, one_mass = tl.load(meta, cache_modifier=".cg"), tl.load(meta + GP, cache_modifier=".cg")
        one_value = tl.load(meta + 2 * GP, cache_modifier=".cg")
        most = tl.maximum(most, tl.load(meta + 3 * GP, cache_modifier=".cg"))
        new = tl.maximum(top, one_top)
        keep, part, written = tl.exp2(top - new), tl.exp2(one_top - new), (one_top > EMPTY)[None, :]
        # Where no key is seen the output was not written. A sum may be NaN there.
        upper = upper * keep[None, :] + tl.where(written, one_upper, 0.0) * part[None, :]
        lower = lower * keep[None, :] + tl.where(written, one_lower, 0.0) * part[None, :]
        mass = mass * keep[None, :] + tl.where(at_first, (one_mass * part)[None, :], 0.0)
        value_mass = value_mass * keep[None, :] + tl.where(at_first, (one_value * part)[None, :], 0.0)
        top = new
    return upper, lower, mass, value_mass, most, top


@triton.jit
def gathered(
    HOT, HOT_PLACES, OWN, OWN_PLACES, counts, count, entry, first, stride,
    PACK: tl.constexpr, CHUNK: tl.constexpr, PAGED: tl.constexpr,
):  # fmt: skip
    """Of the lists of several chunks, what is this program's share of all: written to OWN where it stood if they were
    one list, so that the loop knows nothing of chunks. Also, the sub-tiles at the first entries, and their places."""
    at, index = everywhere(on_lists(counts, entry, CHUNK), PACK), tl.arange(0, 32)
    mine = first + index // PACK * stride + index % PACK
    source = on_lists(counts, mine, CHUNK)
    tiles = tl.load(HOT + at, mask=entry < count, other=0)  # the same again, but no thread need wait for another
    own = tl.load(HOT + source, mask=mine < count, other=0)
    places, own_places = tiles, own
    if PAGED:
        places = tl.load(HOT_PLACES + at, mask=entry < count, other=0).to(tl.int64)
        own_places = tl.load(HOT_PLACES + source, mask=mine < count, other=0)
    for _ in range(first, count, stride * (32 // PACK)):
        tl.store(OWN + mine, own, mask=mine < count)
        if PAGED:
            tl.store(OWN_PLACES + mine, own_places, mask=mine < count)
        mine += stride * (32 // PACK)
        source = on_lists(counts, mine, CHUNK)
        own = tl.load(HOT + source, mask=mine < count, other=0)
        if PAGED:
            own_places = tl.load(HOT_PLACES + source, mask=mine < count, other=0)
    tl.debug_barrier()  # one thread reads what another one wrote
    return tiles, places


@triton.jit(
    do_not_specialize=["queries", "first_token", "keys", "subtiles", "slots", "splits", "chunks"],
    do_not_specialize_on_alignment=["START", "LENGTHS"],
)
def refine(
    Q8, ROWINFO, KH, KL, KS, VH, VL, VS, MASK, BIAS, START, LENGTHS, PARTIAL, META, ENERGY,
    HOT, HOT_PLACES, OWN, OWN_PLACES, TAKEN, COUNTS,
    mask_b, mask_h, mask_s, mask_key, bias_b, bias_h, bias_s, bias_key, start_stride, length_stride,
    kv_heads, queries, first_token, keys, plane_keys, subtiles, slots, splits, chunks, scale, softcap,
    GROUP: tl.constexpr, GP: tl.constexpr, PACK: tl.constexpr, TOKENS: tl.constexpr, HALF_K: tl.constexpr,
    HP_K: tl.constexpr, HALF_V: tl.constexpr, HP_V: tl.constexpr, BN: tl.constexpr, TILE: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, HAS_MASK: tl.constexpr,
    KEY_MASK: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_START: tl.constexpr, HAS_LENGTHS: tl.constexpr, PAGED: tl.constexpr, ASM: tl.constexpr,
    FIELDS: tl.constexpr, CHUNK: tl.constexpr, CHUNKS_P2: tl.constexpr, PDL: tl.constexpr, LISTED: tl.constexpr,
    FOLD: tl.constexpr,
):  # fmt: skip
    """Corrections of one block of rows by its share of the sub-tiles in HOT (gathered in OWN, as large, where several
    chunks have lists) and the results of the look-ahead that it joins, as one more partial result; programs that TAKEN
    (``decide.py``) has no work for leave none. With LISTED, of a head whose levels were known before (COUNTS,
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
    # This launch begins when all programs of the one ahead are past their wait, so that what the launches before that
    # one have left is there.
    _, all_refined = settings_of(ROWINFO, place, GP)
    q_upper, q_lower, factor, query_sum, origin = query_of(Q8, ROWINFO, place, row, scale, GP, HP_K)
    cold_offset, offset = query_sum * 0.5, query_sum * 8.0
    upper, lower, mass, value_mass, split_most, top = of_splits(
        PARTIAL, META, place * slots, segment, splits, tl.num_programs(0), row, column < GROUP * TOKENS, COLUMNS, GP,
        HALF_V, HP_V, FIELDS, FOLD,
    )  # fmt: skip
    wait_for_launch(PDL)
    HOT += place * subtiles
    HOT_PLACES += place * subtiles
    entry = segment * PACK + tl.arange(0, PACK)
    if CHUNKS_P2 == 1:  # the head of its list, read before it is known how long that is
        early = tl.maximum(tl.minimum(entry, subtiles - 1), 0)
        tiles, places = listed(HOT, HOT_PLACES, early, subtiles, PAGED)
    else:
        chunk = tl.arange(0, CHUNKS_P2)
        counts = tl.load(TAKEN + (place * chunks + chunk) * 2, mask=chunk < chunks, other=0)
    count, taking = shared_by(TAKEN, place, chunks, tl.num_programs(0), PACK, CHUNKS_P2)
    if segment >= taking:
        return
    first, stride = segment * PACK, taking * PACK
    if CHUNKS_P2 == 1:
        tiles, places = tl.where(entry < count, tiles, 0), tl.where(entry < count, places, 0)
    else:
        OWN += place * subtiles
        OWN_PLACES += place * subtiles
        tiles, places = gathered(
            HOT, HOT_PLACES, OWN, OWN_PLACES, counts, count, entry, first, stride, PACK, CHUNK, PAGED,
        )  # fmt: skip
        HOT, HOT_PLACES = OWN, OWN_PLACES
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

    counted = (row < GROUP * TOKENS) & (token < queries) & ((row % GROUP == 0) | (TOKENS == 1))
    if KEY_MASK:
        MASK += b.to(tl.int64) * mask_b
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
    most = tl.maximum(tl.max(tl.max(k_most, 0), 0), tl.max(split_most, 0))
    half_v = tl.arange(0, HP_V)
    stored = (rows < GROUP * TOKENS)[None, :] & (half_v < HALF_V)[:, None]
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
