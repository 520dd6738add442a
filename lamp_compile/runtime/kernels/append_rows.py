"""One launch that stores new keys and values: balanced, rotated, quantised to nested8, packed, written in place."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from lamp_compile.runtime.kernels._device import rotation, round_even, turned, wait_for_launch
from lamp_compile.runtime.kernels._tensors import padded_half, parts, row_step, sequence_step, signs
from lamp_compile.runtime.kernels.targets import target_of

ROWS = 16
"""Rows of one program: what a matrix instruction takes."""


@triton.jit
def nested_rows(source, channels_step, valid, DIVISOR, first, second, SIGNS, root, HALF: tl.constexpr,
                HP: tl.constexpr, ROTATE: tl.constexpr, DIVIDED: tl.constexpr, PARTS: tl.constexpr):  # fmt: skip
    """Rows at ``source`` ``[ROWS]`` -> (high bytes, residual bytes ``[ROWS, HP]``, scale ``[ROWS]``); ``first``,
    ``second`` as of ``turned``."""
    half = tl.arange(0, HP)
    if ROTATE:
        channels = tl.arange(0, 2 * HP)
        x = tl.load(source[:, None] + channels[None, :] * channels_step,
                    mask=valid[:, None] & (channels < 2 * HALF)[None, :], other=0.0).to(tl.float32)  # fmt: skip
        if DIVIDED:
            divisor = tl.load(DIVISOR + channels, mask=channels < 2 * HALF, other=1.0)
            x = tl.div_rn(x, tl.broadcast_to(divisor[None, :], x.shape))
        upper, lower = turned(x, first, second, SIGNS, root, HALF, HP, PARTS, False)
    else:
        mask = valid[:, None] & (half < HALF)[None, :]
        at = source[:, None] + half[None, :] * channels_step
        upper = tl.load(at, mask=mask, other=0.0).to(tl.float32)
        lower = tl.load(at + HALF * channels_step, mask=mask, other=0.0).to(tl.float32)
        if DIVIDED:
            divisor = tl.load(DIVISOR + half, mask=half < HALF, other=1.0)
            upper = tl.div_rn(upper, tl.broadcast_to(divisor[None, :], upper.shape))
            divisor = tl.load(DIVISOR + HALF + half, mask=half < HALF, other=1.0)
            lower = tl.div_rn(lower, tl.broadcast_to(divisor[None, :], lower.shape))
    spoilt = tl.sum(upper * 0.0 + lower * 0.0, 1)  # NaN where the row holds a NaN or an infinity: the scale carries it
    largest = tl.maximum(tl.max(tl.abs(upper), 1), tl.max(tl.abs(lower), 1))
    scale = (largest / 119.0 + spoilt).to(tl.float16)
    divisor = scale.to(tl.float32)
    divisor = tl.where(divisor > 0.0, divisor, 1.0)
    small = (scale.to(tl.float32) > 0.0)[:, None]
    divisor = tl.broadcast_to(divisor[:, None], upper.shape)
    upper = tl.where(small, tl.minimum(tl.maximum(round_even(tl.div_rn(upper, divisor)), -119.0), 119.0), 0.0).to(
        tl.int32
    )
    lower = tl.where(small, tl.minimum(tl.maximum(round_even(tl.div_rn(lower, divisor)), -119.0), 119.0), 0.0).to(
        tl.int32
    )
    upper_high, lower_high = (upper + 8) >> 4, (lower + 8) >> 4
    high = ((upper_high & 15) << 4) | (lower_high & 15)
    residual = (((upper - (upper_high << 4)) & 15) << 4) | ((lower - (lower_high << 4)) & 15)
    return high.to(tl.uint8), residual.to(tl.uint8), scale


@triton.jit
def places_of(
    POSITIONS, TABLE, position_step, table_stride, pages, kv_heads, batch, count, plane_keys,
    TILE: tl.constexpr, ROWS: tl.constexpr, SHARED: tl.constexpr, PAGED: tl.constexpr,
):  # fmt: skip
    """Of the rows of a program ``[ROWS]``: sequence, token, whether there is one, whether it is stored, and where: the
    first key of its plane, and the key in it."""
    g = tl.program_id(1)
    index = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    if SHARED:  # one divisor for all sequences: rows of different sequences in one program
        b, token = index // count, index % count
        valid = index < batch * count
    else:
        steps = tl.cdiv(count, ROWS)
        b = tl.program_id(0) // steps + tl.zeros((ROWS,), tl.int32)
        token = tl.program_id(0) % steps * ROWS + tl.arange(0, ROWS)
        valid = token < count
    first = tl.load(POSITIONS + b * position_step, mask=valid, other=-1).to(tl.int32)
    j = first + token
    stored = valid & (first >= 0)
    if PAGED:
        stored = stored & (j // TILE < pages)
        page = tl.load(TABLE + b * table_stride + j // TILE, mask=stored, other=-1).to(tl.int64)
        stored = stored & (page >= 0)
        plane = g.to(tl.int64) * plane_keys + tl.zeros((ROWS,), tl.int64)
        at = page * TILE + j % TILE
    else:
        stored = stored & (j < plane_keys)
        plane = (b * kv_heads + g).to(tl.int64) * plane_keys
        at = j.to(tl.int64)
    return b, token, valid, stored, plane, at


@triton.jit(do_not_specialize=["batch", "count", "pages"], do_not_specialize_on_alignment=["POSITIONS", "TABLE"])
def append_rows(
    K, V, KH, KL, KS, VH, VL, VS, BALANCE, POSITIONS, TABLE, SIGNS_K, SIGNS_V,
    k_b, k_g, k_n, k_d, v_b, v_g, v_n, v_d, position_step, balance_b, table_stride, pages, kv_heads, batch, count,
    plane_keys, root_k, root_v,
    HALF_K: tl.constexpr, HP_K: tl.constexpr, HALF_V: tl.constexpr, HP_V: tl.constexpr, TILE: tl.constexpr,
    ROWS: tl.constexpr, ROTATE: tl.constexpr, BALANCED: tl.constexpr, SHARED: tl.constexpr, PAGED: tl.constexpr,
    PARTS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """K ``[B, G, n, D]`` (third grid axis 0) or V (axis 1): rows of several sequences and tokens for one kv head."""
    g, values = tl.program_id(1), tl.program_id(2)
    # No launch ahead of this one makes the rotation: it is read while that ends.
    if values == 0:
        first, second = rotation(SIGNS_K, 0, HALF_K, HP_K, False) if ROTATE else (0.0, 0.0)
        wait_for_launch(PDL)
        b, token, valid, stored, plane, at = places_of(
            POSITIONS, TABLE, position_step, table_stride, pages, kv_heads, batch, count, plane_keys, TILE, ROWS,
            SHARED, PAGED,
        )  # fmt: skip
        source = K + b.to(tl.int64) * k_b + g.to(tl.int64) * k_g + token.to(tl.int64) * k_n
        divisor = BALANCE
        if BALANCED:
            divisor += tl.max(b, 0) * balance_b + g * 2 * HALF_K
        high, residual, scale = nested_rows(
            source, k_d, valid, divisor, first, second, SIGNS_K, root_k, HALF_K, HP_K, ROTATE, BALANCED, PARTS
        )
        half = tl.arange(0, HP_K)
        target = ((plane + at) * HALF_K)[:, None] + half[None, :]
        mask = stored[:, None] & (half < HALF_K)[None, :]
        tl.store(KH + target, high, mask=mask)
        tl.store(KL + target, residual, mask=mask)
        tl.store(KS + plane + at, scale, mask=stored)
    else:  # names of their own: Triton joins those of both branches, and the sizes differ
        v_first, v_second = rotation(SIGNS_V, 0, HALF_V, HP_V, False) if ROTATE else (0.0, 0.0)
        wait_for_launch(PDL)
        b, token, valid, stored, plane, at = places_of(
            POSITIONS, TABLE, position_step, table_stride, pages, kv_heads, batch, count, plane_keys, TILE, ROWS,
            SHARED, PAGED,
        )  # fmt: skip
        value_source = V + b.to(tl.int64) * v_b + g.to(tl.int64) * v_g + token.to(tl.int64) * v_n
        v_high, v_residual, v_scale = nested_rows(
            value_source, v_d, valid, BALANCE, v_first, v_second, SIGNS_V, root_v, HALF_V, HP_V, ROTATE, False, PARTS
        )
        half_v = tl.arange(0, HP_V)
        value_target = (plane * HALF_V + at // TILE * (TILE * HALF_V) + at % TILE)[:, None] + half_v[None, :] * TILE
        value_mask = stored[:, None] & (half_v < HALF_V)[None, :]
        tl.store(VH + value_target, v_high, mask=value_mask)
        tl.store(VL + value_target, v_residual, mask=value_mask)
        tl.store(VS + plane + at, v_scale, mask=stored)


def append(
    k: Tensor, v: Tensor, planes: tuple[Tensor, ...], balance: Tensor | None, positions: Tensor,
    table: Tensor | None, rotation: str,
) -> None:  # fmt: skip
    """Store k ``[B, G, n, D]`` and v ``[B, G, n, Dv]`` in six planes, in place (see ``lamp::append``)."""
    batch, kv_heads, count, head_dim = k.shape
    k_high, v_high = planes[0], planes[3]
    tile, half_k, half_v = k_high.shape[3], k_high.shape[4], v_high.shape[3]
    shared = balance is None or balance.dim() == 2 or balance.shape[0] == 1
    programs = -(-batch * count // ROWS) if shared else batch * -(-count // ROWS)
    rotate = rotation != "none"
    balance = None if balance is None else balance.contiguous()
    matrices = [signs(d, k.device) if rotate else k for d in (head_dim, 2 * half_v)]
    append_rows[(programs, kv_heads, 2)](
        k, v, *planes, balance, positions, table, *matrices, *k.stride(), *v.stride(),
        sequence_step(positions), 0 if shared else row_step(balance), 0 if table is None else table.stride(0),
        0 if table is None else table.shape[1], kv_heads, batch, count, k_high.shape[2] * tile,
        head_dim**-0.5, (2 * half_v) ** -0.5,
        HALF_K=half_k, HP_K=padded_half(half_k), HALF_V=half_v, HP_V=padded_half(half_v), TILE=tile, ROWS=ROWS,
        ROTATE=rotate, BALANCED=balance is not None, SHARED=shared, PAGED=table is not None,
        PARTS=parts(k, balance), **target_of(k.device).dependent(), num_warps=4,
    )  # fmt: skip
