"""What ``lamp::summarize`` and ``lamp::predict`` compute, from tensors that they check. Shapes as in
``network/ops.py``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lamp_compile.errors import InputError
from lamp_compile.runtime import checks, formats, kernels, layout, ops, reference
from lamp_compile.runtime.arguments import Visibility
from lamp_compile.runtime.network import audit, gate


def summarize(
    k_high: Tensor,
    k_residual: Tensor,
    k_scale: Tensor,
    summary: Tensor,
    key: Tensor,
    key_bias: Tensor,
    positions: Tensor,
    block_table: Tensor | None,
    *,
    rows: int,
    group: int,
    k_format: str,
    site: str,
) -> None:
    """``lamp::summarize``."""
    batch, _ = checks.held(site, block_table, k_high)
    checks.per_sequence(site, batch, positions=positions)
    checks.one_device(site, k_high, summary=summary, key=key, positions=positions)
    keys = (k_high, k_residual, k_scale)
    if kernels.why_not_summarize(keys, summary, rows, group, k_format) is None:
        _check_summaries(site, keys, summary, (key, key_bias), group)
        return kernels.summarize(keys, summary, (key, key_bias), positions, block_table, group)
    first = positions.reshape(-1, 1).expand(batch, 1).long()
    count = (rows + group - 2) // group + 1
    index = torch.div(first, group, rounding_mode="floor") + torch.arange(count, device=first.device)
    end = (first + rows)[..., None]
    at = index[..., None] * group + torch.arange(group, device=first.device)
    present = (at < end) & (first >= 0)[..., None]
    wanted = (index * group < end[..., 0]) & (first >= 0)
    tile = layout.tile_of(k_high)
    page = torch.where(wanted, index * group // tile, 0)
    sequence = torch.arange(batch, device=first.device)[:, None].expand_as(index)
    if block_table is not None:
        wanted = wanted & (page < block_table.shape[1])
        page = block_table.long().gather(1, page.clamp(max=block_table.shape[1] - 1))
        wanted, sequence, page = wanted & (page >= 0), torch.zeros_like(sequence), page.clamp(min=0)
    place = page * (tile // group) + index.clamp(min=0) % (tile // group)
    if rows == 1 and block_table is None:  # one group of each sequence, without asking the device which
        s, p, here, kept = sequence[:, 0], place[:, 0], present[:, 0], wanted
    else:
        s, p, here, kept = sequence[wanted], place[wanted], present[wanted], wanted[wanted][:, None]
    cells = p[:, None] * group + torch.arange(group, device=first.device)
    found = formats.get(k_format).dequantize(
        layout.key_rows(k_high)[s[:, None], :, cells],
        layout.key_rows(k_residual)[s[:, None], :, cells],
        k_scale[s[:, None], :, cells],
    )  # [n, group, G, D]
    pooled = gate.pool(found.float().transpose(1, 2), here[:, None].expand(-1, k_high.shape[1], -1))
    made = gate.summarise(pooled.transpose(0, 1)[None], key, key_bias)[0].transpose(0, 1).to(summary.dtype)
    summary[s, :, p] = torch.where(kept[..., None], made, summary[s, :, p])
    return None


def predict(
    q: Tensor,
    summary: Tensor,
    history: Tensor,
    query: Tensor,
    query_bias: Tensor,
    age: Tensor,
    extra: Tensor,
    seen: Tensor | None,
    balance: Tensor | None,
    mask: Tensor | None,
    bias: Tensor | None,
    sinks: Tensor | None,
    start: Tensor | None,
    lengths: Tensor | None,
    block_table: Tensor | None,
    *,
    causal: str,
    window: int,
    scale: float | None,
    softcap: float,
    keys: int,
    rotation: str,
    query_bits: int,
    subtile: int,
    room: int,
    pages: int,
    site: str,
) -> Tensor:
    """``lamp::predict``."""
    batch, heads, queries, _ = q.shape
    kv_heads = history.shape[1]
    if block_table is not None:
        per_page = summary.shape[2] // pages
        paged = summary.reshape(*summary.shape[:2], pages, per_page, summary.shape[3])
        summary = layout.gather_pages(paged, block_table).flatten(2, 3)
    check(site, q, summary, history, query, (seen, room // subtile))
    checks.visibility(site, q, mask, bias, (int(keys), room), causal, window)
    visible = ops._visible(keys, mask, bias, sinks, start, lengths, causal, window)
    scores = ops._scores(q, scale, softcap, rotation, query_bits)
    projected = gate.project(reference.prepare_query(q, balance, scores).float(), query, query_bias)
    known = history[:, :, None] if seen is None else gate.histories(seen, history)[0]
    parts = []
    per_row = batch * heads * summary.shape[2]
    for rows in reference._query_blocks(queries, per_row):
        live = _live_groups(visible, rows, queries, room // summary.shape[2], q, room)
        tiles = _spans(live, subtile * summary.shape[2] // room)
        said = gate.content(projected[:, :, rows], summary, live, room // subtile, scores.scale)
        log, _ = gate.predict(said, known[:, :, rows], tiles, age, extra, sinks)
        shared = log.exp().reshape(batch, kv_heads, -1, *log.shape[2:]).amax(2)
        tiles = tiles.expand(batch, heads, -1, -1)
        alive = tiles.reshape(batch, kv_heads, -1, *tiles.shape[2:]).any(2)
        parts.append(gate.hot_newest(shared, alive).masked_fill(~alive, reference.DEAD))
    return torch.cat(parts, dim=2).float()


def _live_groups(visible: Visibility, rows: slice, queries: int, group: int, q: Tensor, room: int) -> Tensor:
    """Whether a group has a live key for a query, boolean, broadcastable to ``[B, H, rows, room / group]``."""
    live = visible.live(rows, queries, room, q.device)
    live = live.reshape((1,) * (4 - live.dim()) + tuple(live.shape))
    return _spans(live, group).expand(-1, -1, q[:, :, rows].shape[2], -1)


def _spans(live: Tensor, size: int) -> Tensor:
    """Whether any of ``size`` successive entries of the last dimension holds."""
    return live.reshape(*live.shape[:-1], -1, size).any(-1)


def check(
    site: str, q: Tensor, summary: Tensor, history: Tensor, query: Tensor, size: tuple[Tensor | None, int]
) -> None:
    """Raise InputError unless the gate's tensors belong to these queries."""
    seen, tiles = size
    checks.floating(site, q=q)
    checks.one_device(site, q, summary=summary, history=history, query=query, seen=seen)
    fits = (
        tuple(query.shape[:2]) == (q.shape[1], q.shape[3])
        and tuple(history.shape) == (q.shape[0], summary.shape[1], tiles, 2)
        and summary.shape[3] == query.shape[2]
        and summary.shape[2] % tiles == 0
    )
    if not fits:
        raise InputError(
            f"queries {tuple(q.shape)}, summaries {tuple(summary.shape)}, history {tuple(history.shape)} and a gate "
            f"for {tuple(query.shape)} do not belong together",
            where=f"{site}, look-ahead network",
            fix="a network trained for this model (`lamp-compile train-lookahead`)",
        )
    if seen is None and q.shape[2] > 1:
        raise InputError(
            f"{q.shape[2]} queries without what they saw", where=site, fix="seen=: the exact importance of these rows"
        )


