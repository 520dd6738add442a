"""The loop of the refinement: sub-tiles from both planes, and what the look-ahead had added for them taken back."""

from __future__ import annotations

import triton
import triton.language as tl

from lamp_compile.runtime.kernels._device import (
    DEAD,
    EMPTY,
    HEADROOM,
    MAGIC,
    MAGIC_BITS,
    finite_scale,
    folded,
    lower_nibbles,
    lower_nibbles16,
    of_part,
    over_parts,
    peak_of,
    relative,
    to_columns,
    upper_nibbles,
    upper_nibbles8,
    weigh,
)
from lamp_compile.runtime.kernels.look_ahead import (
    dither,
    first_key,
    in_columns,
    listed,
    load_keys,
    load_values,
    narrow_scales,
    round_row,
    scores_of,
    seen_scores,
)


@triton.jit
def differences(p, gain, whole_cold, back, v_scale, v_peak, MASKED: tl.constexpr):
    """What to add (weights p times gain) and what to take back (rounded as it was: whole_cold times back) in whole
    numbers of one unit, 15 bits and a sign. On the high plane only their difference counts: its coarse and fine 7
    bits; on the residual plane what to add, in 7 bits. Then both as whole numbers, and the unit."""
    larger = tl.maximum(tl.maximum(gain, back), 1e-30)
    step = 16256.0 / tl.maximum(v_peak, 1e-30) * (gain / larger)
    add = (weigh(p, v_scale * step[None, :], MASKED) + MAGIC).to(tl.int32, bitcast=True)
    take = (whole_cold * (128.0 * (back / larger))[None, :] + MAGIC).to(tl.int32, bitcast=True)
    change = add - take
    coarse = (change + 64) >> 7
    fine = change - (coarse << 7)
    add = (add - (MAGIC_BITS - 64)) >> 7
    unit = larger * (v_peak / 16256.0)
    return coarse.to(tl.int8), fine.to(tl.int8), add.to(tl.int8), add, take - MAGIC_BITS, unit


@triton.jit
def whole_weights(p, gain, v_scale, v_peak, MASKED: tl.constexpr):
    """``differences`` where nothing is taken back: what to add in coarse and fine 7 bits. The coarse ones are what the
    residual plane takes, too; then these as whole numbers, and the unit."""
    step = 16256.0 / tl.maximum(v_peak, 1e-30)
    add = (weigh(p, v_scale * step[None, :], MASKED) + MAGIC).to(tl.int32, bitcast=True) - MAGIC_BITS
    coarse = (add + 64) >> 7
    return coarse.to(tl.int8), (add - (coarse << 7)).to(tl.int8), coarse, gain * (v_peak / 16256.0)


