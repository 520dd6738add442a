"""First launch: balance, rotate and round the queries; note what scores and certificate need of each row."""

from __future__ import annotations

import triton
import triton.language as tl

from lamp_compile.runtime.kernels._device import ROW_FIELDS, everywhere, rotation, round_even, turned, wait_for_launch


@triton.jit(do_not_specialize=["queries", "first_token"])
def prepare_query(
    Q, BALANCE, SIGNS, TAU, FLOOR, STATE, Q8, ROWINFO, GATE, GATE_BIAS, PROJECTED,
    stride_b, stride_h, stride_s, balance_b, tau_b, floor_b, kv_heads, queries, first_token, root,
    GROUP: tl.constexpr, GP: tl.constexpr, TOKENS: tl.constexpr, HALF: tl.constexpr, HP: tl.constexpr,
    ROTATE: tl.constexpr, BALANCED: tl.constexpr, PARTS: tl.constexpr,
    PDL: tl.constexpr, RANK: tl.constexpr, RP: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Q ``[B, H, S, D]`` -> Q8 int8 ``[B*G, blocks, GP, 2*HP]``, ROWINFO ``[B*G, blocks, ROW_FIELDS, GP]``:
    rounding step, sum of q8, squared norm of the prepared query, sum of q8 over the lower nibbles' channels; tau, and 1
    where it refines everything, + 2 where a floor does (``settings_of``); 0, from which ``cuda/finish.cu`` counts.
    SIGNS and root as of ``turned``. With a RANK, of one token, the projection of a look-ahead network too: GATE
    ``[H, D, R]``, GATE_BIAS ``[H, R]`` -> PROJECTED ``[B*G, GP, RP]``, STEP numbers at a time."""
    if ROTATE:  # no launch ahead of this one makes it: read while that ends
        first, second = rotation(SIGNS, 0, HALF, HP, False)
    wait_for_launch(PDL)
    bg, block = tl.program_id(0), tl.program_id(1)
    b, g = bg // kv_heads, bg % kv_heads
    rows, half = tl.arange(0, GP), tl.arange(0, HP)
    token = first_token + block * TOKENS + rows // GROUP
    valid = (rows < GROUP * TOKENS) & (token < queries)
    source = Q + b.to(tl.int64) * stride_b + (g * GROUP + rows % GROUP).to(tl.int64) * stride_h
    source += token.to(tl.int64) * stride_s
    # Read with the query: behind the first thing that is written it would be waited for alone.
    tau = tl.load(TAU + b * tau_b + g)
    raised = (tl.load(FLOOR + b * floor_b + g) >= 1.0) | (tl.load(STATE + bg * 4 + 1) >= 1.0)
    if ROTATE:
        channels = tl.arange(0, 2 * HP)
        x = tl.load(
            source[:, None] + channels[None, :], mask=valid[:, None] & (channels < 2 * HALF)[None, :], other=0.0
        )
        x = x.to(tl.float32)
        if BALANCED:
            x = (
                x
                * tl.load(BALANCE + b * balance_b + g * 2 * HALF + channels, mask=channels < 2 * HALF, other=0.0)[
                    None, :
                ]
            )
        upper, lower = turned(x, first, second, SIGNS, root, HALF, HP, PARTS, False)
    else:
        mask = valid[:, None] & (half < HALF)[None, :]
        upper = tl.load(source[:, None] + half[None, :], mask=mask, other=0.0).to(tl.float32)
        lower = tl.load(source[:, None] + half[None, :] + HALF, mask=mask, other=0.0).to(tl.float32)
        if BALANCED:
            at = BALANCE + b * balance_b + g * 2 * HALF + half
            upper = upper * tl.load(at, mask=half < HALF, other=0.0)[None, :]
            lower = lower * tl.load(at + HALF, mask=half < HALF, other=0.0)[None, :]
    nothing = upper * 0.0 + lower * 0.0  # NaN where the row holds a NaN or an infinity
    step = everywhere(tl.max(tl.maximum(tl.abs(upper), tl.abs(lower)), 1), GP) / 127.0
    step = tl.where(step == 0.0, 1.0, step)
    upper = round_even(tl.div_rn(upper, tl.broadcast_to(step[:, None], upper.shape)))
    lower = round_even(tl.div_rn(lower, tl.broadcast_to(step[:, None], lower.shape)))
    place = bg.to(tl.int64) * tl.num_programs(1) + block
    target = Q8 + place * GP * 2 * HP + rows[:, None] * (2 * HP) + half[None, :]
    tl.store(target, upper.to(tl.int8))
    tl.store(target + HP, lower.to(tl.int8))
    info = ROWINFO + place * ROW_FIELDS * GP + rows
    all_refined = (tau <= 0.0).to(tl.float32) + raised.to(tl.float32) * 2.0
    tl.store(info + 4 * GP, tl.zeros((GP,), tl.float32) + tau)
    tl.store(info + 5 * GP, tl.zeros((GP,), tl.float32) + all_refined)
    tl.store(info + 6 * GP, tl.zeros((GP,), tl.float32))
    # One sum, which waits for all warps, instead of four.
    sums = tl.sum(tl.join(tl.join(upper + lower, lower), tl.join(upper * upper + lower * lower, nothing)), 1)
    whole, real = tl.split(sums)
    all_sum, lower_sum = tl.split(whole)
    square, spoilt = tl.split(real)
    spoilt = everywhere(spoilt, GP)
    tl.store(info, step + spoilt)
    tl.store(info + GP, everywhere(all_sum, GP))
    tl.store(info + 2 * GP, everywhere(square, GP) * step * step)
    tl.store(info + 3 * GP, everywhere(lower_sum, GP))
    for rank in tl.static_range(0, RP if RANK else 0, STEP):
        r = rank + tl.arange(0, STEP)
        channel = ((g * GROUP + rows) * 2 * HALF)[:, None] + half[None, :]
        weight = GATE + channel[:, :, None] * RANK + r[None, None, :]
        mask = (valid[:, None] & (half < HALF)[None, :])[:, :, None] & (r < RANK)[None, None, :]
        said = tl.sum(upper[:, :, None] * tl.load(weight, mask=mask, other=0.0).to(tl.float32), 1)
        weight += HALF * RANK
        said += tl.sum(lower[:, :, None] * tl.load(weight, mask=mask, other=0.0).to(tl.float32), 1)
        inside = valid[:, None] & (r < RANK)[None, :]
        bias = tl.load(GATE_BIAS + (g * GROUP + rows)[:, None] * RANK + r[None, :], mask=inside, other=0.0)
        target_said = PROJECTED + (place * GP + rows)[:, None] * RP + r[None, :]
        tl.store(target_said, tl.where(inside, said * (step + spoilt)[:, None] + bias, 0.0))