def check_gate(
    site: str, q: Tensor, kv_heads: int, trust: Tensor, weights: tuple[Tensor, ...]
) -> None:  # fmt: skip
    """Raise InputError unless the audit's state and the gate's weights have the shapes they must have, before anything
    is written."""
    wanted = {"trust": (q.shape[0], kv_heads, audit.FIELDS), **_weights(q, kv_heads, weights[0].shape[-1])}
    _same_shapes(site, q, dict(zip(wanted, (trust, *weights), strict=True)), wanted)


def _weights(q: Tensor, kv_heads: int, rank: int) -> dict[str, tuple[int, ...]]:
    """Shapes of the gate's weights."""
    heads, dim = q.shape[1], q.shape[3]
    return {
        "query": (heads, dim, rank), "query_bias": (heads, rank), "age": (heads, gate.AGES), "extra": (heads, 4),
        "limit": (kv_heads,), "margin": (kv_heads,),
    }  # fmt: skip


def check_kernel(
    q: Tensor, planes: tuple[Tensor, ...], table: Tensor | None, kept: tuple[Tensor, ...],
    weights: tuple[Tensor, ...], options: Mapping[str, Any],
) -> None:  # fmt: skip
    """Raise InputError unless all that a kernel takes as addresses has the shape it must have. The arguments as of
    ``kernels.attend_predicted``; the planes are known to be right."""
    batch = q.shape[0]
    (stored, kv_heads, pages), tile = planes[0].shape[:3], layout.tile_of(planes[0])
    rank, room = weights[0].shape[-1], (pages if table is None else table.shape[1]) * tile
    group = tile * options["pages"] // kept[0].shape[2]
    wanted = {
        "summary": (stored, kv_heads, pages * tile // group, rank),
        "history": (batch, kv_heads, room // options["subtile"], 2), "trust": (batch, kv_heads, audit.FIELDS),
        **_weights(q, kv_heads, rank),
    }  # fmt: skip
    given = dict(zip(wanted, (*kept, *weights), strict=True))
    _same_shapes(options["site"], q, given, wanted)
    if (options["room"], options["pages"]) != (room, pages):
        raise InputError(
            f"room for {options['room']} keys in {options['pages']} tiles, the planes have {room} in {pages}",
            where=f"{options['site']}, look-ahead network",
            fix="the room of the planes",
        )


def _check_summaries(
    site: str, keys: tuple[Tensor, ...], summary: Tensor, weights: tuple[Tensor, Tensor], group: int
) -> None:
    (stored, kv_heads, pages), rank = keys[0].shape[:3], summary.shape[-1]
    tile, half = layout.tile_of(keys[0]), layout.key_width(keys[0])
    given = dict(
        zip(("k_high", "k_residual", "k_scale", "summary", "key", "key_bias"), (*keys, summary, *weights), strict=True)
    )
    lanes = layout.by_lanes(keys[0])  # such as can have one size of tiles alone, whatever these have
    plane = (stored, kv_heads, pages, *layout.key_shape(layout.LANES_TILE if lanes else tile, half, lanes))
    wanted = {
        "k_high": plane, "k_residual": plane, "k_scale": (stored, kv_heads, pages * tile),
        "summary": (stored, kv_heads, pages * tile // group, rank), "key": (kv_heads, 2 * half, rank),
        "key_bias": (kv_heads, rank),
    }  # fmt: skip
    _same_shapes(site, keys[0], given, wanted)


def _same_shapes(site: str, like: Tensor, given: Mapping[str, Tensor], wanted: Mapping[str, tuple[int, ...]]) -> None:
    checks.one_device(site, like, **given)
    if [x.shape for x in given.values()] == list(wanted.values()):
        return
    for name, shape in wanted.items():
        if tuple(given[name].shape) != shape:
            raise InputError(
                f"{name} is {tuple(given[name].shape)}, not {shape}",
                where=f"{site}, look-ahead network",
                fix="a network trained for this model (`lamp-compile train-lookahead`)",
            )
