"""What the Triton kernels share: nibbles to int8, where a key's bytes are, which keys a row sees.

Tiles are ``[keys, columns]``: the few query rows that share a kv head are the narrow side of every matrix product, and
both planes are read in the order in which they are stored. Where the rows are fewer than the columns of the smallest
matrix instruction, several sub-tiles share a pass: with 4 rows and 8 columns, columns 0-3 belong to one sub-tile and
4-7 to the next (column = part * rows + row). Each sub-tile is multiplied by queries that are zero in the other's
columns, and the integer products simply add up.
"""

from __future__ import annotations

import triton
import triton.language as tl

DEAD = tl.constexpr(-1e37)
"""Added to the score of a key that a row does not see."""
EMPTY = tl.constexpr(-1e20)
"""Running maximum before any live key; what lies below counts as dead."""
HEADROOM = tl.constexpr(40.0)
"""Powers of two that a maximum may lie above the one sums are relative to, before they are moved: squares of weights
are summed too, and must stay finite."""
MAGIC = tl.constexpr(12582912.0)
"""1.5 * 2^23: x + MAGIC is a float whose low bits are x rounded to a whole number, for |x| < 2^22."""
MAGIC_BITS = tl.constexpr(0x4B400000)
"""MAGIC as an integer: where a product starts from it, its bits are the float MAGIC + product."""
ROW_FIELDS = tl.constexpr(7)
"""Numbers that ``prepare_query`` notes of a row."""
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def upper_nibbles(x, ASM: tl.constexpr):
    """16 * (upper nibble) as int8."""
    if ASM:
        return tl.inline_asm_elementwise(
            "and.b32 $0, $1, 0xF0F0F0F0;", "=r,r", [x], dtype=tl.int8, is_pure=True, pack=4
        )
    return (x & 0xF0).to(tl.int8, bitcast=True)


@triton.jit
def lower_nibbles(x, ASM: tl.constexpr):
    """(lower nibble) + 8 as int8: one operation, where moving it up would take two."""
    if ASM:
        return tl.inline_asm_elementwise(
            "lop3.b32 $0, $1, 0x0F0F0F0F, 0x08080808, 0x6A;", "=r,r", [x], dtype=tl.int8, is_pure=True, pack=4
        )
    return ((x & 0x0F) ^ 0x08).to(tl.int8, bitcast=True)


@triton.jit
def lower_nibbles16(x, ASM: tl.constexpr):
    """16 * (lower nibble) as int8."""
    if ASM:
        return tl.inline_asm_elementwise(
            "{ .reg .b32 t; shl.b32 t, $1, 4; and.b32 $0, t, 0xF0F0F0F0; }",
            "=r,r", [x], dtype=tl.int8, is_pure=True, pack=4,
        )  # fmt: skip
    return ((x << 4) & 0xF0).to(tl.int8, bitcast=True)


@triton.jit
def upper_nibbles8(x, ASM: tl.constexpr):
    """(upper nibble) + 8 as int8."""
    if ASM:
        return tl.inline_asm_elementwise(
            "{ .reg .b32 t; shr.u32 t, $1, 4; lop3.b32 $0, t, 0x0F0F0F0F, 0x08080808, 0x6A; }",
            "=r,r", [x], dtype=tl.int8, is_pure=True, pack=4,
        )  # fmt: skip
    return (((x >> 4) & 0x0F) ^ 0x08).to(tl.int8, bitcast=True)


@triton.jit
def wait_for_launch(PDL: tl.constexpr):
    """Programmatic dependent launch: this program may have started before the launch ahead of it was done; wait for
    that here, and let the next launch start the same way."""
    wait_for_last_launch(PDL)
    let_next_launch(PDL)


@triton.jit
def wait_for_last_launch(PDL: tl.constexpr):
    """``wait_for_launch`` of a program that lets the next launch start later."""
    if PDL:
        tl.extra.cuda.gdc_wait()


