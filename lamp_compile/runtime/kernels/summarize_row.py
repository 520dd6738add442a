"""One launch that summarises the group of keys that a new one fell into, for a look-ahead network."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from lamp_compile.runtime.kernels._device import finite_scale
from lamp_compile.runtime.kernels._tensors import padded_half, power_of_two, sequence_step


@triton.jit(do_not_specialize=["pages"], do_not_specialize_on_alignment=["POSITIONS", "TABLE"])
def summarize_row(
    KH, KL, KS, SUMMARY, KEY, KEY_BIAS, POSITIONS, TABLE, position_step, table_stride, pages, kv_heads, plane_keys,
    HALF: tl.constexpr, HP: tl.constexpr, TILE: tl.constexpr, SPAN: tl.constexpr, RANK: tl.constexpr,
    RP: tl.constexpr, STEP: tl.constexpr, PAGED: tl.constexpr,
):  # fmt: skip
    """Of one sequence and kv head: SUMMARY ``[planes, keys / SPAN, R]`` from the mean of those keys of the group that
    are there."""
    bg = tl.program_id(0)
    b, g = bg // kv_heads, bg % kv_heads
    position = tl.load(POSITIONS + b * position_step).to(tl.int32)
    group = position // SPAN
    stored = (position >= 0) & (group * SPAN < pages * TILE)
    page = group * SPAN // TILE
    plane = bg.to(tl.int64) * plane_keys
    if PAGED:
        page = tl.load(TABLE + b * table_stride + page, mask=stored, other=-1).to(tl.int64)
        stored, page = stored & (page >= 0), tl.maximum(page, 0)
        plane = g.to(tl.int64) * plane_keys
    first = tl.where(stored, page * TILE + group * SPAN % TILE, 0)
    key, half, r = tl.arange(0, SPAN), tl.arange(0, HP), tl.arange(0, RP)
    present = key < position + 1 - group * SPAN
    at = plane + first + key
    bytes_at = at[:, None] * HALF + half[None, :]
    mask = stored & present[:, None] & (half < HALF)[None, :]
    high, low = tl.load(KH + bytes_at, mask=mask, other=0), tl.load(KL + bytes_at, mask=mask, other=0)
    # Nibbles are numbers from -8 to 7: x = 16 * high + low.
    upper = (high & 0xF0).to(tl.int8, bitcast=True).to(tl.float32) + signed(low >> 4)
    lower = (high << 4).to(tl.int8, bitcast=True).to(tl.float32) + signed(low & 0x0F)
    scale = finite_scale(tl.load(KS + at, mask=stored & present, other=0.0))
    count = tl.minimum(tl.maximum(position + 1 - group * SPAN, 1), SPAN).to(tl.float32)
    upper = tl.sum(upper * scale[:, None], 0) / count
    lower = tl.sum(lower * scale[:, None], 0) / count
    lead = plane // SPAN + first // SPAN
    for start in tl.static_range(0, RP, STEP):
        r = start + tl.arange(0, STEP)
        weight = KEY + (g * 2 * HALF + half)[:, None] * RANK + r[None, :]
        inside = (half < HALF)[:, None] & (r < RANK)[None, :]
        said = tl.sum(upper[:, None] * tl.load(weight, mask=inside, other=0.0).to(tl.float32), 0)
        weight += HALF * RANK
        said += tl.sum(lower[:, None] * tl.load(weight, mask=inside, other=0.0).to(tl.float32), 0)
        said += tl.load(KEY_BIAS + g * RANK + r, mask=r < RANK, other=0.0)
        tl.store(SUMMARY + lead * RANK + r, said.to(SUMMARY.dtype.element_ty), mask=stored & (r < RANK))


@triton.jit
def signed(nibble):
    """A number from -8 to 7 of its four bits."""
    return ((nibble ^ 0x08).to(tl.int32) - 8).to(tl.float32)


def summarize(
    planes: tuple[Tensor, ...], summary: Tensor, key: Tensor, key_bias: Tensor, positions: Tensor,
    table: Tensor | None, group: int,
) -> None:  # fmt: skip
    """``lamp::summarize`` of one new row: k_high, k_residual and k_scale in ``planes``, ``summary``
    ``[B, G, N / group, R]`` written in place."""
    k_high = planes[0]
    kv_heads, tile, half = k_high.shape[1], k_high.shape[3], k_high.shape[4]
    batch, pages = (k_high.shape[0], k_high.shape[2]) if table is None else tuple(table.shape)
    rank, key, key_bias = key.shape[2], key.contiguous(), key_bias.contiguous()
    padded = max(2, power_of_two(rank))
    summarize_row[(batch * kv_heads,)](
        *planes[:3], summary, key, key_bias, positions, table, sequence_step(positions),
        0 if table is None else table.stride(0), pages, kv_heads, k_high.shape[2] * tile,
        HALF=half, HP=padded_half(half), TILE=tile, SPAN=group, RANK=rank, RP=padded, STEP=min(padded, 16),
        PAGED=table is not None, num_warps=2,
    )  # fmt: skip
