"""``lamp::summarize``, ``lamp::predict`` and ``lamp::arbitrate``, and the meeting point of sites that use a network.

Shape letters, planes and liveness as in ``runtime/ops.py``. ``summary`` is ``[B, G, N / group, R]`` float16; with
a block table, of the pool, ``[1, G, P_pool * tile / group, R]``. ``history`` is ``[B, G, T, 2]``, ``trust``
``[B, G, 7]``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lamp_compile.errors import InputError
from lamp_compile.runtime import checks, formats, layout, ops, reference
from lamp_compile.runtime.arguments import Visibility
from lamp_compile.runtime.attend_in_parts import SCORES
from lamp_compile.runtime.network import audit, gate

_GATE = "Tensor query, Tensor query_bias, Tensor age, Tensor extra"
SCHEMAS = {
    # Summaries of the groups that `rows` new keys, the first at `positions` [1] or [B], fell into; below 0 = none.
    "summarize": (
        "(Tensor k_high, Tensor k_residual, Tensor k_scale, Tensor(a!) summary, Tensor key, Tensor key_bias, "
        "Tensor positions, Tensor? block_table, *, int rows, int group, str k_format, str site) -> ()"
    ),
    # Importance [B, G, S, T] from queries, summaries and history. `seen`, the exact importance, only where there are
    # several rows: what the earlier of them saw is the history of the later. `room` is the keys there is room for,
    # `pages` the storage tiles of the summaries' tensor.
    "predict": (
        f"(Tensor q, Tensor summary, Tensor history, {_GATE}, Tensor? seen, Tensor? balance, {ops._LIVE}, *, "
        f"{ops._SHAPE}, str rotation, int query_bits, int subtile, int room, int pages, str site) -> Tensor"
    ),
    # Whom to believe: importance [B, G, S, T], the new history and trust, and the importance at which to skip [B, G].
    "arbitrate": (
        "(Tensor exact, Tensor predicted, Tensor history, Tensor trust, Tensor tau, Tensor state, Tensor limit, "
        "Tensor margin, Tensor? lengths, *, SymInt keys, int trained, float skip, int subtile, str site) "
        "-> (Tensor, Tensor, Tensor, Tensor)"
    ),
    # The meeting point: attention.cached of a site whose importance was predicted. The passes expand it.
    "attention.predicted": (
        f"(Tensor q, {ops._PLANES}, Tensor tau, Tensor floor, Tensor budget, Tensor state, Tensor stats, "
        f"Tensor? balance, {ops._LIVE}, Tensor predicted, Tensor history, Tensor trust, Tensor limit, Tensor margin, "
        f"*, {ops._SHAPE}, {ops._STORE}, str rule, int query_bits, int subtile, int guard_window, int guard_hold, "
        "float hysteresis, str site, int trained, float skip, str launch='') "
        "-> (Tensor, Tensor, Tensor, Tensor, Tensor)"
    ),
}


def _summarize(
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
    batch = k_high.shape[0] if block_table is None else block_table.shape[0]
    checks.per_sequence(site, batch, positions=positions)
    checks.one_device(site, k_high, summary=summary, key=key, positions=positions)
    first = positions.reshape(-1, 1).expand(batch, 1).long()
    count = (rows + group - 2) // group + 1
    index = torch.div(first, group, rounding_mode="floor") + torch.arange(count, device=first.device)
    end = (first + rows)[..., None]
    at = index[..., None] * group + torch.arange(group, device=first.device)
    present = (at < end) & (first >= 0)[..., None]
    wanted = (index * group < end[..., 0]) & (first >= 0)
    tile = k_high.shape[3]
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
    keys = formats.get(k_format).dequantize(
        layout.key_rows(k_high)[s[:, None], :, cells],
        layout.key_rows(k_residual)[s[:, None], :, cells],
        k_scale[s[:, None], :, cells],
    )  # [n, group, G, D]
    pooled = gate.pool(keys.float().transpose(1, 2), here[:, None].expand(-1, k_high.shape[1], -1))
    made = gate.summarise(pooled.transpose(0, 1)[None], key, key_bias)[0].transpose(0, 1).to(summary.dtype)
    summary[s, :, p] = torch.where(kept[..., None], made, summary[s, :, p])


def _predict(
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
    batch, heads, queries, _ = q.shape
    kv_heads = history.shape[1]
    if block_table is not None:
        per_page = summary.shape[2] // pages
        paged = summary.reshape(*summary.shape[:2], pages, per_page, summary.shape[3])
        summary = layout.gather_pages(paged, block_table).flatten(2, 3)
    _check(site, q, summary, history, query, (seen, room // subtile))
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


def _check(
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


def _arbitrate(
    exact: Tensor,
    predicted: Tensor,
    history: Tensor,
    trust: Tensor,
    tau: Tensor,
    state: Tensor,
    limit: Tensor,
    margin: Tensor,
    lengths: Tensor | None,
    *,
    keys: int,
    trained: int,
    skip: float,
    subtile: int,
    site: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    checks.heads_of_setting(site, "tau", tau, exact.shape[1])
    length = torch.full((1,), int(keys), device=exact.device)
    if lengths is not None:
        length = torch.minimum(lengths.reshape(-1), length)
    batch, kv_heads = exact.shape[:2]
    below = torch.full((batch, kv_heads), -1.0, device=exact.device)
    if skip > 0:
        below = audit.skip_threshold(skip, margin, length, subtile).expand(batch, kv_heads).contiguous()
    terms = audit.Terms(tau, state, limit, length, trained, subtile, below if skip > 0 else None, skip)
    importance, new_trust = audit.arbitrate(exact, predicted, trust, terms)
    return importance, gate.histories(exact, history)[1], new_trust, below


def exact_importance(
    q: Tensor, planes: tuple[Tensor, ...], seen: tuple[Tensor | None, ...], options: Mapping[str, Any]
) -> Tensor:
    """``lamp::look_ahead`` over planes; ``seen`` is balance, mask, bias, sinks, start, lengths, block table."""
    common = {name: options[name] for name in SCORES}
    found: Tensor = torch.ops.lamp.look_ahead(q, planes[0], planes[2], *seen, rule=options["rule"], **common)
    return found


def attend_arbitrated(
    q: Tensor, planes: tuple[Tensor, ...], hot: tuple[Tensor, ...], seen: tuple[Tensor | None, ...],
    importances: tuple[Tensor, Tensor], kept: tuple[Tensor, ...], options: Mapping[str, Any],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Attention by its operators once both importances are known.

    Args:
        q: ``[B, H, S, D]``.
        planes: Six of them.
        hot: tau, floor, budget, state, stats.
        seen: balance, mask, bias, sinks, start, lengths, block table.
        importances: The exact one and the predicted one ``[B, G, S, T]``.
        kept: history, trust, limit, margin.
        options: The keyword arguments of ``lamp::attention.predicted``.

    Returns:
        Output ``[B, H, S, Dv]``, the guard's new state and statistics, the new history and trust.
    """
    tau, floor, budget, state, stats = hot
    history, trust, limit, margin = kept
    site, skip = options["site"], options["skip"]
    importance, new_history, new_trust, below = torch.ops.lamp.arbitrate(
        *importances, history, trust, tau, state, limit, margin, seen[5], keys=options["keys"],
        trained=options["trained"], skip=skip, subtile=options["subtile"], site=site,
    )  # fmt: skip
    levels = torch.ops.lamp.select(importance, tau, floor, state, below if skip > 0 else None, exact=False, site=site)
    common = {name: options[name] for name in SCORES}
    out, lse, certificate = torch.ops.lamp.attend(
        q, *planes, levels, None, None, *seen, v_format=options["v_format"], **common
    )
    new_state, new_stats = torch.ops.lamp.guard(
        out, lse, certificate, levels, state, stats, floor, budget, window=options["guard_window"],
        hold=options["guard_hold"], hysteresis=options["hysteresis"], exact=False, site=site,
    )  # fmt: skip
    return out, new_state, new_stats, new_history, new_trust


