"""``lamp::summarize``, ``predict``, ``arbitrate`` and ``audit``, the meeting point of sites that use a network, and
``lamp::fused_predicted``, a whole step of such a site that writes in place.

Shape letters, planes and liveness as in ``runtime/ops.py``. ``summary`` is ``[B, G, N / group, R]`` float16; with
a block table, of the pool, ``[1, G, P_pool * tile / group, R]``. ``history`` is ``[B, G, T, 2]``, ``trust``
``[B, G, 7]``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lamp_compile.ir import Floor, Precision
from lamp_compile.runtime import checks, guard, kernels, layout, ops, reference
from lamp_compile.runtime.attend_in_parts import SCORES
from lamp_compile.runtime.network import audit, gate, predict

_GATE = "Tensor query, Tensor query_bias, Tensor age, Tensor extra"
_HOW = (
    "str rule, int query_bits, int subtile, int guard_window, int guard_hold, float hysteresis, str site, "
    "int trained, float skip"
)
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
    # Whom to believe, before a key is read: the importance to act on [B, G, 1, T], and that at which to skip [B, G].
    "arbitrate": (
        "(Tensor exact, Tensor predicted, Tensor trust, Tensor state, Tensor margin, Tensor? lengths, *, "
        "SymInt keys, int trained, float skip, int subtile, str site) -> (Tensor, Tensor)"
    ),
    # What the step's own weights say of the prediction: the new history and trust. `state` is that before the step.
    "audit": (
        "(Tensor q, Tensor k_high, Tensor k_residual, Tensor k_scale, Tensor levels, Tensor exact, Tensor predicted, "
        "Tensor history, Tensor trust, Tensor tau, Tensor floor, Tensor state, Tensor limit, Tensor margin, "
        f"Tensor? balance, {ops._LIVE}, *, {ops._SHAPE}, str k_format, str rotation, int query_bits, int subtile, "
        "int trained, float skip, str site) -> (Tensor, Tensor)"
    ),
    # The meeting point: attention.cached of a site whose importance was predicted. The passes expand it.
    "attention.predicted": (
        f"(Tensor q, {ops._PLANES}, Tensor tau, Tensor floor, Tensor budget, Tensor state, Tensor stats, "
        f"Tensor? balance, {ops._LIVE}, Tensor predicted, Tensor history, Tensor trust, Tensor limit, Tensor margin, "
        f"*, {ops._SHAPE}, {ops._STORE}, {_HOW}, str launch='') -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
    ),
    # predict and all that follows in one, for one new token of each sequence.
    "fused_predicted": (
        f"(Tensor q, {ops._PLANES}, Tensor tau, Tensor floor, Tensor budget, Tensor(a!) state, Tensor(b!) stats, "
        f"Tensor? balance, {ops._LIVE}, Tensor summary, Tensor(c!) history, Tensor(d!) trust, {_GATE}, Tensor limit, "
        f"Tensor margin, *, {ops._SHAPE}, {ops._STORE}, {_HOW}, int room, int pages, str launch='') -> Tensor"
    ),
}


def _arbitrate(
    exact: Tensor,
    predicted: Tensor,
    trust: Tensor,
    state: Tensor,
    margin: Tensor,
    lengths: Tensor | None,
    *,
    keys: int,
    trained: int,
    skip: float,
    subtile: int,
    site: str,
) -> tuple[Tensor, Tensor]:
    length, allowed = _skipping(exact, lengths, margin, keys, skip, subtile)
    use = audit.trusted(predicted, trust, state, length, trained)
    importance = torch.where(use[..., None, None], predicted, exact)
    below = torch.full(exact.shape[:2], -1.0, device=exact.device)
    if allowed is not None:
        below = torch.where(use & ~audit.sees_all(trust), allowed, below)
    return importance, below


def _skipping(
    like: Tensor, lengths: Tensor | None, margin: Tensor, keys: int, skip: float, subtile: int
) -> tuple[Tensor, Tensor | None]:
    """Tokens of each sequence, and the importance ``[B, G]`` at and below which its sub-tiles may be skipped."""
    length = torch.full((1,), int(keys), device=like.device)
    if lengths is not None:
        length = torch.minimum(lengths.reshape(-1), length)
    if skip <= 0:
        return length, None
    return length, audit.skip_threshold(skip, margin, length, subtile).expand(like.shape[:2]).contiguous()


def _audit(
    q: Tensor,
    k_high: Tensor,
    k_residual: Tensor,
    k_scale: Tensor,
    levels: Tensor,
    exact: Tensor,
    predicted: Tensor,
    history: Tensor,
    trust: Tensor,
    tau: Tensor,
    floor: Tensor,
    state: Tensor,
    limit: Tensor,
    margin: Tensor,
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
    k_format: str,
    rotation: str,
    query_bits: int,
    subtile: int,
    trained: int,
    skip: float,
    site: str,
) -> tuple[Tensor, Tensor]:
    checks.heads_of_setting(site, "tau", tau, levels.shape[1])
    k = (k_high, k_residual, k_scale)
    if block_table is not None:
        pages = [layout.gather_pages(plane, block_table) for plane in k[:2]]
        k = (pages[0], pages[1], layout.gather_scales(k_scale, block_table, layout.tile_of(k_high)))
    visible = ops._visible(keys, mask, bias, sinks, start, lengths, causal, window)
    scores = ops._scores(q, scale, softcap, rotation, query_bits)
    length, below = _skipping(levels, lengths, margin, keys, skip, subtile)
    terms = audit.Terms(tau, state, limit, length, trained, subtile, below, skip)
    use = audit.trusted(predicted, trust, state, length, trained)
    known = reference.final_importance(q, k, levels, balance, visible, scores, k_format, subtile)
    unread = levels == Precision.SKIP
    # A head that is not believed is known by its exact look-ahead, of which there is none where all is refined anyway.
    refined = torch.maximum(floor.reshape(-1, floor.shape[-1]), state[..., guard.FLOOR]) >= Floor.BOTH
    known = torch.where((use | refined)[..., None, None], known, exact)
    known = torch.where(unread, torch.where(use[..., None, None], predicted, exact), known)
    counted = audit.evidence_of(predicted, unread, trust, use, below)
    new_trust, _ = audit.judge(known, predicted, trust, replace(terms, counted=counted))
    return gate.histories(known, history)[1], new_trust


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

    Several rows at a time (a measurement over a window) are judged by the exact look-ahead, and each may skip.

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
    exact, predicted = importances
    site, lengths, one = options["site"], seen[5], q.shape[2] == 1
    how = {name: options[name] for name in ("keys", "skip", "subtile")}
    common = {name: options[name] for name in SCORES}
    trained = options["trained"]
    if one:
        importance, below = torch.ops.lamp.arbitrate(
            exact, predicted, trust, state, margin, lengths, **how, trained=trained, site=site
        )
    else:
        length, below = _skipping(exact, lengths, margin, **how)
        terms = audit.Terms(tau, state, limit, length, trained, options["subtile"], below, options["skip"])
        importance, new_trust = audit.arbitrate(exact, predicted, trust, terms)
        new_history = gate.histories(exact, history)[1]
    levels = torch.ops.lamp.select(
        importance, tau, floor, state, below if options["skip"] > 0 else None, exact=False, site=site
    )
    out, lse, certificate = torch.ops.lamp.attend(
        q, *planes, levels, None, None, *seen, v_format=options["v_format"], **common
    )
    new_state, new_stats = torch.ops.lamp.guard(
        out, lse, certificate, levels, state, stats, floor, budget, window=options["guard_window"],
        hold=options["guard_hold"], hysteresis=options["hysteresis"], exact=False, site=site,
    )  # fmt: skip
    if one:
        new_history, new_trust = torch.ops.lamp.audit(
            q, *planes[:3], levels, exact, predicted, history, trust, tau, floor, state, limit, margin, *seen,
            trained=trained, skip=options["skip"], **common,
        )  # fmt: skip
    return out, new_state, new_stats, new_history, new_trust


def _predicted(q: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    planes, hot, seen, predicted, kept = args[:6], args[6:11], args[11:18], args[18], args[19:]
    checks.settings(options, checks.held(options["site"], seen[-1], planes[0], planes[3])[1])
    exact = exact_importance(q, planes, seen, options)
    return attend_arbitrated(q, planes, hot, seen, (exact, predicted), kept, options)


def _fused_predicted(q: Tensor, *args: Any, room: int, pages: int, **options: Any) -> Tensor:
    planes, hot, seen, kept, weights = args[:6], args[6:11], args[11:18], args[18:21], args[21:]
    summary, history, trust = kept
    if (
        kernels.why_not_attend(q, planes, hot[3], options) is None
        and kernels.why_not_predicted(q, planes, kept, {**options, "pages": pages}) is None
    ):
        ops.check_attention(q, planes, (*hot, seen[0]), seen[1:], options)
        whole = {**options, "room": room, "pages": pages}
        predict.check_kernel(q, planes, seen[6], kept, weights, whole)
        return kernels.attend_predicted(q, planes, hot, seen, kept, weights, whole)
    predict.check_gate(str(options["site"]), q, history.shape[1], trust, weights)
    how = {name: options[name] for name in SCORES if name != "k_format"}
    predicted = torch.ops.lamp.predict(q, summary, history, *weights[:4], None, *seen, **how, room=room, pages=pages)
    out, *new = torch.ops.lamp.attention.predicted(
        q, *planes, *hot, *seen, predicted, history, trust, *weights[4:], **options
    )
    for held, made in zip((*hot[3:], history, trust), new, strict=True):
        held.copy_(made)
    result: Tensor = out
    return result


def _fake_predicted(q: Tensor, *args: Any, v_format: str, **kwargs: Any) -> tuple[Tensor, ...]:
    out = ops._fake_attend(q, *args, v_format=v_format)[0]
    return (out, *(torch.empty_like(args[index]) for index in (9, 10, 19, 20)))


def _fake_predict(q: Tensor, summary: Tensor, history: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return q.new_empty((q.shape[0], history.shape[1], q.shape[2], history.shape[2]), dtype=torch.float32)


def _fake_arbitrate(exact: Tensor, predicted: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(exact), exact.new_empty(exact.shape[:2])


def _fake_audit(q: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(args[6]), torch.empty_like(args[7])


_IMPLEMENTATIONS: dict[str, tuple[Any, Any]] = {
    "summarize": (predict.summarize, lambda *args, **kwargs: None),
    "predict": (predict.predict, _fake_predict),
    "arbitrate": (_arbitrate, _fake_arbitrate),
    "audit": (_audit, _fake_audit),
    "attention.predicted": (_predicted, _fake_predicted),
    "fused_predicted": (_fused_predicted, lambda q, *args, **kwargs: ops._fake_attend(q, *args, **kwargs)[0]),
}
IN_PLACE = ("summarize", "fused_predicted")
"""Operators that torch registers no backward pass for."""

for _name, _schema in SCHEMAS.items():
    _run, _fake = _IMPLEMENTATIONS[_name]
    ops.LIBRARY.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))
    ops.LIBRARY.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"lamp::{_name}", _fake, lib=ops.LIBRARY)
    if _name not in IN_PLACE:
        torch.library.register_autograd(f"lamp::{_name}", ops.no_backward, lib=ops.LIBRARY)