@triton.jit
def let_next_launch(PDL: tl.constexpr):
    """The next launch starts when all programs of this one have come here or ended."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def round_even(x):
    """To the nearest whole number, ties to even, for |x| < 2^22."""
    return (x + MAGIC) - MAGIC


@triton.jit
def rotation(SIGNS, piece: tl.constexpr, HALF: tl.constexpr, HP: tl.constexpr, BACK: tl.constexpr):
    """Both halves of the columns of the rotation, with BACK of the inverse ``[2 * HP, HP]``; where these are more than
    shared memory holds, a piece of their rows. SIGNS float16 ``[D, D]`` is the rotation times sqrt(D): 1 and -1, so
    that products are exact."""
    ROWS: tl.constexpr = 2 * HP if HP <= 64 else 64
    channels, half = piece * ROWS + tl.arange(0, ROWS), tl.arange(0, HP)
    inside = (channels < 2 * HALF)[:, None] & (half < HALF)[None, :]
    if BACK:
        at, step = SIGNS + channels[:, None] + half[None, :] * (2 * HALF), 2 * HALF * HALF
    else:
        at, step = SIGNS + channels[:, None] * (2 * HALF) + half[None, :], HALF
    return tl.load(at, mask=inside, other=0.0), tl.load(at + step, mask=inside, other=0.0)


@triton.jit
def piece_of(x, piece: tl.constexpr, PIECES: tl.constexpr):
    """Columns of x ``[n, PIECES * m]``: one piece of them."""
    if PIECES > 1:
        cut = tl.reshape(x, (x.shape[0], PIECES, x.shape[1] // PIECES))
        x = tl.sum(tl.where((tl.arange(0, PIECES) == piece)[None, :, None], cut, 0.0), 1)
    return x


@triton.jit
def turned(x, first, second, SIGNS, root, HALF: tl.constexpr, HP: tl.constexpr, PARTS: tl.constexpr,
           BACK: tl.constexpr):  # fmt: skip
    """Rows ``[n, 2 * HP]`` times ``rotation``, of which ``first`` and ``second`` are piece 0, and root = 1 / sqrt(D) ->
    first, second half of the channels ``[n, HP]``. Rows are brought to [1, 2) by a power of two and split into PARTS
    halves of float16: one holds bfloat16, two float32."""
    PIECES: tl.constexpr = 1 if HP <= 64 else HP // 32
    power = tl.max(tl.abs(x), 1).to(tl.int32, bitcast=True) & 0x7F800000
    power = tl.where((power > 0) & (power < 0x7F000000), power, 0x3F800000)
    x = x * (0x7F000000 - power).to(tl.float32, bitcast=True)[:, None]
    high = x.to(tl.float16)
    low = (x - high.to(tl.float32)).to(tl.float16)
    upper = tl.zeros((x.shape[0], HP), tl.float32)
    lower = tl.zeros((x.shape[0], HP), tl.float32)
    for piece in tl.static_range(PIECES):
        if piece > 0:
            first, second = rotation(SIGNS, piece, HALF, HP, BACK)
        some = piece_of(high, piece, PIECES)
        upper, lower = tl.dot(some, first, upper), tl.dot(some, second, lower)
        if PARTS == 2:
            some = piece_of(low, piece, PIECES)
            upper, lower = tl.dot(some, first, upper), tl.dot(some, second, lower)
    back = (power.to(tl.float32, bitcast=True) * root)[:, None]
    return upper * back, lower * back


@triton.jit
def tanh(x):
    """Hyperbolic tangent by the exponential; exact at both ends."""
    return 1.0 - 2.0 / (1.0 + tl.exp2(x * (2.0 * 1.4426950408889634)))


@triton.jit
def finite_scale(scale):
    """Stored scale as float32, NaN where it is infinite."""
    scale = scale.to(tl.float32)
    return scale + (scale - scale)


@triton.jit
def to_columns(x, PACK: tl.constexpr, GP: tl.constexpr):
    """``[n, PACK]`` -> ``[n, PACK * GP]``: each sub-tile's number in all of its columns."""
    return tl.reshape(tl.broadcast_to(x[:, :, None], (x.shape[0], PACK, GP)), (x.shape[0], PACK * GP))


@triton.jit
def of_part(x, PACK: tl.constexpr, GP: tl.constexpr):
    """``[PACK]`` -> ``[PACK * GP]``: each sub-tile's number in all of its columns."""
    return tl.reshape(tl.broadcast_to(x[:, None], (PACK, GP)), (PACK * GP,))


@triton.jit
def query_of(Q8, ROWINFO, place, row, scale, GP: tl.constexpr, HP: tl.constexpr):
    """Of the columns: both halves of the query ``[HP, columns]``; the factor from products to scores in log2 units; the
    sum of q8; where products of the high plane start, so that the + 8 of lower nibbles is taken off beforehand (the
    products of 256 channels then stay exact as floats)."""
    half = tl.arange(0, HP)
    query = Q8 + place * GP * 2 * HP + row[None, :] * (2 * HP) + half[:, None]
    info = ROWINFO + place * ROW_FIELDS * GP + row
    factor = tl.load(info) * (scale * LOG2E)
    origin = MAGIC_BITS - (tl.load(info + 3 * GP) * 128.0).to(tl.int32)
    return tl.load(query), tl.load(query + HP), factor, tl.load(info + GP), origin


