"""Functional torch operators, one for each node that a graph of ours has: what ``torch.export`` records on the way to
ONNX, and the torch side of the comparison afterwards.

``lamp_onnx::append`` gives new planes instead of writing in place; ``lamp_onnx::uncached_attention`` is the five
operators of a site without a cache in one. Shapes as in ``runtime/ops.py``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lamp_compile.runtime import fused_ops as _fused_ops  # noqa: F401  (registers torch.ops.lamp)
from lamp_compile.runtime.attend_in_parts import attend_in_parts
from lamp_compile.runtime.ops import _fake_attend

LIBRARY: Any = torch.library.Library("lamp_onnx", "DEF")  # type: ignore[no-untyped-call]
_HOW = "str causal, int window, float scale, float softcap, str rotation, str rule, int query_bits, int subtile"
_GUARD = "int guard_window, int guard_hold, float hysteresis, str site"
SCHEMAS = {
    "append": (
        "(Tensor k, Tensor v, Tensor k_high, Tensor k_residual, Tensor k_scale, Tensor v_high, Tensor v_residual, "
        "Tensor v_scale, Tensor positions, Tensor? balance, *, str rotation, str site) "
        "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
    ),
    "fused_attention": (
        "(Tensor q, Tensor k_high, Tensor k_residual, Tensor k_scale, Tensor v_high, Tensor v_residual, Tensor "
        "v_scale, Tensor tau, Tensor floor, Tensor budget, Tensor state, Tensor stats, Tensor lengths, "
        f"Tensor? balance, Tensor? sinks, *, {_HOW}, {_GUARD}) -> (Tensor, Tensor, Tensor)"
    ),
    "uncached_attention": (
        "(Tensor q, Tensor k, Tensor v, Tensor tau, Tensor floor, Tensor budget, Tensor state, Tensor stats, "
        f"Tensor? balance, Tensor? mask, Tensor? bias, Tensor? sinks, *, {_HOW}, int tile, {_GUARD}) "
        "-> (Tensor, Tensor, Tensor)"
    ),
}
_FORMATS = {"k_format": "nested8", "v_format": "nested8"}


def _append(k: Tensor, v: Tensor, *args: Any, rotation: str, site: str) -> tuple[Tensor, ...]:
    planes, (positions, balance) = tuple(plane.clone() for plane in args[:6]), args[6:]
    torch.ops.lamp.append(k, v, *planes, balance, positions, None, **_FORMATS, rotation=rotation, site=site)
    return planes


def _fake_append(k: Tensor, v: Tensor, *args: Any, **options: Any) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(plane) for plane in args[:6])


def _fused_attention(q: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    planes, hot, (lengths, balance, sinks) = args[:6], args[6:11], args[11:]
    seen = (balance, None, None, sinks, None, lengths, None)
    keys = planes[0].shape[2] * planes[0].shape[3]
    # Not the kernels: they decide online and may refine more, and a comparison wants the definition.
    return attend_in_parts(q, planes, hot, seen, {**options, **_FORMATS, "keys": keys})


def _fake_fused(q: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    out = _fake_attend(q, *args[:3], args[3], v_format="nested8")[0]
    return out, torch.empty_like(args[9]), torch.empty_like(args[10])


def _uncached_attention(q: Tensor, k: Tensor, v: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    tau, floor, budget, state, stats, balance, mask, bias, sinks = args
    op, site, rule, tile = torch.ops.lamp, options["site"], options["rule"], options["tile"]
    planes = op.quantize(k, v, balance, **_FORMATS, rotation=options["rotation"], tile=tile, site=site)
    how = {
        name: options[name]
        for name in ("causal", "window", "scale", "softcap", "rotation", "query_bits", "subtile", "site")
    }
    how.update(keys=k.shape[2], k_format="nested8")
    seen = (balance, mask, bias, sinks, None, None, None)
    importance = op.look_ahead(q, planes[0], planes[2], *seen, rule=rule, **how)
    levels = op.select(importance, tau, floor, state, None, exact=True, site=site)
    out, lse, certificate = op.attend(q, *planes, levels, k, v, *seen, v_format="nested8", **how)
    guard = {name: options[f"guard_{name}"] for name in ("window", "hold")}
    state, stats = op.guard(
        out, lse, certificate, levels, state, stats, floor, budget,
        **guard, hysteresis=options["hysteresis"], exact=True, site=site,
    )  # fmt: skip
    return out, state, stats


def _fake_uncached(q: Tensor, k: Tensor, v: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(*q.shape[:3], v.shape[3]), torch.empty_like(args[3]), torch.empty_like(args[4])


_IMPLEMENTATIONS: dict[str, tuple[Any, Any]] = {
    "append": (_append, _fake_append),
    "fused_attention": (_fused_attention, _fake_fused),
    "uncached_attention": (_uncached_attention, _fake_uncached),
}

for _name, _schema in SCHEMAS.items():
    _run, _fake = _IMPLEMENTATIONS[_name]
    LIBRARY.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"lamp_onnx::{_name}", _fake, lib=LIBRARY)