@triton.jit
def corrected(
    KH, KL, KS, VH, VL, VS, MASK, BIAS, ENERGY, HOT, HOT_PLACES, q_upper, q_lower, factor, cold_offset, offset, origin,
    first, count, stride, next_tiles, next_places, upper, lower, mass, value_mass, top, counted, row_position,
    mask_rows, bias_rows, lo, hi, mask_key, bias_key, softcap, delta,
    GROUP: tl.constexpr, GP: tl.constexpr, PACK: tl.constexpr, TOKENS: tl.constexpr, HALF_K: tl.constexpr,
    HP_K: tl.constexpr, HALF_V: tl.constexpr, HP_V: tl.constexpr, BN: tl.constexpr, TILE: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, HAS_MASK: tl.constexpr, KEY_MASK: tl.constexpr,
    HAS_BIAS: tl.constexpr, PAGED: tl.constexpr, ASM: tl.constexpr, FOLD: tl.constexpr,
    BACK: tl.constexpr,
):  # fmt: skip
    """Sums over the sub-tiles at entries ``first``, first + 1 .. of the ``count`` in HOT, PACK at a time and ``stride``
    apart, relative to ``top``, which they may move, added to the sums given. ``next_tiles``, ``next_places``: the first
    entries.

    With BACK what the look-ahead has added is taken back (``delta`` 0: it has added nothing). Without, there was
    nothing to take: no cold scores, and the energies of the sub-tiles are written, of one token.
    """
    COLUMNS: tl.constexpr = PACK * GP
    CROSSED: tl.constexpr = (CAUSAL != 0 and TOKENS > 1) or HAS_MASK or HAS_BIAS
    MASKED: tl.constexpr = CROSSED
    part = tl.arange(0, COLUMNS) // GP
    thresholds = dither(BN)
    none = tl.zeros((HP_V, COLUMNS), tl.int32)
    start = tl.broadcast_to(origin[None, :], (BN, COLUMNS))
    key, parts = tl.arange(0, BN), tl.arange(0, PACK)
    shift = tl.zeros((FOLD, COLUMNS), tl.float32)
    square = tl.zeros((FOLD, COLUMNS), tl.float32)
    value_square = tl.zeros((FOLD, COLUMNS), tl.float32)
    k_most = tl.zeros((BN, PACK), tl.float32)
    seen_tiles = tl.zeros((PACK,), tl.float32)
    # A step ahead: where sub-tiles stand, and their scales, of which places are known from the step before.
    next_k, next_v, next_allowed = narrow_scales(KS, VS, MASK, mask_key, next_places, next_tiles, hi, BN, KEY_MASK)
    scale_tiles, scale_places = listed(HOT, HOT_PLACES, first + stride + parts, count, PAGED)
    for i in range(first, count, stride):
        tiles, places = next_tiles, next_places
        k_narrow, v_narrow, allowed = finite_scale(next_k), finite_scale(next_v), next_allowed
        next_tiles, next_places = listed(HOT, HOT_PLACES, i + stride + parts, count, PAGED)
        next_k, next_v, next_allowed = narrow_scales(
            KS, VS, MASK, mask_key, scale_places, scale_tiles, hi, BN, KEY_MASK
        )
        scale_tiles, scale_places = listed(HOT, HOT_PLACES, i + 2 * stride + parts, count, PAGED)
        product, residual = start, tl.zeros((BN, COLUMNS), tl.int32)
        for u in tl.static_range(PACK):
            at_key = first_key(places, parts, u, BN) + key
            k_high = load_keys(KH, at_key, HALF_K, HP_K)
            k_low = load_keys(KL, at_key, HALF_K, HP_K)
            one = tl.dot(upper_nibbles(k_high, ASM), q_upper, start, out_dtype=tl.int32)
            low_one = tl.dot(lower_nibbles(k_high, ASM), q_lower, out_dtype=tl.int32)
            more = tl.dot(upper_nibbles8(k_low, ASM), q_upper, out_dtype=tl.int32)
            more = tl.dot(lower_nibbles(k_low, ASM), q_lower, more, out_dtype=tl.int32)
            product = in_columns(part, u, one + (low_one << 4), product)
            residual = in_columns(part, u, more, residual)
        k_scale = to_columns(k_narrow, PACK, GP)
        if BACK:
            y_cold = scores_of(product, k_scale, cold_offset, factor, softcap, SOFTCAP)
        y = scores_of(product + residual, k_scale, offset, factor, softcap, SOFTCAP)
        starts = tl.where(i + parts < count, tiles * BN, hi)  # a part without a sub-tile lies behind the end
        if CROSSED:
            j_all = to_columns(key[:, None] + starts[None, :], PACK, GP)
            if BACK:
                y_cold = seen_scores(
                    y_cold, j_all, lo, hi, row_position, MASK, mask_key, BIAS, bias_key, mask_rows, bias_rows, CAUSAL,
                    WINDOW, TOKENS, HAS_MASK, HAS_BIAS,
                )  # fmt: skip
            y = seen_scores(
                y, j_all, lo, hi, row_position, MASK, mask_key, BIAS, bias_key, mask_rows, bias_rows, CAUSAL,
                WINDOW, TOKENS, HAS_MASK, HAS_BIAS,
            )  # fmt: skip
        rare = (tl.min(starts, 0) < lo) | (tl.max(starts, 0) + BN > hi)
        if KEY_MASK:
            rare = rare | (tl.min(tl.min(allowed, 0), 0) == 0)
        if rare:  # keys that no row sees: at the two ends, or behind a mask of one number per key
            narrow = key[:, None] + starts[None, :]
            allowed = allowed * ((narrow >= lo) & (narrow < hi)).to(tl.int32)
            inside_all = to_columns(allowed, PACK, GP) != 0
            y = tl.where(inside_all, y, DEAD)
            if BACK:
                y_cold = tl.where(inside_all, y_cold, DEAD)
            v_narrow, k_narrow = tl.where(allowed != 0, v_narrow, 0.0), tl.where(allowed != 0, k_narrow, 0.0)
        v_scale, v_peak = to_columns(v_narrow, PACK, GP), of_part(peak_of(v_narrow, MASKED), PACK, GP)
        k_most = tl.maximum(k_most, k_narrow)
        local, p = relative(y, MASKED)
        above = local
        if BACK:
            local_cold, p_cold = relative(y_cold, MASKED)
            above = tl.maximum(local, tl.where(delta > 0.0, local_cold, DEAD))
        else:
            column = of_part(tiles, PACK, GP) * GP + tl.arange(0, PACK * GP) % GP
            there = (tl.arange(0, PACK * GP) % GP < GROUP) & (i + part < count)
            tl.store(ENERGY + column, local + 0.5 * tl.log2(tl.sum(p * p, 0)), mask=there)
        if tl.max(above - top, 0) > HEADROOM:
            new = tl.maximum(top, above)
            keep = tl.exp2(top - new)
            upper, lower, shift = upper * keep, lower * keep, shift * keep
            mass, value_mass = mass * keep, value_mass * keep
            square, value_square = square * keep * keep, value_square * keep * keep
            top = new
        gain = tl.exp2(local - top)
        if BACK:
            back = tl.exp2(local_cold - top) * delta
            _, whole_cold = round_row(p_cold, v_scale, v_peak, thresholds, MASKED)
            coarse, fine, added, add, take, unit = differences(p, gain, whole_cold, back, v_scale, v_peak, MASKED)
        else:
            coarse, fine, add, unit = whole_weights(p, gain, v_scale, v_peak, MASKED)
            added = coarse
        first_half, second_half = none, none
        for u in tl.static_range(PACK):
            at_value = first_key(places, parts, u, BN) + key
            v_high = load_values(VH, at_value, TILE, HALF_V, HP_V)
            v_low = load_values(VL, at_value, TILE, HALF_V, HP_V)
            up, down = upper_nibbles(v_high, ASM), lower_nibbles16(v_high, ASM)
            a = tl.dot(up, coarse, out_dtype=tl.int32)
            a = tl.dot(upper_nibbles8(v_low, ASM), added, a, out_dtype=tl.int32) << 7
            first_half = in_columns(part, u, tl.dot(up, fine, a, out_dtype=tl.int32), first_half)
            c = tl.dot(down, coarse, out_dtype=tl.int32)
            c = tl.dot(lower_nibbles(v_low, ASM), added, c, out_dtype=tl.int32) << 7
            second_half = in_columns(part, u, tl.dot(down, fine, c, out_dtype=tl.int32), second_half)
        upper += first_half.to(tl.float32) * unit[None, :]
        lower += second_half.to(tl.float32) * unit[None, :]
        # The residual bytes carry + 8; lo averages -1/2, which was taken off what is taken back.
        weight, vv = p * gain[None, :], v_scale * v_scale
        more = weight
        if BACK:
            shift += folded(take - 2048 * add, FOLD).to(tl.float32) * (0.5 * unit)[None, :]
            more = weight - p_cold * back[None, :]
        else:
            shift -= folded(add, FOLD).to(tl.float32) * (1024.0 * unit)[None, :]
        heavy = weight * weight
        mass += folded(more, FOLD)
        value_mass += folded(weigh(more, vv, MASKED), FOLD)
        square += folded(heavy, FOLD)
        value_square += folded(weigh(heavy, vv, MASKED), FOLD)
        seen = over_parts((((local < EMPTY) == 0) & counted).to(tl.float32), PACK, GP)
        seen_tiles += tl.max(seen, 1) if TOKENS == 1 else tl.sum(seen, 1)
    # Whole numbers know no NaN: those of value scales come in here.
    shift += value_mass * 0.0
    return upper, lower, shift, mass, value_mass, square, value_square, k_most, seen_tiles, top