@triton.jit
def settings_of(ROWINFO, place, GP: tl.constexpr):
    """tau, and whether everything is refined, as they were when the step began: others may change them meanwhile, and
    all launches of a step must agree."""
    at = ROWINFO + place * ROW_FIELDS * GP + 4 * GP
    return tl.load(at), tl.load(at + GP) != 0.0


@triton.jit
def key_mask(MASK, j, step, hi, PRESENT: tl.constexpr):
    """Whether a mask of one number per key allows keys j; 1 without one."""
    if PRESENT:
        allowed = (tl.load(MASK + j * step, mask=j < hi, other=0) != 0).to(tl.int32)
    else:
        allowed = tl.full(j.shape, 1, tl.int32)
    return allowed


@triton.jit
def over_parts(x, PACK: tl.constexpr, GP: tl.constexpr):
    """``[PACK * GP]`` -> ``[PACK, GP]``."""
    return tl.reshape(x, (PACK, GP))


@triton.jit
def everywhere(x, n: tl.constexpr):
    """The same n numbers, few, each by way of a single one that all threads hold. Broadcast as it is, what a sum gave
    makes the compiler lay the larger tensor out like the sum, and move all of that through shared memory."""
    index, found = tl.arange(0, n), tl.zeros((n,), x.dtype)
    for i in tl.static_range(n):
        found = tl.where(index == i, tl.sum(tl.where(index == i, x, 0), 0), found)
    return found


@triton.jit
def folded(x, FOLD: tl.constexpr):
    """``[n, columns]`` -> ``[FOLD, columns]``, sums: where FOLD is 8, of numbers that one thread holds anyway (rows of
    a matrix product lie 8 apart in it), so that sums carried through a loop take few registers."""
    if x.shape[0] > FOLD:
        x = tl.sum(tl.reshape(x, (x.shape[0] // FOLD, FOLD, x.shape[1])), 0)
    return x


@triton.jit
def weigh(p, per_key, MASKED: tl.constexpr):
    """p times a number per key and column; a weight of 0 takes nothing, not even NaN, where rows see different keys.
    Differences of weights may be negative."""
    x = p * per_key
    if MASKED:
        x = tl.where(p != 0.0, x, 0.0)
    return x


@triton.jit
def relative(y, MASKED: tl.constexpr):
    """Scores ``[BN, columns]`` -> each column's largest, and weights relative to it: where rows see different keys 0 of
    a row that sees none of these, else 1, which only a sum's ``gain`` of 0 takes out."""
    local = tl.max(y, 0)
    base = local
    if MASKED:
        base = tl.maximum(local, EMPTY)
    return local, tl.exp2(y - base[None, :])


@triton.jit
def peak_of(v_scale, MASKED: tl.constexpr):
    """The largest value scale of a sub-tile ``[columns]``. Where rows see different keys it is a number even if all of
    these are NaN: it must not reach rows that see none of them, and ``weigh`` carries NaN to the others."""
    peak = tl.max(v_scale, 0)
    if MASKED:
        peak = tl.where(peak > 0.0, peak, 0.0)
    return peak


@triton.jit
def key_range(
    b, first_token, last_token, START, LENGTHS, start_stride, length_stride, keys, queries,
    HAS_START: tl.constexpr, HAS_LENGTHS: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """(first key, end, position of query 0) for tokens first..last of sequence b. CAUSAL: 0 no, 1 top left, 2 bottom
    right."""
    end = keys
    if HAS_LENGTHS:
        end = tl.minimum(end, tl.load(LENGTHS + b * length_stride).to(tl.int32))
    first = 0
    if HAS_START:
        first = tl.minimum(tl.maximum(first, tl.load(START + b * start_stride).to(tl.int32)), end)
    position = 0
    if CAUSAL == 2:
        position = end - queries
    stop = end
    if CAUSAL != 0:
        stop = tl.minimum(stop, position + last_token + 1)
        if WINDOW > 0:
            first = tl.maximum(first, position + first_token - WINDOW + 1)
    first = tl.minimum(first, end)  # an empty range lies inside the planes too
    return first, tl.maximum(stop, first), position
