"""The definition of correctness: the operators in plain torch, readable, float64-able. Kernels are tested against this.

Arithmetic runs in float32, or in float64 when the query is float64. Long prefills are cut into blocks of queries so
that no more than ``BLOCK_ELEMENTS`` scores exist at a time; the result does not depend on the block.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lamp_compile.ir import Floor, Precision
from lamp_compile.runtime import certificate, formats, guard, layout, lookahead, rotation
from lamp_compile.runtime.arguments import Planes, Scores, Visibility

BLOCK_ELEMENTS = 1 << 25
DEAD = -1.0
"""Importance of a sub-tile without a live key."""


def quantize(
    k: Tensor, v: Tensor, balance: Tensor | None, k_format: str, v_format: str, rotation_kind: str, tile: int
) -> Planes:
    """Keys ``[B, G, N, D]`` and values ``[B, G, N, Dv]`` -> planes; ``tile = 0`` leaves rows for appending.

    ``balance`` ``[G, D]`` or ``[B, G, D]`` divides the keys (the query is multiplied by it): exact, and it takes
    outlier key channels away before the rotation would spread their rounding error over channels that the query does
    read.
    """
    dtype = _compute_dtype(k)
    key = k.to(dtype)
    if balance is not None:
        key = key / _per_channel(balance, dtype)
    k_rows = formats.get(k_format).quantize(rotation.rotate(key, rotation_kind))
    v_rows = formats.get(v_format).quantize(rotation.rotate(v.to(dtype), rotation_kind))
    if tile == 0:
        return Planes(*map(_packed, (*k_rows, *v_rows)))
    (kh, kr, ks), (vh, vr, vs) = k_rows, v_rows
    keys = (layout.key_tiles(kh, tile), layout.key_tiles(kr, tile), layout.scale_tiles(ks, tile))
    values = (layout.value_tiles(vh, tile), layout.value_tiles(vr, tile), layout.scale_tiles(vs, tile))
    return Planes(*map(_packed, (*keys, *values)))


def prepare_query(q: Tensor, balance: Tensor | None, scores: Scores) -> Tensor:
    """Query ``[B, H, S, D]`` -> balanced, rotated, rounded as the integer kernels do, in compute precision."""
    dtype = _compute_dtype(q)
    x = q.to(dtype)
    if balance is not None:
        x = x * _per_query_head(_per_channel(balance, dtype), q.shape[1])
    x = rotation.rotate(x, scores.rotation)
    if scores.query_bits == 16:
        return x.bfloat16().to(dtype)
    if scores.query_bits == 8:
        step = x.abs().amax(-1, keepdim=True) / 127
        return torch.where(step == 0, 0.0, (x / step).round()) * step
    return x


def look_ahead(
    q: Tensor,
    k_high: Tensor,
    k_scale: Tensor,
    balance: Tensor | None,
    visible: Visibility,
    scores: Scores,
    k_format: str,
    rule: str,
    subtile: int,
) -> Tensor:
    """Importance ``[B, G, S, T]`` of each sub-tile, from the high plane alone; ``DEAD`` where no key is live.

    The queries of a kv head's group share its tiles, so a sub-tile is as important as the most interested of them
    finds it.
    """
    batch, heads, queries, _ = q.shape
    kv_heads, capacity = k_high.shape[1], k_high.shape[2] * layout.tile_of(k_high)
    prepared = prepare_query(q, balance, scores)
    importance_of = lookahead.get(rule).importance
    parts = []
    for rows in _query_blocks(queries, batch * heads * capacity):
        query = prepared[:, :, rows]
        products = [
            _product(query, _dequantize_keys(k_high[:, :, t], None, k_scale[:, :, j], k_format, query.dtype), scores)
            for t, j in _key_blocks(k_high.shape[2], layout.tile_of(k_high), query.shape[2])
        ]
        y = torch.cat(products, dim=-1)
        live = visible.live(rows, queries, capacity, q.device).expand(y.shape)
        z, _ = _softmax(y, live, visible, rows)
        tiled = [t.reshape(*t.shape[:-1], -1, subtile) for t in (z, y, live)]
        importance = importance_of(*tiled).masked_fill(~tiled[2].any(-1), DEAD)
        parts.append(importance.reshape(batch, kv_heads, -1, *importance.shape[2:]).amax(2))
    return torch.cat(parts, dim=2).float()


def select(
    importance: Tensor, tau: Tensor, floor: Tensor, state: Tensor | None, skip_below: Tensor | None, exact: bool
) -> Tensor:
    """Precision ``[B, G, S, T]`` (uint8, ``ir.Precision``) of each sub-tile.

    ``tau`` and ``floor`` are ``[G]`` or ``[B, G]``; the guard's ``state`` can raise the floor. NaN importance is
    refined: what cannot be judged is not trusted. ``skip_below`` is an opt-in: sub-tiles at or below it are not read
        at all.
    """
    level = _per_slot(floor, importance).to(torch.float32)
    if state is not None:
        level = torch.maximum(level, state[..., guard.FLOOR][..., None, None])
    refine = ~(importance <= _per_slot(tau, importance)) | (level >= Floor.BOTH)
    precision = torch.where(refine, int(Precision.BOTH), int(Precision.HIGH))
    if skip_below is not None:
        keep = ~(importance <= _per_slot(skip_below, importance)) | (level >= Floor.BOTH)
        precision = torch.where(keep, precision, int(Precision.SKIP))
    if exact:
        precision = torch.where(level >= Floor.EXACT, int(Precision.EXACT), precision)
    return torch.where(importance == DEAD, int(Precision.SKIP), precision).to(torch.uint8)


def attend(
    q: Tensor,
    planes: Planes,
    levels: Tensor,
    exact: tuple[Tensor, Tensor] | None,
    balance: Tensor | None,
    visible: Visibility,
    scores: Scores,
    k_format: str,
    v_format: str,
    subtile: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention at the chosen precisions.

    Returns:
        Output ``[B, H, S, Dv]`` in q's dtype, natural log-sum-exp ``[B, H, S]`` float32 (sinks included), certificate
        ``[B, H, S, 3]`` float32 (see ``runtime/certificate.py``).
    """
    batch, heads, queries, _ = q.shape
    kv_heads, capacity = levels.shape[1], planes.k_high.shape[2] * planes.tile
    prepared = prepare_query(q, balance, scores)
    stored = _Stored(planes, exact, scores, k_format, v_format)
    noise = certificate.row_noise(planes, q.shape[-1], stored.value_dim, k_format, v_format)
    parts = []
    for rows in _query_blocks(queries, 2 * batch * heads * capacity):
        level = _expand_levels(levels[:, :, rows], heads // kv_heads, subtile)
        y = stored.scores_of(prepared[:, :, rows], q[:, :, rows], level)
        live = visible.live(rows, queries, capacity, q.device) & (level > Precision.SKIP)
        p, lse = _softmax(y, live, visible, rows)
        sums = certificate.sums(p, level, noise, prepared[:, :, rows], scores)
        parts.append((stored.output_of(p, level), lse, sums))
    out, lse, sums = (torch.cat(tensors, dim=2) for tensors in zip(*parts, strict=True))
    return out.to(q.dtype), lse.float(), sums.float()


def final_importance(
    q: Tensor,
    keys: tuple[Tensor, Tensor, Tensor],
    levels: Tensor,
    balance: Tensor | None,
    visible: Visibility,
    scores: Scores,
    k_format: str,
    subtile: int,
) -> Tensor:
    """Importance ``[B, G, S, T]`` by the energy rule, from the weights that ``attend`` ends up with at these levels:
    what is refined weighs as both planes say, the rest as the high plane does. 0 for what is not read, or not live.

    ``keys`` are the planes ``k_high``, ``k_residual`` and ``k_scale``.
    """
    batch, heads, queries, _ = q.shape
    kv_heads, capacity = levels.shape[1], keys[0].shape[2] * layout.tile_of(keys[0])
    prepared = prepare_query(q, balance, scores)
    stored = _Stored(Planes(*keys, *keys), None, scores, k_format, k_format)  # its values are not asked for
    parts = []
    for rows in _query_blocks(queries, 2 * batch * heads * capacity):
        level = _expand_levels(levels[:, :, rows], heads // kv_heads, subtile)
        y = stored.scores_of(prepared[:, :, rows], q[:, :, rows], level)
        live = visible.live(rows, queries, capacity, q.device) & (level > Precision.SKIP)
        p, _ = _softmax(y, live, visible, rows)
        energy = p.reshape(*p.shape[:-1], -1, subtile).square().sum(-1)
        parts.append(energy.sqrt().reshape(batch, kv_heads, -1, *energy.shape[2:]).amax(2))
    return torch.cat(parts, dim=2).float()


def exact_attention(
    q: Tensor, k: Tensor, v: Tensor, visible: Visibility, scale: float, softcap: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Attention without any rounding, in float64: output ``[B, H, S, Dv]`` and log-sum-exp ``[B, H, S]``. The
    oracle."""
    scores = Scores(scale, softcap, query_bits=0)
    rows = slice(0, q.shape[2])
    y = _product(q.double(), k.double(), scores)
    live = visible.live(rows, q.shape[2], k.shape[2], q.device).expand(y.shape)
    p, lse = _softmax(y, live, visible, rows)
    return _weighted(p, v.double()), lse


@dataclass(frozen=True)
class _Stored:
    """Stored keys and values, turned into floats a block of storage tiles at a time (see ``_key_blocks``)."""

    planes: Planes
    exact: tuple[Tensor, Tensor] | None
    scores: Scores
    k_format: str
    v_format: str

    @property
    def value_dim(self) -> int:
        return formats.get(self.v_format).channels(int(layout.value_width(self.planes.v_high)))

    def scores_of(self, prepared: Tensor, query: Tensor, level: Tensor) -> Tensor:
        """Scores ``[B, H, S, N]``, each at the precision ``level`` says."""
        planes, parts = self.planes, []
        for t, j in _key_blocks(planes.tiles, planes.tile, prepared.shape[2]):
            high, residual, scale = planes.k_high[:, :, t], planes.k_residual[:, :, t], planes.k_scale[:, :, j]
            y = _product(prepared, _dequantize_keys(high, residual, scale, self.k_format, prepared.dtype), self.scores)
            if formats.get(self.k_format).residual_bits:
                cold = _dequantize_keys(high, None, scale, self.k_format, prepared.dtype)
                y = torch.where(level[..., j] >= Precision.BOTH, y, _product(prepared, cold, self.scores))
            if self.exact is not None:
                exact = _product(query.to(y.dtype), _rows(self.exact[0], j, y.dtype), self.scores)
                y = torch.where(level[..., j] == Precision.EXACT, exact, y)
            parts.append(y)
        return torch.cat(parts, dim=-1)

    def output_of(self, p: Tensor, level: Tensor) -> Tensor:
        """Weighted values ``[B, H, S, Dv]``, each at the precision ``level`` says."""
        planes = self.planes
        rotated = exact = torch.zeros((), dtype=p.dtype, device=p.device)
        for t, j in _key_blocks(planes.tiles, planes.tile, p.shape[2]):
            high, residual, scale = planes.v_high[:, :, t], planes.v_residual[:, :, t], planes.v_scale[:, :, j]
            weight, chosen = p[..., j], level[..., j]
            cold = chosen < Precision.BOTH
            if formats.get(self.v_format).residual_bits:
                values = _dequantize_values(high, None, scale, self.v_format, p.dtype)
                rotated = rotated + _weighted(weight * cold, values)
                weight = weight * ~cold
            values = _dequantize_values(high, residual, scale, self.v_format, p.dtype)
            rotated = rotated + _weighted(weight * (chosen != Precision.EXACT), values)
            if self.exact is not None:
                taken = p[..., j] * (chosen == Precision.EXACT)
                exact = exact + _weighted(taken, _rows(self.exact[1], j, p.dtype))
        out = rotation.unrotate(rotated, self.scores.rotation)
        return out + exact if self.exact is not None else out


def _packed(x: Tensor) -> Tensor:
    """Contiguous; ``contiguous()`` leaves the odd strides of an empty tensor, and compilers compare strides."""
    return x.contiguous() if x.numel() else x.new_empty(x.shape)


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _per_channel(balance: Tensor, dtype: torch.dtype) -> Tensor:
    """``[G, D]`` or ``[B, G, D]`` -> ``[B or 1, G, 1, D]``."""
    return balance.to(dtype).reshape(-1, *balance.shape[-2:])[:, :, None, :]


def _per_query_head(x: Tensor, heads: int) -> Tensor:
    return x.repeat_interleave(heads // x.shape[1], dim=1)


def _per_slot(x: Tensor, importance: Tensor) -> Tensor:
    """``[G]`` or ``[B, G]`` -> broadcastable to ``[B, G, S, T]``."""
    return x.reshape(-1, x.shape[-1])[:, :, None, None].to(importance.device)


def _query_blocks(queries: int, elements_per_row: int) -> Iterator[slice]:
    step = max(1, BLOCK_ELEMENTS // max(1, elements_per_row))
    for first in range(0, max(1, queries), step):
        yield slice(first, min(queries, first + step))


def _key_blocks(tiles: int, tile: int, queries: int) -> Iterator[tuple[slice, slice]]:
    """(storage tiles, keys) of successive blocks. A block is a quarter of the context (or as many keys as there are
    queries, if that is more): a decode step never holds keys or values as floats for the whole context."""
    step = max(1, tiles // 4, queries // tile)
    for first in range(0, tiles, step):
        last = min(tiles, first + step)
        yield slice(first, last), slice(first * tile, last * tile)


def _dequantize_keys(high: Tensor, residual: Tensor | None, scale: Tensor, name: str, dtype: torch.dtype) -> Tensor:
    residual = None if residual is None else layout.key_rows(residual)
    return formats.get(name).dequantize(layout.key_rows(high), residual, scale).to(dtype)


def _dequantize_values(high: Tensor, residual: Tensor | None, scale: Tensor, name: str, dtype: torch.dtype) -> Tensor:
    residual = None if residual is None else layout.value_rows(residual)
    return formats.get(name).dequantize(layout.value_rows(high), residual, scale).to(dtype)


def _rows(x: Tensor, keys: slice, dtype: torch.dtype) -> Tensor:
    """Some rows of the original keys or values, zeros behind their end."""
    rows = x[:, :, keys].to(dtype)
    return torch.nn.functional.pad(rows, (0, 0, 0, keys.stop - keys.start - rows.shape[2]))


def _expand_levels(levels: Tensor, groups: int, subtile: int) -> Tensor:
    """``[B, G, S, T]`` -> ``[B, H, S, T * subtile]``."""
    return levels.repeat_interleave(subtile, dim=-1).repeat_interleave(groups, dim=1)


def _product(q: Tensor, k: Tensor, scores: Scores) -> Tensor:
    """Scaled, soft-capped q.k: ``[B, H, S, N]`` from ``[B, H, S, D]`` and ``[B, G, N, D]``, without repeating K."""
    batch, heads, queries, dim = q.shape
    grouped = q.reshape(batch, k.shape[1], -1, dim)
    y = (grouped @ k.transpose(-1, -2)).reshape(batch, heads, queries, -1) * scores.scale
    return torch.tanh(y / scores.softcap) * scores.softcap if scores.softcap else y


def _weighted(p: Tensor, v: Tensor) -> Tensor:
    """p V: ``[B, H, S, Dv]``, without repeating V. A weight of 0 takes nothing from V, not even NaN: rows that were
    cropped away or belong to nobody may hold anything."""
    batch, heads, queries, keys = p.shape
    grouped = p.reshape(batch, v.shape[1], -1, keys)
    poisoned = ~v.isfinite().all(-1)
    out = grouped @ v.masked_fill(poisoned[..., None], 0.0)
    spoilt = ((grouped > 0) & poisoned[:, :, None, :]).any(-1, keepdim=True)
    return out.masked_fill(spoilt, torch.nan).reshape(batch, heads, queries, -1)


def _softmax(y: Tensor, live: Tensor, visible: Visibility, rows: slice) -> tuple[Tensor, Tensor]:
    """Weights and log-sum-exp over live keys and the sinks. A row with no live key has weights 0 and log-sum-exp
    -inf."""
    added = visible.added(rows, y.shape[-1])
    total = y if added is None else y + added.to(y.dtype)
    total = total.masked_fill(~live, -torch.inf)
    lse = torch.logsumexp(total, dim=-1)
    if visible.sinks is not None:
        sink = visible.sinks.to(y.dtype).reshape(1, -1, 1)
        lse = torch.where(lse == -torch.inf, lse, torch.logaddexp(lse, sink))
    weights = (total - lse[..., None]).exp()
    return weights.masked_fill((lse == -torch.inf)[..., None], 0.0), lse
