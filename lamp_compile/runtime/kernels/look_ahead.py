"""Second launch: every live key from its high plane alone.

Reads half a byte a channel and does all of the attention with it; notes how much each sub-tile matters, so that the
refinement (``refine.py``) can decide with the finished log-sum-exp of the same query and then correct what was added
here for the sub-tiles it takes. Nothing in the loop depends on a decision, so all loads are pipelined.
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
    folded,
    key_mask,
    key_range,
    let_next_launch,
    lower_nibbles,
    of_part,
    over_parts,
    peak_of,
    query_of,
    relative,
    settings_of,
    tanh,
    to_columns,
    upper_nibbles,
    wait_for_last_launch,
    weigh,
)


@triton.jit
def dither(BN: tl.constexpr):
    """Thresholds in (0, 1), evenly spread over the keys of a sub-tile (multiples of the golden ratio): weights rounded
    with them are right on average, where rounding to nearest would lose all the small ones."""
    x = tl.arange(0, BN).to(tl.float32) * 0.6180339887 + 0.5
    return x - tl.floor(x)


@triton.jit
def round_row(p, v_scale, v_peak, thresholds, MASKED: tl.constexpr):
    """Weights times value scale as int8, relative to the sub-tile's own maximum and largest value scale: a sub-tile
    with a heavy key does not coarsen its neighbours, and the refinement can take back exactly what was added. Gives
    back the int8 row and the same as float32."""
    x = weigh(p, v_scale, MASKED) * (127.0 / tl.maximum(v_peak, 1e-30))[None, :] + (thresholds - 0.5)[:, None] + MAGIC
    return x.to(tl.int32, bitcast=True).to(tl.int8), x - MAGIC


@triton.jit
def stored_tiles(TABLE, tiles, hi, BN: tl.constexpr, TILE: tl.constexpr, PAGED: tl.constexpr):
    """Where sub-tiles ``[PACK]`` of a sequence stand in its kv head's plane, in sub-tiles. What is read at these places
    waits for them, so they are read a step ahead. Not two: Triton makes asynchronous copies of loads whose address
    comes from the step before, and plain loads of others (look at the PTX for cp.async)."""
    places = tiles
    if PAGED:
        IN_PAGE: tl.constexpr = TILE // BN
        page = tl.load(TABLE + tiles // IN_PAGE, mask=tiles * BN < hi, other=0)
        places = tl.maximum(page, 0).to(tl.int64) * IN_PAGE + tiles % IN_PAGE
    return places


@triton.jit
def first_key(places, parts, u: tl.constexpr, BN: tl.constexpr):
    """Where sub-tile u of ``[PACK]`` begins in its plane, in keys."""
    return tl.sum(tl.where(parts == u, places, 0), 0) * BN


@triton.jit
def listed(LIST, PLACES, entry, count, PAGED: tl.constexpr):
    """Sub-tiles at some entries of a list ``[PACK]``, and where they stand in the plane; 0 behind its end. Where the
    planes are pages the list holds both, so that no address waits for two loads."""
    tiles = tl.load(LIST + entry, mask=entry < count, other=0)
    places = tiles
    if PAGED:
        places = tl.load(PLACES + entry, mask=entry < count, other=0).to(tl.int64)
    return tiles, places


@triton.jit
def narrow_scales(KS, VS, MASK, mask_key, places, tiles, hi, BN: tl.constexpr, KEY_MASK: tl.constexpr):
    """Of the keys of sub-tiles, stored at ``places`` ``[PACK]``: both scales as stored, and what a mask of one number
    per key says. These are too small for asynchronous copies: they are read one step ahead."""
    key = tl.arange(0, BN)[:, None]
    at = key + places[None, :] * BN
    return tl.load(KS + at), tl.load(VS + at), key_mask(MASK, key + tiles[None, :] * BN, mask_key, hi, KEY_MASK)


@triton.jit
def in_columns(part, u: tl.constexpr, product, others):
    """A product in the columns of sub-tile u, ``others`` elsewhere: every sub-tile is multiplied by what all columns
    hold, and what belongs to other sub-tiles is dropped here."""
    if u > 0:
        product = tl.where((part == u)[None, :], product, others)
    return product


@triton.jit
def load_keys(plane, at, HALF: tl.constexpr, HP: tl.constexpr):
    """Bytes ``[BN, HP]`` of the keys at ``at``."""
    half = tl.arange(0, HP)
    source = plane + at[:, None] * HALF + half[None, :]
    if HALF == HP:
        got = tl.load(source)
    else:
        got = tl.load(source, mask=(half < HALF)[None, :], other=0)
    return got


@triton.jit
def load_values(plane, at, TILE: tl.constexpr, HALF: tl.constexpr, HP: tl.constexpr):
    """Bytes ``[HP, BN]`` of the values at ``at``: planes of values are ``[tile, channel, key]``."""
    half = tl.arange(0, HP)
    source = plane + (at // TILE * (TILE * HALF) + at % TILE)[None, :] + half[:, None] * TILE
    if HALF == HP:
        got = tl.load(source)
    else:
        got = tl.load(source, mask=(half < HALF)[:, None], other=0)
    return got


@triton.jit
def scores_of(product, k_scale, offset, factor, softcap, SOFTCAP: tl.constexpr):
    """Integer products ``[BN, columns]``, started from MAGIC_BITS -> scores in log2 units, soft-capped."""
    x = product.to(tl.float32, bitcast=True) - MAGIC
    x = (x * factor[None, :] - (offset * factor)[None, :]) * k_scale
    if SOFTCAP:
        x = tanh(x * (1.0 / 1.4426950408889634) / softcap) * (softcap * 1.4426950408889634)
    return x


@triton.jit
def seen_scores(x, j, lo, hi, row_position, MASK, mask_key, BIAS, bias_key, mask_rows, bias_rows,
                CAUSAL: tl.constexpr, WINDOW: tl.constexpr, TOKENS: tl.constexpr, HAS_MASK: tl.constexpr,
                HAS_BIAS: tl.constexpr):  # fmt: skip
    """Scores plus bias, DEAD where a row does not see the key j ``[BN, columns]``."""
    seen = (j >= lo) & (j < hi)
    if CAUSAL != 0 and TOKENS > 1:  # a single token's range of keys is exact
        seen = seen & (j <= row_position[None, :])
        if WINDOW > 0:
            seen = seen & (j > row_position[None, :] - WINDOW)
    if HAS_MASK:
        seen = seen & (tl.load(MASK + mask_rows[None, :] + j * mask_key, mask=seen, other=0) != 0)
    if HAS_BIAS:
        x += tl.load(BIAS + bias_rows[None, :] + j * bias_key, mask=seen, other=0.0).to(tl.float32) * LOG2E
        seen = seen & (x != float("-inf"))
    return tl.where(seen, x, DEAD)


@triton.jit(
    do_not_specialize=["queries", "first_token", "keys", "subtiles", "slots", "splits", "least_steps"],
    do_not_specialize_on_alignment=["START", "LENGTHS", "TABLE"],
)
def look_ahead(
    Q8, ROWINFO, KH, KS, VH, VS, MASK, BIAS, START, LENGTHS, TABLE, PARTIAL, META, ENERGY, OTHER,
    PEAK, LIST, PLACES, COUNTS,
    mask_b, mask_h, mask_s, mask_key, bias_b, bias_h, bias_s, bias_key, start_stride, length_stride,
    table_stride, kv_heads, queries, first_token, keys, plane_keys, subtiles, slots, splits, least_steps, scale,
    softcap,
    GROUP: tl.constexpr, GP: tl.constexpr, PACK: tl.constexpr, TOKENS: tl.constexpr, HALF_K: tl.constexpr,
    HP_K: tl.constexpr, HALF_V: tl.constexpr, HP_V: tl.constexpr, BN: tl.constexpr, TILE: tl.constexpr,
    RULE: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, HAS_MASK: tl.constexpr,
    KEY_MASK: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_START: tl.constexpr, HAS_LENGTHS: tl.constexpr, PAGED: tl.constexpr, ASM: tl.constexpr,
    FIELDS: tl.constexpr, PDL: tl.constexpr, LISTED: tl.constexpr, FOLD: tl.constexpr,
):  # fmt: skip
    """One split of the keys for one block of rows; with LISTED one split of the sub-tiles in LIST (``predict.py``), of
    one token, whose places are read a step ahead like those of pages.

    A split has ``least_steps`` steps of the loop at least, so that of a short sequence the last splits are empty.
    PARTIAL ``[.., slots, GP, Dv]`` takes the unnormalised output, of rows that see a key of this split; META
    ``[.., slots, FIELDS, GP]`` maximum, sum, sum of p times squared value scale, largest key scale and importance;
    ENERGY ``[.., subtiles, GP]`` log2 of each sub-tile's sqrt(sum p^2), PEAK ``[.., subtiles]`` its largest value
    scale.
    """
    split, bg, block = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    b, g = bg // kv_heads, bg % kv_heads
    COLUMNS: tl.constexpr = PACK * GP
    STEP: tl.constexpr = PACK * BN
    CROSSED: tl.constexpr = (CAUSAL != 0 and TOKENS > 1) or HAS_MASK or HAS_BIAS
    MASKED: tl.constexpr = CROSSED
    column, rows = tl.arange(0, COLUMNS), tl.arange(0, GP)
    row, part = column % GP, column // GP
    token = first_token + block * TOKENS + row // GROUP
    valid = (row < GROUP * TOKENS) & (token < queries)
    lo, hi, position = key_range(
        b, first_token + block * TOKENS, tl.minimum(first_token + block * TOKENS + TOKENS, queries) - 1, START, LENGTHS,
        start_stride, length_stride, keys, queries, HAS_START, HAS_LENGTHS, CAUSAL, WINDOW,
    )  # fmt: skip
    final = tl.maximum(hi - 1, 0) // BN  # the last sub-tile there is
    wait_for_last_launch(PDL)  # what is read above no launch of this call writes
    place = bg.to(tl.int64) * tl.num_programs(2) + block
    _, all_refined = settings_of(ROWINFO, place, GP)
    count, begin, end = 0, lo // STEP * STEP, hi
    if LISTED:  # steps and sub-tiles are those of the list
        LIST += bg.to(tl.int64) * subtiles
        PLACES += bg.to(tl.int64) * subtiles
        count = tl.load(COUNTS + bg * 4)
        begin, end = 0, count * BN
    # Splits take turns, so that what programs read at one time lies together.
    taking = tl.minimum(splits, tl.maximum(1, tl.cdiv(tl.cdiv(end - begin, STEP), least_steps)))
    first, stride = begin + split * STEP, taking * STEP
    last = tl.where(all_refined, first, end)  # where everything is refined nothing is read here
    slot = place * slots + split
    meta = META + slot * FIELDS * GP + rows
    if split >= taking:  # of a short sequence
        nothing = tl.zeros((GP,), tl.float32)
        tl.store(meta, nothing + EMPTY)
        for field in tl.static_range(1, 4):
            tl.store(meta + field * GP, nothing)
        tl.store(meta + 4 * GP, nothing + DEAD)
        return
    q_upper, q_lower, factor, query_sum, origin = query_of(Q8, ROWINFO, place, row, scale, GP, HP_K)
    offset = query_sum * 0.5  # lo averages -1/2
    row_position = position + token
    head = (g * GROUP + row % GROUP).to(tl.int64)
    real = tl.minimum(token, queries - 1).to(tl.int64)  # of the last block some tokens may be none
    mask_rows = b.to(tl.int64) * mask_b + head * mask_h + real * mask_s
    bias_rows = b.to(tl.int64) * bias_b + head * bias_h + real * bias_s
    plane = (g if PAGED else bg).to(tl.int64) * plane_keys
    if PAGED:
        TABLE += b * table_stride
    KH += plane * HALF_K
    VH += plane * HALF_V
    KS += plane
    VS += plane
    energies = ENERGY + place * subtiles * GP + column
    others = OTHER + place * subtiles * GP + column
    peaks = PEAK + place * subtiles + part
    thresholds = dither(BN)
    magic = tl.full((HP_V, COLUMNS), MAGIC_BITS, tl.int32)
    start = tl.broadcast_to(origin[None, :], (BN, COLUMNS))
    key, parts = tl.arange(0, BN), tl.arange(0, PACK)

    top = tl.full((COLUMNS,), EMPTY, tl.float32)
    upper = tl.zeros((HP_V, COLUMNS), tl.float32)
    lower = tl.zeros((HP_V, COLUMNS), tl.float32)
    mass = tl.zeros((FOLD, COLUMNS), tl.float32)
    value_mass = tl.zeros((FOLD, COLUMNS), tl.float32)
    rounded = tl.zeros((FOLD, COLUMNS), tl.float32)
    k_most = tl.zeros((BN, PACK), tl.float32)
    largest = tl.full((COLUMNS,), DEAD, tl.float32)
    if KEY_MASK:
        MASK += b.to(tl.int64) * mask_b
    # Scales are plain loads, a step ahead themselves: their places are read for the step after that.
    if LISTED:
        next_tiles, next_places = listed(LIST, PLACES, first // BN + parts, count, PAGED)
        next_k, next_v, next_allowed = narrow_scales(KS, VS, MASK, mask_key, next_places, next_tiles, hi, BN, KEY_MASK)
        scale_tiles, scale_places = listed(LIST, PLACES, (first + stride) // BN + parts, count, PAGED)
    else:
        tiles = tl.minimum(first // BN + parts, final)
        next_places = stored_tiles(TABLE, tiles, hi, BN, TILE, PAGED)
        next_k, next_v, next_allowed = narrow_scales(KS, VS, MASK, mask_key, next_places, tiles, hi, BN, KEY_MASK)
        scale_places = stored_tiles(TABLE, tl.minimum((first + stride) // BN + parts, final), hi, BN, TILE, PAGED)
    for n0 in range(first, last, stride):
        k_narrow, v_narrow, allowed = finite_scale(next_k), finite_scale(next_v), next_allowed
        places = next_places
        if LISTED:
            here, starts = next_tiles, tl.where(n0 // BN + parts < count, next_tiles * BN, hi)
            next_tiles, next_places = listed(LIST, PLACES, (n0 + stride) // BN + parts, count, PAGED)
            next_k, next_v, next_allowed = narrow_scales(
                KS, VS, MASK, mask_key, scale_places, scale_tiles, hi, BN, KEY_MASK
            )
            scale_tiles, scale_places = listed(LIST, PLACES, (n0 + 2 * stride) // BN + parts, count, PAGED)
        else:
            tiles = tl.minimum((n0 + stride) // BN + parts, final)
            next_places = stored_tiles(TABLE, tiles, hi, BN, TILE, PAGED)
            next_k, next_v, next_allowed = narrow_scales(KS, VS, MASK, mask_key, scale_places, tiles, hi, BN, KEY_MASK)
            scale_places = stored_tiles(TABLE, tl.minimum((n0 + 2 * stride) // BN + parts, final), hi, BN, TILE, PAGED)
        product, low_product = start, tl.zeros((BN, COLUMNS), tl.int32)
        for u in tl.static_range(PACK):
            j = tl.minimum(n0 // BN + u, final) * BN + key
            if PAGED or LISTED:
                j = first_key(places, parts, u, BN) + key
            packed = load_keys(KH, j, HALF_K, HP_K)
            one = tl.dot(upper_nibbles(packed, ASM), q_upper, start, out_dtype=tl.int32)
            low_one = tl.dot(lower_nibbles(packed, ASM), q_lower, out_dtype=tl.int32)
            product, low_product = in_columns(part, u, one, product), in_columns(part, u, low_one, low_product)
        x = scores_of(product + (low_product << 4), to_columns(k_narrow, PACK, GP), offset, factor, softcap, SOFTCAP)
        y = x
        if CROSSED:
            j_all = n0 + (part * BN)[None, :] + key[:, None]
            if LISTED:
                j_all = to_columns(key[:, None] + starts[None, :], PACK, GP)
            y = seen_scores(
                x, j_all, lo, hi, row_position, MASK, mask_key, BIAS, bias_key,
                mask_rows, bias_rows, CAUSAL, WINDOW, TOKENS, HAS_MASK, HAS_BIAS,
            )  # fmt: skip
        if LISTED:
            rare = (n0 == 0) | (n0 + STEP >= count * BN)  # lists ascend: only their ends lie at the sequence's
        else:
            rare = (n0 < lo) | (n0 + STEP > hi)
        if KEY_MASK:
            rare = rare | (tl.min(tl.min(allowed, 0), 0) == 0)
        if rare:  # keys that no row sees: at the two ends, or behind a mask of one number per key
            narrow = key[:, None] + starts[None, :] if LISTED else n0 + (parts * BN)[None, :] + key[:, None]
            allowed = allowed * ((narrow >= lo) & (narrow < hi)).to(tl.int32)
            inside = to_columns(allowed, PACK, GP) != 0
            y = tl.where(inside, y, DEAD)
            v_narrow, k_narrow = tl.where(allowed != 0, v_narrow, 0.0), tl.where(allowed != 0, k_narrow, 0.0)
        v_scale = to_columns(v_narrow, PACK, GP)
        k_most = tl.maximum(k_most, k_narrow)
        local, p = relative(y, MASKED)
        if LISTED:
            there = valid & (n0 // BN + part < count)
            tile = of_part(here, PACK, GP) - part  # in its columns, as n0 // BN without a list
        else:
            there, tile = valid & (n0 // BN + part < subtiles), n0 // BN
        # Kept in the cache until the decision reads them: written to memory they cost 4 % of all the reading.
        energy = local + 0.5 * tl.log2(tl.sum(p * p, 0))
        tl.store(energies + tile * GP, energy, mask=there, eviction_policy="evict_last")
        if RULE != 0:
            size = tl.log2(tl.abs(x) * (1.0 / 1.4426950408889634))
            other = tl.max(tl.where(y > EMPTY, y + size, DEAD), 0)
            tl.store(others + tile * GP, other, mask=there, eviction_policy="evict_last")
            largest = tl.maximum(largest, other)
        v_peak = peak_of(v_scale, MASKED)
        tl.store(peaks + tile, v_peak, mask=there & (row == 0), eviction_policy="evict_last")
        p8, whole = round_row(p, v_scale, v_peak, thresholds, MASKED)

        # Sums are kept relative to the first maximum, and moved only when a later one is far above it.
        if tl.max(local - top, 0) > HEADROOM:
            new = tl.maximum(top, local)
            keep = tl.exp2(top - new)[None, :]
            upper, lower, mass = upper * keep, lower * keep, mass * keep
            value_mass, rounded = value_mass * keep, rounded * keep
            top = new
        gain = tl.exp2(local - top)
        unit = (gain * (v_peak / 127.0))[None, :]
        a, c = magic, magic
        for u in tl.static_range(PACK):
            j = tl.minimum(n0 // BN + u, final) * BN + key
            if PAGED or LISTED:
                j = first_key(places, parts, u, BN) + key
            values = load_values(VH, j, TILE, HALF_V, HP_V)
            a = in_columns(part, u, tl.dot(upper_nibbles(values, ASM), p8, magic, out_dtype=tl.int32), a)
            c = in_columns(part, u, tl.dot(lower_nibbles(values, ASM), p8, magic, out_dtype=tl.int32), c)
        upper += (a.to(tl.float32, bitcast=True) - MAGIC) * unit
        lower += (c.to(tl.float32, bitcast=True) - MAGIC) * (unit * 16.0)
        if MASKED:  # what a row does not see must not bring in NaN
            weight = p * gain[None, :]
            mass += folded(weight, FOLD)
            value_mass += folded(weigh(weight, v_scale * v_scale, MASKED), FOLD)
        else:
            mass += folded(p, FOLD) * gain[None, :]
            value_mass += folded(p * v_scale * v_scale, FOLD) * gain[None, :]
        rounded += folded(whole, FOLD) * unit

    let_next_launch(PDL)  # not before: programs that wait where others read cost these up to 3 %
    # Columns of the same row into one; lo averages -1/2, the lower nibbles carry + 8.
    together = tl.max(over_parts(top, PACK, GP), 0)
    to_row = tl.exp2(top - tl.reshape(tl.broadcast_to(together[None, :], (PACK, GP)), (COLUMNS,)))
    less = tl.sum(rounded, 0)[None, :]
    upper = tl.sum(tl.reshape((upper - 0.5 * less) * to_row[None, :], (HP_V, PACK, GP)), 1)
    lower = tl.sum(tl.reshape((lower - 128.5 * less) * to_row[None, :], (HP_V, PACK, GP)), 1)
    tl.store(meta, together)
    tl.store(meta + GP, tl.sum(over_parts(tl.sum(mass, 0) * to_row, PACK, GP), 0))
    tl.store(meta + 2 * GP, tl.sum(over_parts(tl.sum(value_mass, 0) * to_row, PACK, GP), 0))
    tl.store(meta + 3 * GP, tl.max(tl.max(k_most, 0), 0) + tl.zeros((GP,), tl.float32))
    tl.store(meta + 4 * GP, tl.max(over_parts(largest, PACK, GP), 0))
    half_v = tl.arange(0, HP_V)
    target = PARTIAL + (slot * GP + rows)[None, :] * (2 * HALF_V) + half_v[:, None]
    stored = ((rows < GROUP * TOKENS) & (together > EMPTY))[None, :] & (half_v < HALF_V)[:, None]
    tl.store(target, upper, mask=stored)
    tl.store(target + HALF_V, lower, mask=stored)
