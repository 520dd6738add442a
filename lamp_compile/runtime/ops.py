"""Schemas, fakes and default implementations of the ``lamp::`` operators. Torch only.

Shape letters: B batch, H query heads, G kv heads, S queries, N keys, D head dim, Dv value dim; storage tiles of
``tile`` keys (P of them), decisions on sub-tiles of ``subtile`` keys (T = P * tile / subtile).

Planes: ``k_high``/``k_residual`` ``[B, G, P, tile, width]``, ``v_high``/``v_residual`` ``[B, G, P, width, tile]``
(transposed inside a tile, because 8-bit tensor cores want the reduction contiguous), scales ``[B, G, P * tile]``; or by
lanes (``runtime/layout.py``). A format without a residual plane stores one of width 0. With ``block_table``
``[B, pages]`` (int32, page = a whole number of storage tiles, here one) the planes are a pool ``[1, G, P_pool, ...]``
and the table gives each sequence's tiles in order.

Liveness, common to all: key j of sequence b is live for query i iff ``start[b] <= j < min(lengths[b], keys)``, the
boolean ``mask`` allows it, and causality and window do. ``causal="top_left"`` puts query i at position i,
``"bottom_right"`` at ``length - S + i``. A row with no live key gives output 0, log-sum-exp -inf, certificate 0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lamp_compile.errors import ModelError
from lamp_compile.runtime import checks, formats, guard, kernels, layout, reference
from lamp_compile.runtime.arguments import Planes, Scores, Visibility
from lamp_compile.runtime.attend_in_parts import attend_in_parts

DEFAULT_TAU = 0.01
"""tau of the energy rule when nothing else is said: about a tenth of the sub-tiles are refined on real text."""

_LIVE = "Tensor? mask, Tensor? bias, Tensor? sinks, Tensor? start, Tensor? lengths, Tensor? block_table"
_PLANES = "Tensor k_high, Tensor k_residual, Tensor k_scale, Tensor v_high, Tensor v_residual, Tensor v_scale"
_SHAPE = "str causal, int window, float? scale, float softcap, SymInt keys"
_STORE = "str k_format, str v_format, str rotation"

SCHEMAS = {
    # The meeting point: every spelling of attention becomes this, every target starts from it.
    "attention": (
        "(Tensor q, Tensor k, Tensor v, Tensor? mask=None, Tensor? bias=None, Tensor? sinks=None, *, "
        "str causal='', int window=0, float? scale=None, float softcap=0.0, str site='') -> Tensor"
    ),
    # The same, over the planes of a cache, with its per-slot state in and out.
    "attention.cached": (
        f"(Tensor q, {_PLANES}, Tensor tau, Tensor floor, Tensor budget, Tensor state, Tensor stats, Tensor? balance, "
        f"{_LIVE}, *, {_SHAPE}, {_STORE}, str rule, int query_bits, int subtile, "
        "int guard_window, int guard_hold, float hysteresis, str site, str launch='') -> (Tensor, Tensor, Tensor)"
    ),
    # tile = 0 gives rows for appending to a cache: planes [B, G, N, width], scales [B, G, N].
    "quantize": (
        f"(Tensor k, Tensor v, Tensor? balance, *, {_STORE}, int tile, str site) "
        "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
    ),
    "look_ahead": (
        f"(Tensor q, Tensor k_high, Tensor k_scale, Tensor? balance, {_LIVE}, *, {_SHAPE}, "
        "str k_format, str rotation, str rule, int query_bits, int subtile, str site) -> Tensor"
    ),
    "select": (
        "(Tensor importance, Tensor tau, Tensor floor, Tensor? state, Tensor? skip_below, *, bool exact, str site)"
        " -> Tensor"
    ),
    "attend": (
        f"(Tensor q, {_PLANES}, Tensor levels, Tensor? k_exact, Tensor? v_exact, Tensor? balance, {_LIVE}, *, "
        f"{_SHAPE}, {_STORE}, int query_bits, int subtile, str site) -> (Tensor, Tensor, Tensor)"
    ),
    "guard": (
        "(Tensor out, Tensor lse, Tensor certificate, Tensor levels, Tensor state, Tensor stats, Tensor floor, "
        "Tensor budget, *, int window, int hold, float hysteresis, bool exact, str site) -> (Tensor, Tensor)"
    ),
}

Planes6 = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def _visible(
    keys: int,
    mask: Tensor | None,
    bias: Tensor | None,
    sinks: Tensor | None,
    start: Tensor | None,
    lengths: Tensor | None,
    causal: str,
    window: int,
) -> Visibility:
    return Visibility(int(keys), mask, bias, sinks, start, lengths, causal, window)


def _scores(q: Tensor, scale: float | None, softcap: float, rotation: str, query_bits: int) -> Scores:
    return Scores(q.shape[-1] ** -0.5 if scale is None else float(scale), softcap, rotation, query_bits)


def _quantize(
    k: Tensor, v: Tensor, balance: Tensor | None, *, k_format: str, v_format: str, rotation: str, tile: int, site: str
) -> Planes6:
    checks.keys_and_values(site, k, v)
    checks.one_device(site, k, v=v, balance=balance)
    planes = reference.quantize(k, v, balance, k_format, v_format, rotation, tile)
    return (planes.k_high, planes.k_residual, planes.k_scale, planes.v_high, planes.v_residual, planes.v_scale)


def _look_ahead(
    q: Tensor,
    k_high: Tensor,
    k_scale: Tensor,
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
    rule: str,
    query_bits: int,
    subtile: int,
    site: str,
) -> Tensor:
    batch, room = checks.held(site, block_table, k_high)
    checks.query(site, q, k_high.shape[1], batch, formats.get(k_format).channels(layout.key_width(k_high)))
    checks.one_device(site, q, k_planes=k_high, mask=mask, bias=bias, lengths=lengths, start=start, table=block_table)
    checks.visibility(site, q, mask, bias, (int(keys), room), causal, window)
    if block_table is not None:
        k_scale = layout.gather_scales(k_scale, block_table, layout.tile_of(k_high))
        k_high = layout.gather_pages(k_high, block_table)
    visible = _visible(keys, mask, bias, sinks, start, lengths, causal, window)
    scores = _scores(q, scale, softcap, rotation, query_bits)
    return reference.look_ahead(q, k_high, k_scale, balance, visible, scores, k_format, rule, subtile)


def _select(
    importance: Tensor,
    tau: Tensor,
    floor: Tensor,
    state: Tensor | None,
    skip_below: Tensor | None,
    *,
    exact: bool,
    site: str,
) -> Tensor:
    for name, setting in (("tau", tau), ("floor", floor)):
        checks.heads_of_setting(site, name, setting, importance.shape[1])
    return reference.select(importance, tau, floor, state, skip_below, exact)


def _attend(
    q: Tensor,
    k_high: Tensor,
    k_residual: Tensor,
    k_scale: Tensor,
    v_high: Tensor,
    v_residual: Tensor,
    v_scale: Tensor,
    levels: Tensor,
    k_exact: Tensor | None,
    v_exact: Tensor | None,
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
    v_format: str,
    rotation: str,
    query_bits: int,
    subtile: int,
    site: str,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, room = checks.held(site, block_table, k_high, v_high)
    checks.query(site, q, k_high.shape[1], batch, formats.get(k_format).channels(layout.key_width(k_high)))
    checks.one_device(site, q, k_planes=k_high, v_planes=v_high, levels=levels, mask=mask, bias=bias, lengths=lengths)
    checks.visibility(site, q, mask, bias, (int(keys), room), causal, window)
    planes = Planes(k_high, k_residual, k_scale, v_high, v_residual, v_scale).gathered(block_table)
    exact = None if k_exact is None or v_exact is None else (k_exact, v_exact)
    visible = _visible(keys, mask, bias, sinks, start, lengths, causal, window)
    scores = _scores(q, scale, softcap, rotation, query_bits)
    return reference.attend(q, planes, levels, exact, balance, visible, scores, k_format, v_format, subtile)


def _guard(
    out: Tensor,
    lse: Tensor,
    certificate: Tensor,
    levels: Tensor,
    state: Tensor,
    stats: Tensor,
    floor: Tensor,
    budget: Tensor,
    *,
    window: int,
    hold: int,
    hysteresis: float,
    exact: bool,
    site: str,
) -> tuple[Tensor, Tensor]:
    return guard.step(
        out, lse, certificate, levels, state, stats, floor, budget,
        window=window, hold=hold, hysteresis=hysteresis, exact=exact,
    )  # fmt: skip


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
    *,
    causal: str = "",
    window: int = 0,
    scale: float | None = None,
    softcap: float = 0.0,
    site: str = "",
) -> Tensor:
    """Called as it stands, outside any plan: the reference under the default settings, without a guard."""
    rotation = "hadamard"
    planes = torch.ops.lamp.quantize(
        k, v, None, k_format="nested8", v_format="nested8", rotation=rotation, tile=layout.TILE, site=site
    )
    none: Any = (None, mask, bias, sinks, None, None, None)
    shape: dict[str, Any] = dict(causal=causal, window=window, scale=scale, softcap=softcap, keys=k.shape[2])
    common: dict[str, Any] = dict(rotation=rotation, query_bits=8, subtile=layout.SUBTILE, site=site)
    importance = torch.ops.lamp.look_ahead(
        q, planes[0], planes[2], *none, **shape, k_format="nested8", rule="energy", **common
    )
    tau = torch.full((k.shape[1],), DEFAULT_TAU, device=q.device)
    levels = torch.ops.lamp.select(importance, tau, torch.zeros_like(tau), None, None, exact=False, site=site)
    attended = torch.ops.lamp.attend(
        q, *planes, levels, None, None, *none, **shape, k_format="nested8", v_format="nested8", **common
    )
    out: Tensor = attended[0]
    return out


def _cached(
    q: Tensor,
    k_high: Tensor,
    k_residual: Tensor,
    k_scale: Tensor,
    v_high: Tensor,
    v_residual: Tensor,
    v_scale: Tensor,
    tau: Tensor,
    floor: Tensor,
    budget: Tensor,
    state: Tensor,
    stats: Tensor,
    balance: Tensor | None,
    mask: Tensor | None,
    bias: Tensor | None,
    sinks: Tensor | None,
    start: Tensor | None,
    lengths: Tensor | None,
    block_table: Tensor | None,
    *,
    rule: str,
    guard_window: int,
    guard_hold: int,
    hysteresis: float,
    site: str,
    k_format: str,
    v_format: str,
    launch: str = "",
    **common: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    seen: Any = (balance, mask, bias, sinks, start, lengths, block_table)
    planes = (k_high, k_residual, k_scale, v_high, v_residual, v_scale)
    options = dict(
        common, rule=rule, guard_window=guard_window, guard_hold=guard_hold, hysteresis=hysteresis, site=site,
        k_format=k_format, v_format=v_format, launch=launch,
    )  # fmt: skip
    if kernels.why_not_attend(q, planes, state, options) is None:
        check_attention(q, planes, (tau, floor, budget, state, stats, balance), seen[1:], options)
        state, stats = state.clone(), stats.clone()
        return kernels.attend(q, planes, (tau, floor, budget, state, stats), balance, seen[1:], options), state, stats
    checks.settings(options, checks.held(site, block_table, k_high, v_high)[1])
    return attend_in_parts(q, planes, (tau, floor, budget, state, stats), seen, options)


def check_attention(
    q: Tensor,
    planes: tuple[Tensor, ...],
    hot: tuple[Tensor | None, ...],
    seen: tuple[Tensor | None, ...],
    options: dict[str, Any],
) -> None:
    """What the operators check one by one, for an attention that runs as one kernel; ``hot`` are tau, floor, budget,
    state, stats and balance.

    Raises:
        InputError: Shapes, dtypes or devices do not fit together.
    """
    mask, bias, *_, table = seen
    k_high, site = planes[0], options["site"]
    batch, room = checks.held(site, table, k_high, planes[3])
    checks.settings(options, room)
    checks.query(site, q, k_high.shape[1], batch, formats.get(options["k_format"]).channels(layout.key_width(k_high)))
    others = dict(zip(("mask", "bias", "sinks", "start", "lengths", "table"), seen, strict=True))
    checks.one_device(site, q, k_planes=k_high, v_planes=planes[3], **others)
    names = ("tau", "floor", "budget", "state", "stats", "balance")
    checks.one_device(site, q, **dict(zip(names, hot, strict=True)))
    for name, setting in zip(names[:3], hot, strict=False):
        assert setting is not None
        checks.heads_of_setting(site, name, setting, k_high.shape[1], batch)
    checks.stored(site, q, planes, hot[3:], seen)
    checks.visibility(site, q, mask, bias, (int(options["keys"]), room), options["causal"], options["window"])


def _fake_quantize(
    k: Tensor, v: Tensor, balance: Tensor | None, *, k_format: str, v_format: str, rotation: str, tile: int, site: str
) -> Planes6:
    def rows(x: Tensor, name: str, transposed: bool) -> tuple[Tensor, Tensor, Tensor]:
        batch, kv_heads, keys, dim = x.shape
        high, residual = formats.get(name).plane_widths(dim)
        dtype = formats.get(name).plane_dtype
        if tile == 0:
            lead: tuple[int, ...] = (batch, kv_heads, keys)
            shapes: list[tuple[int, ...]] = [(*lead, high), (*lead, residual)]
            stored = keys
        else:
            lead = (batch, kv_heads, (keys + tile - 1) // tile)
            shapes = [(*lead, w, tile) if transposed else (*lead, tile, w) for w in (high, residual)]
            stored = lead[2] * tile
        planes = [x.new_empty(shape, dtype=dtype) for shape in shapes]
        return planes[0], planes[1], x.new_empty((batch, kv_heads, stored), dtype=torch.float16)

    return (*rows(k, k_format, False), *rows(v, v_format, True))


def _fake_look_ahead(q: Tensor, k_high: Tensor, k_scale: Tensor, *args: Any, subtile: int, **kwargs: Any) -> Tensor:
    block_table = args[-1]
    tiles = k_high.shape[2] if block_table is None else block_table.shape[1]
    return q.new_empty(
        (q.shape[0], k_high.shape[1], q.shape[2], tiles * (layout.tile_of(k_high) // subtile)), dtype=torch.float32
    )


def _fake_attend(q: Tensor, *args: Any, v_format: str, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
    value_dim = formats.get(v_format).channels(layout.value_width(args[3]))
    batch, heads, queries, _ = q.shape
    rows = q.new_empty((batch, heads, queries), dtype=torch.float32)
    return q.new_empty((batch, heads, queries, value_dim)), rows, rows.new_empty((batch, heads, queries, 3))


def _fake_cached(q: Tensor, *args: Any, v_format: str, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
    out = _fake_attend(q, *args, v_format=v_format)[0]
    return out, torch.empty_like(args[9]), torch.empty_like(args[10])


_IMPLEMENTATIONS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "attention": (_attention, lambda q, k, v, *args, **kwargs: q.new_empty((*q.shape[:-1], v.shape[-1]))),
    "attention.cached": (_cached, _fake_cached),
    "quantize": (_quantize, _fake_quantize),
    "look_ahead": (_look_ahead, _fake_look_ahead),
    "select": (_select, lambda importance, *args, **kwargs: torch.empty_like(importance, dtype=torch.uint8)),
    "attend": (_attend, _fake_attend),
    "guard": (
        _guard,
        lambda out, lse, certificate, levels, state, stats, *args, **kwargs: (
            torch.empty_like(state),
            torch.empty_like(stats),
        ),
    ),
}


def no_backward(*args: Any) -> Any:
    """Raise ModelError: asked for gradients."""
    raise ModelError(
        "lamp operators have no backward pass",
        where="torch.ops.lamp",
        fix="run the model under torch.no_grad() or torch.inference_mode(), or train the original model",
    )


LIBRARY: Any = torch.library.Library("lamp", "DEF")  # type: ignore[no-untyped-call]
for _name, _schema in SCHEMAS.items():
    _run, _fake = _IMPLEMENTATIONS[_name]
    LIBRARY.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"lamp::{_name}", _fake, lib=LIBRARY)
    torch.library.register_autograd(f"lamp::{_name}", no_backward, lib=LIBRARY)