def _predicted(q: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    planes, hot, seen, predicted, kept = args[:6], args[6:11], args[11:18], args[18], args[19:]
    exact = exact_importance(q, planes, seen, options)
    return attend_arbitrated(q, planes, hot, seen, (exact, predicted), kept, options)


def _fake_predicted(q: Tensor, *args: Any, v_format: str, **kwargs: Any) -> tuple[Tensor, ...]:
    out = ops._fake_attend(q, *args, v_format=v_format)[0]
    return (out, *(torch.empty_like(args[index]) for index in (9, 10, 19, 20)))


def _fake_predict(q: Tensor, summary: Tensor, history: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return q.new_empty((q.shape[0], history.shape[1], q.shape[2], history.shape[2]), dtype=torch.float32)


def _fake_arbitrate(exact: Tensor, predicted: Tensor, history: Tensor, trust: Tensor, *args: Any, **kw: Any) -> Any:
    below = exact.new_empty(exact.shape[:2])
    return torch.empty_like(exact), torch.empty_like(history), torch.empty_like(trust), below


_IMPLEMENTATIONS: dict[str, tuple[Any, Any]] = {
    "summarize": (_summarize, lambda *args, **kwargs: None),
    "predict": (_predict, _fake_predict),
    "arbitrate": (_arbitrate, _fake_arbitrate),
    "attention.predicted": (_predicted, _fake_predicted),
}

for _name, _schema in SCHEMAS.items():
    _run, _fake = _IMPLEMENTATIONS[_name]
    ops.LIBRARY.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))
    ops.LIBRARY.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"lamp::{_name}", _fake, lib=ops.LIBRARY)
    if _name != "summarize":
        torch.library.register_autograd(f"lamp::{_name}", ops.no_backward, lib=ops.LIBRARY)
