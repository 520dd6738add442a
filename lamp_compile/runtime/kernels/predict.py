"""Before the look-ahead, at a site with a look-ahead network: which sub-tiles matter, before any key is read.

``predict_parts`` is the gate's arithmetic (``network/gate.py``) for some sub-tiles of one sequence and kv head;
``list_subtiles`` joins them, decides whom to believe and each sub-tile's precision, and writes the list of sub-tiles
that the look-ahead is to read: those left at the high plane, or all of them where the gate is not believed.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lamp_compile.runtime.kernels._device import ROW_FIELDS, key_range, wait_for_launch
from lamp_compile.runtime.kernels.look_ahead import stored_tiles

LOWEST = tl.constexpr(-1e30)
"""``gate.LOWEST``."""
LEAST = tl.constexpr(1e-4)
"""``gate.LEAST``."""
PARTS_FIELDS = tl.constexpr(4)
"""Of a part: the largest log mass, the sum relative to it, how many importances are no number, the newest sub-tile with
a live key."""
SCAN = tl.constexpr(256)
"""Keys of a mask that are looked at in one step, for its first and its last live key."""


@triton.jit
def live_ends(mask, mask_key, lo, hi, NP: tl.constexpr):
    """First and last key in [lo, hi) that each row's mask ``[NP]`` allows; (hi, -1) without one."""
    first, last = tl.zeros((NP,), tl.int32) + hi, tl.full((NP,), -1, tl.int32)
    at = lo
    while at < hi:
        j = at + tl.arange(0, SCAN)[:, None]
        seen = tl.load(mask[None, :] + j * mask_key, mask=j < hi, other=0) != 0
        first = tl.minimum(first, tl.min(tl.where(seen, j, hi), 0))
        at = tl.where(tl.max(first, 0) < hi, hi, at + SCAN)
    at = hi
    while at > lo:
        j = at - 1 - tl.arange(0, SCAN)[:, None]
        seen = tl.load(mask[None, :] + j * mask_key, mask=j >= lo, other=0) != 0
        last = tl.maximum(last, tl.max(tl.where(seen, j, -1), 0))
        at = tl.where(tl.min(last, 0) >= 0, lo, at - SCAN)
    return first, last


@triton.jit
def age_bias(AGE, back, head, AGES: tl.constexpr):
    """The gate's bias by age in sub-tiles ``[CHUNK, NP]``, interpolated between powers of two."""
    octave = tl.minimum(tl.log2(1.0 + back.to(tl.float32)), AGES - 1.0)
    low = tl.floor(octave)
    share = octave - low
    at = AGE + head[None, :] * AGES + low.to(tl.int32)
    upper = tl.load(at + 1, mask=low < AGES - 1, other=0.0)
    return tl.load(at) * (1.0 - share) + tl.where(share > 0.0, upper * share, 0.0)


@triton.jit
def halves(query):
    """Columns ``[RP, NP]`` of float32, brought to [1, 2) by a power of two, as two float16; and the power ``[NP]``."""
    power = tl.max(tl.abs(query), 0).to(tl.int32, bitcast=True) & 0x7F800000
    power = tl.where((power > 0) & (power < 0x7F000000), power, 0x3F800000)
    query = query * (0x7F000000 - power).to(tl.float32, bitcast=True)[None, :]
    high = query.to(tl.float16)
    return high, (query - high.to(tl.float32)).to(tl.float16), power.to(tl.float32, bitcast=True)


