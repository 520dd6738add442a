"""``lamp::append`` and ``lamp::fused_attention``: a decode step in two operators that write in place.

``append`` stores new rows in the planes; ``fused_attention`` is ``look_ahead``, ``select``, ``attend`` and ``guard`` in
one, and writes the guard's state back itself. Where a kernel exists (``runtime/kernels``) it runs; the implementations
here are the reference. Shape letters and liveness as in ``runtime/ops.py``. On CPUs torch itself calls the compiled
core (``kernels/cpu/core/torch_ops.cpp``), and what is here only for calls that the core does not serve.

Their settings may be given by position: a graph's call then takes half as long to dispatch as with names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from lamp_compile.runtime import checks, handed_on, kernels, layout, ops, reference

SCHEMAS = {
    # positions: where each sequence's first new row goes, int64 [1] or [B]; below 0 = this sequence takes nothing.
    "append": (
        "(Tensor k, Tensor v, Tensor(a!) k_high, Tensor(b!) k_residual, Tensor(c!) k_scale, Tensor(d!) v_high, "
        "Tensor(e!) v_residual, Tensor(f!) v_scale, Tensor? balance, Tensor positions, Tensor? block_table, "
        "str k_format, str v_format, str rotation, str site) -> ()"
    ),
    "fused_attention": (
        f"(Tensor q, {ops._PLANES}, Tensor tau, Tensor floor, Tensor budget, Tensor(a!) state, Tensor(b!) stats, "
        f"Tensor? balance, {ops._LIVE}, {ops._SHAPE}, {ops._STORE}, str rule, int query_bits, int subtile, "
        "int guard_window, int guard_hold, float hysteresis, str site, str launch='') -> Tensor"
    ),
}


TENSORS = 18
"""Arguments of ``lamp::fused_attention`` behind the query that are tensors or None."""
SETTINGS = (
    "causal", "window", "scale", "softcap", "keys", "k_format", "v_format", "rotation", "rule", "query_bits", "subtile",
    "guard_window", "guard_hold", "hysteresis", "site", "launch",
)  # fmt: skip
"""What comes behind the tensors of ``lamp::fused_attention``, in order."""


def settings(options: Mapping[str, Any]) -> list[Any]:
    """These by position, of some by name. Without ``launch`` it is the default."""
    return [options[name] for name in SETTINGS if name in options]


def _append(
    k: Tensor,
    v: Tensor,
    k_high: Tensor,
    k_residual: Tensor,
    k_scale: Tensor,
    v_high: Tensor,
    v_residual: Tensor,
    v_scale: Tensor,
    balance: Tensor | None,
    positions: Tensor,
    block_table: Tensor | None,
    k_format: str,
    v_format: str,
    rotation: str,
    site: str,
) -> None:
    planes = (k_high, k_residual, k_scale, v_high, v_residual, v_scale)
    checks.given(site, positions=positions)
    checks.keys_and_values(site, k, v)
    checks.held(site, block_table, k_high, v_high)
    checks.one_device(site, k, v=v, k_planes=k_high, v_planes=v_high, balance=balance, positions=positions)
    if kernels.why_not_store(planes, k_format, v_format, k.dtype) is None:
        checks.planes(site, planes, block_table, k.shape[0], v.shape[3] // 2)
        checks.keys_of_planes(site, k, k_high)
        checks.per_sequence(site, k.shape[0], positions=positions)
        checks.balance(site, balance, k.shape[1], k.shape[3], k.shape[0])
        return kernels.append(k, v, planes, balance, positions, block_table, rotation)
    rows = reference.quantize(k, v, balance, k_format, v_format, rotation, tile=0)
    tile = layout.tile_of(k_high)
    place = layout.places(positions, k.shape[0], k.shape[2], tile, block_table)
    layout.put_keys(k_high, rows.k_high, place)
    layout.put_keys(k_residual, rows.k_residual, place)
    layout.put_scales(k_scale, rows.k_scale, place, tile)
    layout.put_values(v_high, rows.v_high, place)
    layout.put_values(v_residual, rows.v_residual, place)
    layout.put_scales(v_scale, rows.v_scale, place, tile)
    return None


class _Inference(torch.autograd.Function):
    """An output that says, on the way back, that there is none."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, q: Tensor) -> Tensor:
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        ops.no_backward()


def inference_only(out: Tensor, q: Tensor) -> Tensor:
    """The output of an operator that writes in place, for which torch registers no backward pass: asked for gradients,
    it raises instead of leaving them out."""
    if not (torch.is_grad_enabled() and q.requires_grad):
        return out
    marked: Tensor = _Inference.apply(out, q)  # type: ignore[no-untyped-call]
    return marked


def _fused_attention(q: Tensor, *args: Any) -> Tensor:
    planes, hot, balance, seen = args[:6], args[6:11], args[11], args[12:TENSORS]
    options = dict(zip(SETTINGS, args[TENSORS:], strict=False))  # defaults are left out by the dispatcher
    state, stats = hot[3:]
    if kernels.why_not_attend(q, planes, state, options) is None:
        ops.check_attention(q, planes, (*hot, balance), seen, options)
        return kernels.attend(q, planes, hot, balance, seen, options)
    out, new_state, new_stats = torch.ops.lamp.attention.cached(q, *args[:TENSORS], **options)
    state.copy_(new_state)
    stats.copy_(new_stats)
    result: Tensor = out
    return result


def _fake_fused(q: Tensor, *args: Any) -> Tensor:
    given = dict(zip(SETTINGS, args[TENSORS:], strict=False))
    return ops._fake_attend(q, *args[:TENSORS], v_format=given["v_format"])[0]


_IMPLEMENTATIONS: dict[str, tuple[Any, Any]] = {
    "append": (_append, lambda *args, **kwargs: None),
    "fused_attention": (_fused_attention, _fake_fused),
}

_NOTHING: dict[str, Callable[..., Any]] = {
    "append": lambda *args: None,
    "fused_attention": lambda q, *args: q.new_empty(0),
}

for _name, _schema in SCHEMAS.items():
    _run, _fake = _IMPLEMENTATIONS[_name]
    ops.LIBRARY.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))
    ops.LIBRARY.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"lamp::{_name}", _fake, lib=ops.LIBRARY)
    handed_on.define(ops.LIBRARY, _name, _schema, _run, _NOTHING[_name])
if kernels.cpu.join_torch() is None:
    for _name in SCHEMAS:
        handed_on.raise_by_type(_name)
