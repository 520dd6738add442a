"""Third launch: decide, with the finished log-sum-exp of the same query, which sub-tiles to refine, and list them.

A program decides for CHUNK sub-tiles of a block of rows and kv head. Those of the refinement share what is on the lists
evenly: what lies in clusters (the newest keys, the first) makes no program more than a step longer than the others.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lamp_compile.runtime.kernels._device import DEAD, EMPTY, LOG2E, everywhere, key_range, settings_of, wait_for_launch
from lamp_compile.runtime.kernels.look_ahead import stored_tiles

NOTES = tl.constexpr(5)
"""Numbers that are noted per row; ``decide`` lists them."""


@triton.jit
def looked_ahead(META, SINKS, place, slots, splits, head, valid,
                 GP: tl.constexpr, FIELDS: tl.constexpr, SPLITS_P2: tl.constexpr, HAS_SINKS: tl.constexpr,
                 RULE: tl.constexpr):  # fmt: skip
    """Of the rows, over partial results: log2 of the sum over all keys (and the sink), -inf without a live key; the
    largest importance where the RULE asks for it. Also, behind which of these results none holds a key."""
    index, rows = tl.arange(0, SPLITS_P2), tl.arange(0, GP)
    meta = META + place * slots * (FIELDS * GP) + (index[:, None] * (FIELDS * GP) + rows[None, :])
    inside = (index < splits)[:, None] & valid[None, :]
    top = tl.load(meta, mask=inside, other=EMPTY)
    total = tl.load(meta + GP, mask=inside, other=0.0)
    other = top
    if RULE == 2:
        other = tl.load(meta + 4 * GP, mask=inside, other=DEAD)
    tl.debug_barrier()  # or the compiler puts some of what is read so far behind the first sum
    most, largest = tl.max(top, 0), tl.max(other, 0)
    # What is NaN must be joined: a maximum may hide it, a sum does not.
    holds = (((top <= EMPTY) == 0) | ((total == 0.0) == 0)) & inside
    filled = tl.max(tl.where(holds, index[:, None] + 1, 0), 0)
    total = tl.sum(total * tl.exp2(top - most[None, :]), 0)
    if HAS_SINKS:
        sink = tl.load(SINKS + head).to(tl.float32) * LOG2E
        new = tl.maximum(most, sink)
        total = tl.where(total == 0.0, 0.0, total * tl.exp2(most - new) + tl.exp2(sink - new))
        most = new
    return most + tl.log2(total), largest, tl.max(filled, 0)


@triton.jit
def chosen(
    energy, other, row_valid, tau, lse, largest,
    GROUP: tl.constexpr, GP: tl.constexpr, TOKENS: tl.constexpr, RULE: tl.constexpr,
):  # fmt: skip
    """Which sub-tiles ``[CHUNK]`` to refine, by what the look-ahead noted of them (DEAD where it did not look): one
    decision for all rows that share them. Also, by how many tokens each is seen; and, for the certificate, squared
    weights ``[CHUNK, GP]`` of the others, which stay at the high plane."""
    rows = tl.arange(0, GP)
    bar = tl.log2(tau)
    # Not "above the bar" but "not below it": what is NaN cannot be judged and is refined.
    if RULE == 0:
        hot = (energy <= (bar + lse)[None, :]) == 0
    elif RULE == 1:
        hot = (other + 1.0 <= (bar + lse)[None, :]) == 0
    else:
        hot = (other <= (bar + largest)[None, :]) == 0
    live = ((energy < EMPTY) == 0) & row_valid[None, :]
    hot = tl.max((hot & live).to(tl.int32), 1)
    if TOKENS == 1:
        tokens_live = tl.max(live.to(tl.int32), 1)
    else:  # several tokens: the first head stands for its group
        tokens_live = tl.sum((live & (rows % GROUP == 0)[None, :]).to(tl.int32), 1)
    z = tl.where(live & (hot == 0)[:, None], tl.exp2(2.0 * (energy - lse[None, :])), 0.0)
    return hot, tokens_live, z


@triton.jit
def levels_of(
    energy, other, v_peaks, level, tile, lo, hi, all_refined, use, row_valid, tau, lse, largest,
    GROUP: tl.constexpr, GP: tl.constexpr, TOKENS: tl.constexpr, BN: tl.constexpr, RULE: tl.constexpr,
    LISTED: tl.constexpr,
):  # fmt: skip
    """Of what was ``noted`` of a chunk: which sub-tiles there are, and of them what ``chosen`` says, or levels known
    before. Also the squared weights of ``chosen``, and these times squared value scales."""
    there = (tile >= lo // BN) & (tile * BN < hi)
    looked = there & (level == 1) & (all_refined == 0)  # level 1: all that live where the gate is not used
    energy, v_peaks = tl.where(looked[:, None], energy, DEAD), tl.where(looked, v_peaks, 0.0)
    hot, tokens_live, square = chosen(energy, other, row_valid, tau, lse, largest, GROUP, GP, TOKENS, RULE)
    if LISTED:  # noqa: SIM102  (known when this is compiled; what follows is not)
        if use:
            hot = (there & (level == 2)).to(tl.int32)
            tokens_live = (there & (level != 0)).to(tl.int32)
            square = tl.where(((energy < EMPTY) == 0) & row_valid[None, :], tl.exp2(2.0 * (energy - lse[None, :])), 0.0)
    return there, hot, tokens_live, square, square * (v_peaks * v_peaks)[:, None]


@triton.jit
def noted(
    ENERGY, OTHER, PEAK, LEVELS, tile, lead, lo, hi, row_valid, GP: tl.constexpr, BN: tl.constexpr, RULE: tl.constexpr,
    LISTED: tl.constexpr,
):  # fmt: skip
    """What the look-ahead noted of sub-tiles, and levels known before; of those it did not look at, anything."""
    there = (tile >= lo // BN) & (tile * BN < hi)
    read = there[:, None] & row_valid[None, :]
    at = tile[:, None] * GP + tl.arange(0, GP)[None, :]
    energy = tl.load(ENERGY + lead * GP + at, mask=read, other=DEAD, eviction_policy="evict_first")
    other, level = energy, there.to(tl.int32)
    if RULE != 0:
        other = tl.load(OTHER + lead * GP + at, mask=read, other=DEAD, eviction_policy="evict_first")
    if LISTED:
        level = tl.load(LEVELS + tile, mask=there, other=0).to(tl.int32)
    v_peaks = tl.load(PEAK + lead + tile, mask=there, other=0.0, eviction_policy="evict_first")
    return energy, other, v_peaks, level


@triton.jit(
    do_not_specialize=["queries", "first_token", "keys", "subtiles", "slots", "splits"],
    do_not_specialize_on_alignment=["START", "LENGTHS", "TABLE"],
)
def decide(
    ROWINFO, META, ENERGY, OTHER, PEAK, SINKS, START, LENGTHS, TABLE, LEVELS, COUNTS,
    HOT, HOT_PLACES, TAKEN, NOTED,
    start_stride, length_stride, table_stride, kv_heads, queries, first_token, keys, subtiles, slots, splits,
    GROUP: tl.constexpr, GP: tl.constexpr, TOKENS: tl.constexpr, BN: tl.constexpr, TILE: tl.constexpr,
    RULE: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, HAS_SINKS: tl.constexpr,
    HAS_START: tl.constexpr, HAS_LENGTHS: tl.constexpr, PAGED: tl.constexpr, FIELDS: tl.constexpr,
    SPLITS_P2: tl.constexpr, CHUNK: tl.constexpr, PDL: tl.constexpr, LISTED: tl.constexpr,
):  # fmt: skip
    """CHUNK sub-tiles of a block of rows. HOT ``[B*G, blocks, subtiles]``: those to refine, ascending, from where the
    chunk begins (``on_lists``); HOT_PLACES where they stand in pages; TAKEN ``[B*G, blocks, chunks, 2]``
    how many they are, and how many programs of the look-ahead left something; NOTED ``[B*G, blocks, chunks, NOTES,
    GP]`` log2 of the look-ahead's sum, of the sub-tiles that stay at the high plane sums of squared weights and of
    these times squared value scales, and how many sub-tiles are seen and refined (where all are refined nothing was
    looked at: none, ``refine`` counts them).

    With LISTED, of a head whose LEVELS were known before (COUNTS, ``predict.py``), these decide.
    """
    chunk, bg, block = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    b, g = bg // kv_heads, bg % kv_heads
    rows = tl.arange(0, GP)
    row_valid = (rows < GROUP * TOKENS) & (first_token + block * TOKENS + rows // GROUP < queries)
    lo, hi, _ = key_range(
        b, first_token + block * TOKENS, tl.minimum(first_token + block * TOKENS + TOKENS, queries) - 1, START, LENGTHS,
        start_stride, length_stride, keys, queries, HAS_START, HAS_LENGTHS, CAUSAL, WINDOW,
    )  # fmt: skip
    # What is read above no launch of this call writes. The next launch may begin only behind this wait: it reads the
    # look-ahead's results before its own.
    wait_for_launch(PDL)
    place = bg.to(tl.int64) * tl.num_programs(2) + block
    tau, all_refined = settings_of(ROWINFO, place, GP)
    lead, tile = place * subtiles, chunk * CHUNK + tl.arange(0, CHUNK)
    if LISTED:
        LEVELS += lead
    # Read before anything waits for a sum.
    energy, other, v_peaks, level = noted(
        ENERGY, OTHER, PEAK, LEVELS, tile, lead, lo, hi, row_valid, GP, BN, RULE, LISTED
    )
    use = False
    if LISTED:
        use = tl.load(COUNTS + bg * 4 + 1) != 0
        all_refined = all_refined & (use == 0)
    lse, largest, filled = looked_ahead(
        META, SINKS, place, slots, splits, g * GROUP + rows % GROUP, row_valid, GP, FIELDS, SPLITS_P2, HAS_SINKS, RULE
    )
    lse, largest = everywhere(lse, GP), everywhere(largest, GP)
    there, hot, tokens_live, square, value_square = levels_of(
        energy, other, v_peaks, level, tile, lo, hi, all_refined, use, row_valid, tau, lse, largest, GROUP, GP, TOKENS,
        BN, RULE, LISTED,
    )  # fmt: skip
    taken = tl.where(all_refined, there.to(tl.int32), hot)
    if TOKENS == 1:  # all in one sum, which over several warps waits for all of them; what is refined is live
        tl.static_assert(CHUNK < 4096, "two counts share a float")
        counted = tl.where((rows == 0)[None, :], (tokens_live + (taken << 12)).to(tl.float32)[:, None], 0.0)
        sums = tl.sum(tl.join(tl.join(square, value_square), tl.join(counted, tl.zeros_like(counted))), 0)
        squares, counts = tl.split(sums)
        square, value_square = tl.split(squares)
        counts, _ = tl.split(counts)
        both = tl.sum(counts, 0).to(tl.int32)
        live, count = both & 0xFFF, both >> 12
        refined = tl.where(all_refined, 0, count)
    else:
        live, refined, count = tl.sum(tokens_live, 0), tl.sum(tokens_live * hot, 0), tl.sum(taken, 0)
        square, value_square = tl.sum(square, 0), tl.sum(value_square, 0)
    square, value_square = everywhere(square, GP), everywhere(value_square, GP)
    at = tl.cumsum(taken, 0) - taken
    tl.store(HOT + (lead + chunk * CHUNK) + at, tile, mask=taken == 1)
    if PAGED:
        places = stored_tiles(TABLE + b * table_stride, tile, hi, BN, TILE, PAGED).to(tl.int32)
        tl.store(HOT_PLACES + (lead + chunk * CHUNK) + at, places, mask=taken == 1)
    mine = place * tl.num_programs(0) + chunk
    tl.store(TAKEN + mine * 2, count)
    tl.store(TAKEN + mine * 2 + 1, filled)
    notes, zero = NOTED + mine * NOTES * GP + rows, tl.zeros((GP,), tl.float32)
    tl.store(notes, lse)
    tl.store(notes + GP, square)
    tl.store(notes + 2 * GP, value_square)
    tl.store(notes + 3 * GP, zero + live)
    tl.store(notes + 4 * GP, zero + refined)


@triton.jit
def listed_of(TAKEN, place, chunk, chunks):
    """Sub-tiles on the list of one chunk. Read one by one: of a number that a reduction gave the compiler does not know
    that all threads hold the same, and a loop which ends by it takes 1.7 times as long."""
    return tl.load(TAKEN + (place * chunks + chunk) * 2, mask=chunk < chunks, other=0)


@triton.jit
def shared_by(TAKEN, place, chunks, segments, PACK: tl.constexpr, CHUNKS_P2: tl.constexpr):
    """Of one block of rows: how many sub-tiles are refined; and how many programs of the refinement have something to
    do: a step (PACK sub-tiles to refine) or more, or partial results to join."""
    count = listed_of(TAKEN, place, 0, chunks)
    for chunk in tl.static_range(1, CHUNKS_P2):
        count += listed_of(TAKEN, place, chunk, chunks)
    filled = tl.minimum(tl.load(TAKEN + place * chunks * 2 + 1), segments)
    return count, tl.maximum(tl.maximum(filled, 1), tl.minimum(tl.cdiv(count, PACK), segments))


@triton.jit
def on_lists(counts, entry, CHUNK: tl.constexpr):
    """Where in HOT entries ``[n]`` stand that are counted over the lists of all chunks, of so many sub-tiles each."""
    ends = tl.cumsum(counts, 0)
    return entry + tl.sum(tl.where(ends[None, :] <= entry[:, None], CHUNK - counts[None, :], 0), 1)