@triton.jit(
    do_not_specialize=["keys", "subtiles", "tiles", "summary_groups"],
    do_not_specialize_on_alignment=["START", "LENGTHS", "TABLE"],
)
def predict_parts(
    PROJECTED, SUMMARY, HISTORY, AGE, EXTRA, MASK, START, LENGTHS, TABLE, FOUND, PARTS,
    mask_b, mask_h, mask_key, start_stride, length_stride, table_stride, kv_heads, keys, subtiles, tiles,
    summary_groups, scale,
    GROUP: tl.constexpr, GP: tl.constexpr, NP: tl.constexpr, BN: tl.constexpr, TILE: tl.constexpr,
    SPANS: tl.constexpr, RANK: tl.constexpr, RP: tl.constexpr, AGES: tl.constexpr, CHUNK: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, HAS_START: tl.constexpr, HAS_LENGTHS: tl.constexpr,
    PAGED: tl.constexpr, MASKED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Of CHUNK sub-tiles, each with SPANS summaries: FOUND ``[B*G, subtiles, GP]``, log importance before the softmax's
    denominator (with a mask -inf where a row sees no key), and of the denominator PARTS ``[B*G, chunks, 4, GP]``.

    Rows are the columns of matrix products, NP of them. Summaries are float16 as they are, a query is two of them.
    """
    wait_for_launch(PDL)
    chunk, bg = tl.program_id(0), tl.program_id(1)
    b, g = bg // kv_heads, bg % kv_heads
    lo, hi, _ = key_range(
        b, 0, 0, START, LENGTHS, start_stride, length_stride, keys, 1, HAS_START, HAS_LENGTHS, CAUSAL, WINDOW
    )
    if PAGED:
        TABLE += b * table_stride
    tile, r, row = chunk * CHUNK + tl.arange(0, CHUNK), tl.arange(0, RP), tl.arange(0, NP)
    valid = row < GROUP
    head = g * GROUP + tl.minimum(row, GROUP - 1)
    in_range = (tile >= lo // BN) & (tile * BN < hi) & (lo < hi)
    alive = in_range[:, None] & valid[None, :]
    oldest, newest = lo // BN + row * 0, (hi - 1) // BN + row * 0
    if MASKED:
        mask = MASK + b.to(tl.int64) * mask_b + head.to(tl.int64) * mask_h
        first_live, last_live = live_ends(mask, mask_key, lo, hi, NP)
        oldest, newest = first_live // BN, tl.maximum(last_live, 0) // BN
        alive = tl.zeros((CHUNK, NP), tl.int32) != 0
    query = tl.load(PROJECTED + (bg * GP + row)[None, :] * RP + r[:, None], mask=valid[None, :], other=0.0)
    high, low, power = halves(query)
    factor = power * scale
    place = stored_tiles(TABLE, tile, hi, BN, TILE, PAGED) * SPANS
    source = SUMMARY + (g if PAGED else bg).to(tl.int64) * summary_groups * RANK + place[:, None] * RANK + r[None, :]
    SPAN: tl.constexpr = BN // SPANS
    peak = tl.full((CHUNK, NP), LOWEST, tl.float32)
    masses = tl.zeros((CHUNK, NP), tl.float32)
    squares = tl.zeros((CHUNK, NP), tl.float32)
    for u in tl.static_range(SPANS):
        first_key = tile * BN + u * SPAN
        span_live = ((first_key < hi) & (first_key + SPAN > lo))[:, None] & valid[None, :]
        said = tl.load(source + u * RANK, mask=in_range[:, None] & (r < RANK)[None, :], other=0.0)
        if MASKED:
            span_live = tl.zeros((CHUNK, NP), tl.int32) != 0
            for k in range(0, SPAN):
                key = first_key[:, None] + k
                there = (key >= lo) & (key < hi) & valid[None, :]
                span_live = span_live | (tl.load(mask[None, :] + key * mask_key, mask=there, other=0) != 0)
            alive = alive | span_live
        score = tl.where(span_live, tl.dot(said, low, tl.dot(said, high)) * factor[None, :], LOWEST)
        less = tl.exp(-tl.abs(score - peak))  # of the smaller of the two
        above = score > peak
        masses = tl.where(above, masses * less + 1.0, masses + less)
        squares = tl.where(above, squares * less * less + 1.0, squares + less * less)
        peak = tl.maximum(peak, score)
    mass, energy = tl.log(masses) + peak, tl.log(squares) * 0.5 + peak
    mass, energy = tl.where(mass > LOWEST / 2, mass, 0.0), tl.where(energy > LOWEST / 2, energy, 0.0)
    history = HISTORY + (bg.to(tl.int64) * tiles + tile) * 2
    last = tl.log(tl.load(history, mask=in_range, other=0.0) + LEAST)
    mean = tl.log(tl.load(history + 1, mask=in_range, other=0.0) + LEAST)
    extra = EXTRA + head * 4
    bias = age_bias(AGE, tl.maximum(newest[None, :] - tile[:, None], 0), head, AGES)
    bias += last[:, None] * tl.load(extra + 2)[None, :] + mean[:, None] * tl.load(extra + 3)[None, :]
    bias += tl.where(tile[:, None] == oldest[None, :], tl.load(extra)[None, :], 0.0)
    importance = energy + bias + tl.load(extra + 1)[None, :]
    total = tl.where(alive, mass + bias, float("-inf"))
    top = tl.max(total, 0)
    base = tl.where(top == float("-inf"), 0.0, top)
    inside = (tile < subtiles)[:, None] & valid[None, :]
    found = FOUND + (bg.to(tl.int64) * subtiles + tile)[:, None] * GP + row[None, :]
    tl.store(found, tl.where(alive, importance, float("-inf")), mask=inside)
    parts = PARTS + (bg.to(tl.int64) * tl.num_programs(0) + chunk) * PARTS_FIELDS * GP + row
    tl.store(parts, top, mask=valid)
    tl.store(parts + GP, tl.sum(tl.where(alive, tl.exp(total - base[None, :]), 0.0), 0), mask=valid)
    tl.store(parts + 2 * GP, tl.sum((alive & (importance != importance)).to(tl.float32), 0), mask=valid)
    tl.store(parts + 3 * GP, tl.max(tl.where(alive, tile[:, None], -1), 0).to(tl.float32), mask=valid)


@triton.jit
def denominator(PARTS, SINKS, chunks, head, valid, GP: tl.constexpr, CHUNKS_P2: tl.constexpr,
                HAS_SINKS: tl.constexpr):  # fmt: skip
    """Of the rows: the log-sum-exp of all parts (0 without a live key); whether anything is no number; the newest
    sub-tile with a key that a row sees."""
    index, rows = tl.arange(0, CHUNKS_P2), tl.arange(0, GP)
    at = PARTS + index[:, None] * PARTS_FIELDS * GP + rows[None, :]
    inside = (index < chunks)[:, None] & valid[None, :]
    top = tl.load(at, mask=inside, other=float("-inf"))
    most = tl.max(top, 0)
    base = tl.where(most == float("-inf"), 0.0, most)
    total = tl.sum(tl.load(at + GP, mask=inside, other=0.0) * tl.exp(top - base[None, :]), 0)
    newest = tl.max(tl.max(tl.load(at + 3 * GP, mask=inside, other=-1.0), 0), 0).to(tl.int32)
    spoilt = tl.sum(tl.load(at + 2 * GP, mask=inside, other=0.0), 0)
    if HAS_SINKS:
        sink = tl.load(SINKS + head).to(tl.float32)
        new = tl.maximum(base, sink)
        total, base = total * tl.exp(base - new) + tl.exp(sink - new), new
    lse = tl.where(total == 0.0, 0.0, base + tl.log(total))
    bad = ((lse != lse) | (lse == float("inf")) | (spoilt > 0.0)) & valid
    return lse, tl.max(bad.to(tl.int32), 0), newest


@triton.jit
def sequence_length(b, LENGTHS, length_stride, keys, HAS_LENGTHS: tl.constexpr):
    """Keys that a sequence holds."""
    length = keys
    if HAS_LENGTHS:
        length = tl.minimum(length, tl.load(LENGTHS + b * length_stride).to(tl.int32))
    return length


@triton.jit
def skip_threshold(length, margin, skip, BN: tl.constexpr):
    """``audit.skip_threshold``."""
    per_tile: tl.constexpr = BN**0.5
    return skip / (tl.maximum(length.to(tl.float32) / BN, 1.0) * per_tile * margin)


@triton.jit(
    do_not_specialize=["keys", "subtiles", "chunks", "trained"],
    do_not_specialize_on_alignment=["START", "LENGTHS", "TABLE"],
)
def list_subtiles(
    FOUND, PARTS, ROWINFO, STATE, TRUST, MARGIN, SINKS, START, LENGTHS, TABLE, PREDICTED, LEVELS, LIST, PLACES,
    COUNTS,
    start_stride, length_stride, table_stride, kv_heads, keys, subtiles, chunks, trained, skip,
    GROUP: tl.constexpr, GP: tl.constexpr, BN: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr,
    CHUNKS_P2: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, HAS_SINKS: tl.constexpr,
    HAS_START: tl.constexpr, HAS_LENGTHS: tl.constexpr, PAGED: tl.constexpr, MASKED: tl.constexpr, SKIPS: tl.constexpr,
    AUDIT_WINDOW: tl.constexpr, TRUST_FIELDS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One sequence and kv head. PREDICTED ``[B*G, subtiles]`` (-1 without a live key), LEVELS likewise
    (``ir.Precision``), LIST and PLACES likewise; COUNTS ``[B*G, 4]``: sub-tiles in LIST; whether the gate is used;
    whether it gave something that is no number; 1 where the guard has raised the floor, + 2 where nothing may stay
    at the high plane."""
    wait_for_launch(PDL)
    bg = tl.program_id(0)
    b, g = bg // kv_heads, bg % kv_heads
    rows = tl.arange(0, GP)
    valid = rows < GROUP
    lo, hi, _ = key_range(
        b, 0, 0, START, LENGTHS, start_stride, length_stride, keys, 1, HAS_START, HAS_LENGTHS, CAUSAL, WINDOW
    )
    if PAGED:
        TABLE += b * table_stride
    lse, broken, newest = denominator(
        PARTS + bg.to(tl.int64) * chunks * PARTS_FIELDS * GP, SINKS, chunks, g * GROUP + rows % GROUP, valid, GP,
        CHUNKS_P2, HAS_SINKS,
    )  # fmt: skip
    trust = TRUST + bg * TRUST_FIELDS
    length = sequence_length(b, LENGTHS, length_stride, keys, HAS_LENGTHS)
    guarded = tl.load(STATE + bg * 4 + 1)
    use = (tl.load(trust + 2) == 0.0) & (length <= trained) & ((guarded > 0.0) == 0) & (broken == 0)
    settings = ROWINFO + bg.to(tl.int64) * ROW_FIELDS * GP + 4 * GP  # as when the step began, like the look-ahead's
    tau, refined_by = tl.load(settings), tl.load(settings + GP)
    all_refined, raised = refined_by != 0.0, refined_by >= 2.0
    bar = tl.where(all_refined, -2.0, tau)
    below = -1.0
    if SKIPS:
        steps = tl.load(trust + 4)
        whole = steps - tl.floor(steps / AUDIT_WINDOW) * AUDIT_WINDOW == 0.0
        threshold = skip_threshold(length, tl.load(MARGIN + g), skip, BN)
        below = tl.where(use & (whole == 0) & (raised == 0), threshold, -1.0)
    lead = bg.to(tl.int64) * subtiles
    count = 0
    for first in range(0, subtiles, CHUNK):
        tile = first + tl.arange(0, CHUNK)
        alive = (tile >= lo // BN) & (tile * BN < hi) & (lo < hi)
        at = FOUND + (lead + tile)[:, None] * GP + rows[None, :]
        found = tl.load(at, mask=alive[:, None] & valid[None, :], other=float("-inf"))
        if MASKED:
            alive = alive & (tl.max(((found == float("-inf")) == 0).to(tl.int32), 1) != 0)
        predicted = tl.max(tl.exp(tl.minimum(found - lse[None, :], 0.0)), 1)
        predicted = tl.where(tile == newest, 1.0, predicted)
        level = tl.where(predicted <= below, 0, tl.where(predicted <= bar, 1, 2))  # what is NaN is refined
        level = tl.where(alive, tl.where(use, level, 1), 0)
        inside = tile < subtiles
        tl.store(PREDICTED + lead + tile, tl.where(alive, predicted, -1.0), mask=inside)
        tl.store(LEVELS + lead + tile, level.to(tl.uint8), mask=inside)
        listed = (level == 1) & inside
        entry = lead + count + tl.cumsum(listed.to(tl.int32), 0) - 1
        tl.store(LIST + entry, tile, mask=listed)
        if PAGED:
            tl.store(PLACES + entry, stored_tiles(TABLE, tile, hi, BN, TILE, PAGED).to(tl.int32), mask=listed)
        count += tl.sum(listed.to(tl.int32), 0)
    counts = COUNTS + bg * 4
    tl.store(counts, count)
    tl.store(counts + 1, use.to(tl.int32))
    tl.store(counts + 2, broken)
    tl.store(counts + 3, (guarded > 0.0).to(tl.int32) + all_refined.to(tl.int32) * 2)
