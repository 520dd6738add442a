"""The FP8 rival: attention of one new token over keys and values in e4m3 with one scale per sequence and kv head.

Split over keys with a merge. Keys lie ``[B, G, N, D]``, values in tiles ``[B, G, N / TILE, D, TILE]``, so that both
products read their reduction contiguously. Three ways to multiply, of which a benchmark takes the fastest:

- ``rows``: e4m3 becomes fp16 in registers (exact), the query stays fp16 and is the left operand;
- ``columns``: the same with keys and values as the left operand, the large side on Hopper's tensor cores;
- ``fp8``: as ``columns``, with query and weights rounded to e4m3 as well, so that tensor cores read e4m3 as it lies.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 128
"""Keys per tile of the values."""
LARGEST = 448.0
LOG2E = 1.4426950408889634
ROWS = 16
"""Rows of a product: the query heads of a group, padded."""


@dataclass(frozen=True)
class Config:
    """One way to run the kernel."""

    way: str = "rows"
    block: int = 128
    warps: int = 4
    stages: int = 3
    waves: int = 8
    """Programs per multiprocessor that the keys are split for; needs no compilation of its own."""

    def __str__(self) -> str:
        return f"{self.way} block {self.block} warps {self.warps} stages {self.stages} waves {self.waves}"


CONFIGS = (
    Config("rows", 128, 4, 3),
    Config("rows", 128, 4, 4),
    Config("rows", 64, 4, 4),
    Config("rows", 64, 2, 4),
    Config("rows", 128, 8, 3),
    Config("columns", 128, 4, 3),
    Config("columns", 64, 4, 4),
    Config("fp8", 128, 4, 3),
    Config("fp8", 128, 4, 4),
    Config("fp8", 64, 4, 4),
    Config("fp8", 128, 8, 3),
)
WAVES = (1, 2, 4, 16, 32)


@triton.jit
def _block(k, v, length, pos, start, DIM: tl.constexpr, BLOCK: tl.constexpr, T: tl.constexpr, EVEN: tl.constexpr):
    """Keys ``[BLOCK, DIM]``, values transposed ``[DIM, BLOCK]``, and which keys are live."""
    token, channel = tl.arange(0, BLOCK), tl.arange(0, DIM)
    live = pos + token < length
    k_at = k + (start + pos + token).to(tl.int64)[:, None] * DIM + channel[None, :]
    row = tl.multiple_of((start + pos).to(tl.int64) // T * T * DIM + pos % T, BLOCK)
    v_at = v + row + channel[:, None] * T + token[None, :]
    if EVEN:
        return tl.load(k_at), tl.load(v_at), live
    return tl.load(k_at, mask=live[:, None], other=0.0), tl.load(v_at, mask=live[None, :], other=0.0), live


@triton.jit
def _split_rows(
    q_in, k, v, k_scale, v_scale, lengths, out, lse, keys, share, scale,
    GROUP: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, T: tl.constexpr, ROW: tl.constexpr,
    G: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Query rows on the left: scores ``[ROW, BLOCK]``."""
    head, split = tl.program_id(0), tl.program_id(1)
    row, channel = tl.arange(0, ROW), tl.arange(0, DIM)
    length = tl.load(lengths + head // G).to(tl.int32)
    at = q_in + (head * GROUP + row)[:, None] * DIM + channel[None, :]
    left = tl.load(at, mask=row[:, None] < GROUP, other=0.0).to(tl.float16)
    factor = tl.load(k_scale + head) * scale
    top = tl.full((ROW,), -1e30, tl.float32)
    total = tl.zeros((ROW,), tl.float32)
    acc = tl.zeros((ROW, DIM), tl.float32)
    start = head.to(tl.int64) * keys
    first = split * share
    for pos in range(first, tl.minimum(first + share, length), BLOCK):
        kb, vb, live = _block(k, v, length, pos, start, DIM, BLOCK, T, EVEN)
        s = tl.dot(left, tl.trans(kb.to(tl.float16))) * factor
        if not EVEN:
            s = tl.where(live[None, :], s, -1e30)
        new = tl.maximum(top, tl.max(s, 1))
        alpha, p = tl.exp2(top - new), tl.exp2(s - new[:, None])
        total = total * alpha + tl.sum(p, 1)
        acc = tl.dot(p.to(tl.float16), tl.trans(vb.to(tl.float16)), acc * alpha[:, None])
        top = new
    size = tl.load(v_scale + head) / tl.maximum(total, 1e-30)
    place = (head * tl.num_programs(1) + split) * GROUP + row
    kept = row < GROUP
    tl.store(out + place[:, None] * DIM + channel[None, :], acc * size[:, None], mask=kept[:, None])
    tl.store(lse + place, tl.where(total > 0, top + tl.log2(total), -1e30), mask=kept)


@triton.jit
def _split_columns(
    q_in, k, v, k_scale, v_scale, lengths, out, lse, keys, share, scale,
    GROUP: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, T: tl.constexpr, ROW: tl.constexpr,
    G: tl.constexpr, NATIVE: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Keys on the left: scores ``[BLOCK, ROW]``; NATIVE multiplies in e4m3."""
    head, split = tl.program_id(0), tl.program_id(1)
    row, channel = tl.arange(0, ROW), tl.arange(0, DIM)
    length = tl.load(lengths + head // G).to(tl.int32)
    at = q_in + (head * GROUP + row)[None, :] * DIM + channel[:, None]
    q = tl.load(at, mask=row[None, :] < GROUP, other=0.0).to(tl.float32)
    factor = tl.zeros((ROW,), tl.float32) + tl.load(k_scale + head) * scale
    size = tl.load(v_scale + head)
    if NATIVE:
        peak = tl.maximum(tl.max(tl.abs(q), 0), 1e-20)
        right = (q * (448.0 / peak)[None, :]).to(tl.float8e4nv)
        factor = factor * peak / 448.0
        size = size / 448.0
    else:
        right = q.to(tl.float16)
    top = tl.full((ROW,), -1e30, tl.float32)
    total = tl.zeros((ROW,), tl.float32)
    acc = tl.zeros((DIM, ROW), tl.float32)
    start = head.to(tl.int64) * keys
    first = split * share
    for pos in range(first, tl.minimum(first + share, length), BLOCK):
        kb, vb, live = _block(k, v, length, pos, start, DIM, BLOCK, T, EVEN)
        if not NATIVE:
            kb, vb = kb.to(tl.float16), vb.to(tl.float16)
        s = tl.dot(kb, right) * factor[None, :]
        if not EVEN:
            s = tl.where(live[:, None], s, -1e30)
        new = tl.maximum(top, tl.max(s, 0))
        alpha, p = tl.exp2(top - new), tl.exp2(s - new[None, :])
        total = total * alpha + tl.sum(p, 0)
        if NATIVE:
            weights = (p * 448.0).to(tl.float8e4nv)
        else:
            weights = p.to(tl.float16)
        acc = tl.dot(vb, weights, acc * alpha[None, :])
        top = new
    size = size / tl.maximum(total, 1e-30)
    place = (head * tl.num_programs(1) + split) * GROUP + row
    kept = row < GROUP
    tl.store(out + place[None, :] * DIM + channel[:, None], acc * size[None, :], mask=kept[None, :])
    tl.store(lse + place, tl.where(total > 0, top + tl.log2(total), -1e30), mask=kept)


@triton.jit
def _merge(parts, lse, out, splits, GROUP: tl.constexpr, DIM: tl.constexpr, CHUNK: tl.constexpr):
    """Weight the splits of one query head by their log-sum-exp."""
    head, row = tl.program_id(0), tl.program_id(1)
    index, channel = tl.arange(0, CHUNK), tl.arange(0, DIM)
    top = tl.full((), -1e30, tl.float32)
    total = tl.zeros((), tl.float32)
    acc = tl.zeros((DIM,), tl.float32)
    for first in range(0, splits, CHUNK):
        kept = first + index < splits
        place = (head * splits + first + index) * GROUP + row
        z = tl.load(lse + place, mask=kept, other=-1e30)
        new = tl.maximum(top, tl.max(z, 0))
        w = tl.where(kept & (z > -1e29), tl.exp2(z - new), 0.0)
        alpha = tl.exp2(top - new)
        part = tl.load(parts + place[:, None] * DIM + channel[None, :], mask=kept[:, None], other=0.0)
        acc = acc * alpha + tl.sum(part * w[:, None], 0)
        total = total * alpha + tl.sum(w, 0)
        top = new
    value = acc / tl.maximum(total, 1e-30)
    tl.store(out + (head * GROUP + row) * DIM + channel, value.to(out.dtype.element_ty))


@dataclass(frozen=True)
class Stored:
    """Keys and values in e4m3."""

    k: Tensor
    v: Tensor
    k_scale: Tensor
    v_scale: Tensor

    @staticmethod
    def empty(batch: int, kv_heads: int, keys: int, dim: int, device: Any) -> Stored:
        """Room for ``keys`` keys, a whole number of tiles."""
        tiles = -(-keys // TILE)
        kind: dict[str, Any] = dict(dtype=torch.float8_e4m3fn, device=device)
        k = torch.zeros(batch, kv_heads, tiles * TILE, dim, dtype=torch.uint8, device=device).view(kind["dtype"])
        v = torch.zeros(batch, kv_heads, tiles, dim, TILE, dtype=torch.uint8, device=device).view(kind["dtype"])
        scales = torch.ones(2, batch, kv_heads, device=device)
        return Stored(k, v, scales[0], scales[1])

    def fill(self, sequence: int, k: Tensor, v: Tensor) -> None:
        """Store keys and values ``[G, N, D]`` of one sequence."""
        keys = k.shape[1]
        for x, scale in ((k, self.k_scale), (v, self.v_scale)):
            scale[sequence] = (x.abs().amax((1, 2)).float() / LARGEST).clamp_min(1e-20)
        k8 = (k.float() / self.k_scale[sequence][:, None, None]).to(torch.float8_e4m3fn)
        self.k[sequence].view(torch.uint8)[:, :keys] = k8.view(torch.uint8)
        v8 = (v.float() / self.v_scale[sequence][:, None, None]).to(torch.float8_e4m3fn).view(torch.uint8)
        v8 = torch.nn.functional.pad(v8, (0, 0, 0, -keys % TILE)).unflatten(1, (-1, TILE))
        self.v[sequence].view(torch.uint8)[:, : v8.shape[1]] = v8.transpose(-1, -2)

    def floats(self, sequence: int) -> tuple[Tensor, Tensor]:
        """Keys and values ``[G, N, D]`` of one sequence as float32."""
        k = self.k[sequence].float() * self.k_scale[sequence][:, None, None]
        v = self.v[sequence].float().transpose(-1, -2).flatten(1, 2)
        return k, v * self.v_scale[sequence][:, None, None]


class Decode:
    """The kernel with its buffers, for queries ``[B, H, 1, D]`` of one shape."""

    def __init__(self, q: Tensor, stored: Stored, lengths: Tensor, config: Config, *, even: bool, units: int = 132):
        self.batch, self.heads, _, self.dim = q.shape
        self.kv_heads, self.keys = stored.k.shape[1], stored.k.shape[2]
        self.config, self.lengths, self.even = config, lengths.to(torch.int64), even
        wanted = max(1, units * config.waves // (self.batch * self.kv_heads))
        blocks = -(-self.keys // config.block)
        self.share = -(-blocks // min(wanted, blocks)) * config.block
        self.splits = -(-self.keys // self.share)
        group = self.heads // self.kv_heads
        pairs = self.batch * self.kv_heads
        self.parts = torch.empty(pairs, self.splits, group, self.dim, device=q.device)
        self.lse = torch.empty(pairs, self.splits, group, device=q.device)
        self.out = torch.empty_like(q)

    def __call__(self, q: Tensor, stored: Stored) -> Tensor:
        group, c = self.heads // self.kv_heads, self.config
        kernel, chosen = (_split_rows, {}) if c.way == "rows" else (_split_columns, {"NATIVE": c.way == "fp8"})
        kernel[(self.batch * self.kv_heads, self.splits)](
            q, stored.k, stored.v, stored.k_scale, stored.v_scale, self.lengths, self.parts, self.lse,
            self.keys, self.share, LOG2E * self.dim**-0.5,
            GROUP=group, DIM=self.dim, BLOCK=c.block, T=TILE, ROW=ROWS, G=self.kv_heads,
            EVEN=self.even, **chosen, num_warps=c.warps, num_stages=c.stages,
        )  # fmt: skip
        _merge[(self.batch * self.kv_heads, group)](
            self.parts, self.lse, self.out, self.splits, GROUP=group, DIM=self.dim, CHUNK=32, num_warps=4
        )
        return self.out
