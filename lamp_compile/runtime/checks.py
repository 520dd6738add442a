"""Checks of the operators' tensors: shapes, dtypes and devices, before anything is computed. Host work only, no
synchronisation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lamp_compile.errors import InputError
from lamp_compile.plan import QUERY_BITS
from lamp_compile.runtime import layout, rotation
from lamp_compile.runtime.arguments import CAUSAL

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


INTEGERS = (torch.int64, torch.int32)


def floating(site: str, **tensors: Tensor) -> None:
    """Raise InputError unless every tensor is ``[batch, heads, length, channels]``, not empty, and of a float dtype."""
    for name, x in tensors.items():
        where = _where(site, name)
        if x.dtype not in DTYPES:
            raise InputError(
                f"{name} is {_word(x.dtype)}", where=where, fix=f"convert it to one of {', '.join(map(_word, DTYPES))}"
            )
        if x.dim() != 4:
            raise InputError(
                f"{name} has {x.dim()} dimensions {tuple(x.shape)}", where=where, fix="[batch, heads, length, channels]"
            )
        if x.numel() == 0:
            raise InputError(f"{name} is empty: {tuple(x.shape)}", where=where, fix="at least one token")


def one_device(site: str, q: Tensor, **others: Tensor | None) -> None:
    """Raise InputError unless all tensors are where the query is."""
    for name, x in others.items():
        if x is not None and x.device != q.device:
            raise InputError(
                f"{name} is on {x.device}, the query on {q.device}",
                where=_where(site, name),
                fix=f"move the model, its inputs and its cache to one device, such as {q.device}",
            )


def keys_and_values(site: str, k: Tensor, v: Tensor) -> None:
    """Raise InputError unless k ``[B, G, N, D]`` and v ``[B, G, N, Dv]`` belong together."""
    floating(site, k=k, v=v)
    if k.shape[:3] != v.shape[:3]:
        raise InputError(
            f"k {tuple(k.shape)} and v {tuple(v.shape)} differ in batch, heads or length",
            where=_where(site, "k, v"),
            fix="k [B, G, N, D] and v [B, G, N, Dv]",
        )


def held(site: str, table: Tensor | None, k_high: Tensor, v_high: Tensor | None = None) -> tuple[int, int]:
    """Sequences in planes, or in a pool's table, and keys that each has room for.

    Raises:
        InputError: These are no planes, or that is no table.
    """
    for name, x in (("k_high", k_high), ("v_high", v_high)):
        if x is not None and x.dim() not in (5, 6):
            raise InputError(
                f"{name} has {x.dim()} dimensions {tuple(x.shape)}",
                where=_where(site, name),
                fix="[B, G, P, tile, width] for keys, [B, G, P, width, tile] for values; six by lanes",
            )
    if table is not None and table.dim() != 2:
        raise InputError(
            f"a block table {tuple(table.shape)}", where=_where(site, "block_table"), fix="int32 [B, pages]"
        )
    batch, tiles = (k_high.shape[0], k_high.shape[2]) if table is None else table.shape
    return batch, tiles * layout.tile_of(k_high)


def planes(site: str, six: tuple[Tensor, ...], table: Tensor | None, batch: int, v_width: int | None = None) -> None:
    """Raise InputError unless six planes of ``nested8`` belong together and hold ``batch`` sequences: what kernels take
    as addresses.

    Args:
        site: For the message.
        six: K high ``[B, G, P, tile, D/2]``, residual and scale ``[B, G, P * tile]``, the same of V; or all four by
            lanes, K ``[B, G, P, D/8, 32, 4]`` and V ``[B, G, P, 8, Dv/2, 4]``.
        table: ``[batch, pages]``, int32 or int64: the planes are a pool then, with B = 1.
        batch: Sequences of the call.
        v_width: Bytes of a row of V, where the call says so.
    """
    where = _where(site, "planes")
    for name, x, dtype in zip(
        ("k_high", "k_residual", "k_scale", "v_high", "v_residual", "v_scale"),
        six,
        (torch.uint8, torch.uint8, torch.float16) * 2,
        strict=True,
    ):
        if x.dtype != dtype:
            raise InputError(f"{name} is {_word(x.dtype)}", where=where, fix=f"{_word(dtype)}")
    if not _belong_together(six, v_width):
        raise InputError(
            f"planes of shapes {', '.join(str(tuple(x.shape)) for x in six)} do not belong together",
            where=where,
            fix="K [B, G, P, tile, D/2], V [B, G, P, Dv/2, tile], scales [B, G, P * tile]; by lanes "
            "K [B, G, P, D/8, 32, 4], V [B, G, P, 8, Dv/2, 4] with D a multiple of 8 and Dv of 32",
        )
    sequences = six[0].shape[0]
    if sequences != (batch if table is None else 1):
        raise InputError(f"planes of {sequences} sequences for {batch}", where=where, fix="one batch size for both")
    if table is not None and (table.dim() != 2 or table.shape[0] != batch or table.dtype not in INTEGERS):
        raise InputError(
            f"a block table {tuple(table.shape)}, {_word(table.dtype)}", where=where, fix=f"int32 [{batch}, pages]"
        )


def _belong_together(six: tuple[Tensor, ...], v_width: int | None) -> bool:
    k_high, k_residual, k_scale, v_high, v_residual, v_scale = six
    if k_high.dim() not in (5, 6) or v_high.dim() != k_high.dim():
        return False
    lead, lanes = k_high.shape[:3], layout.by_lanes(k_high)
    tile, half_k, half_v = layout.tile_of(k_high), layout.key_width(k_high), layout.value_width(v_high)
    return (
        k_high.shape == k_residual.shape == (*lead, *layout.key_shape(tile, half_k, lanes))
        and v_high.shape == v_residual.shape == (*lead, *layout.value_shape(tile, half_v, lanes))
        and k_scale.shape == v_scale.shape == (*lead[:2], lead[2] * tile)
        and (v_width is None or half_v == v_width)
        and (not lanes or layout.lanes_fit(tile, half_k, half_v))
    )


def stored(
    site: str, q: Tensor, six: tuple[Tensor, ...], kept: tuple[Tensor | None, ...], seen: tuple[Tensor | None, ...]
) -> None:
    """Raise InputError unless what an attention reads of a cache belongs to its query ``[B, H, S, D]``.

    Args:
        site: For the message.
        q: The query.
        six: Planes.
        kept: The guard's state and statistics, and balance.
        seen: mask, bias, sinks, start, lengths, block table.
    """
    (state, stats, factors), (_, _, sink, start, lengths, table) = kept, seen
    batch, kv_heads = q.shape[0], six[0].shape[1]
    planes(site, six, table, batch)
    per_sequence(site, batch, start=start, lengths=lengths)
    balance(site, factors, kv_heads, q.shape[3], batch)
    sinks(site, sink, q.shape[1])
    if state is None or state.shape != (batch, kv_heads, 4):
        raise InputError(
            f"a guard's state {None if state is None else tuple(state.shape)} for {batch} sequences, {kv_heads} heads",
            where=_where(site, "state"),
            fix="guard.new_state",
        )
    if stats is None or stats.dtype != torch.int64 or stats.shape != (batch, kv_heads, 7) or not stats.is_contiguous():
        raise InputError(
            "statistics that are not contiguous int64 [B, G, 7]", where=_where(site, "stats"), fix="guard.new_stats"
        )


def keys_of_planes(site: str, k: Tensor, k_high: Tensor) -> None:
    """Raise InputError unless k ``[B, G, n, D]`` has the heads and channels of a plane of ``nested8``."""
    channels = 2 * layout.key_width(k_high)
    if k.shape[1] != k_high.shape[1] or k.shape[3] != channels:
        raise InputError(
            f"k {tuple(k.shape)} for planes of {k_high.shape[1]} heads and {channels} channels",
            where=_where(site, "k"),
            fix="keys of the model that the planes were made for",
        )


def given(site: str, **tensors: Tensor | None) -> None:
    """Raise InputError for None, which torch takes for any tensor."""
    for name, x in tensors.items():
        if x is None:
            raise InputError(f"{name} is None", where=_where(site, name), fix="a tensor")


def per_sequence(site: str, batch: int, **numbers: Tensor | None) -> None:
    """Raise InputError unless each is one integer, or one for each of ``batch`` sequences."""
    for name, x in numbers.items():
        if x is None:
            continue
        if x.dtype not in INTEGERS:
            raise InputError(f"{name} is {_word(x.dtype)}", where=_where(site, name), fix="int64 or int32")
        if x.numel() not in (1, batch):
            raise InputError(
                f"{name} has {x.numel()} numbers for {batch} sequences",
                where=_where(site, name),
                fix="one, or one each",
            )


def balance(site: str, given: Tensor | None, kv_heads: int, dim: int, batch: int) -> None:
    """Raise InputError unless balance is ``[G, D]`` or ``[B, G, D]``."""
    if given is None:
        return
    leading = tuple(given.shape[:-2])
    if given.dim() not in (2, 3) or tuple(given.shape[-2:]) != (kv_heads, dim) or leading not in ((), (1,), (batch,)):
        raise InputError(
            f"balance {tuple(given.shape)} for {kv_heads} kv heads of {dim} channels",
            where=_where(site, "balance"),
            fix="[G, D] or [B, G, D]",
        )


def sinks(site: str, given: Tensor | None, heads: int) -> None:
    """Raise InputError unless there is a sink for every head, or one for all."""
    if given is not None and given.numel() not in (1, heads):
        raise InputError(
            f"{given.numel()} sinks for {heads} heads", where=_where(site, "sinks"), fix=f"[{heads}], one per head"
        )


def query(site: str, q: Tensor, kv_heads: int, batch: int, head_dim: int) -> None:
    """Raise InputError unless q ``[B, H, S, D]`` fits keys of ``kv_heads`` heads."""
    floating(site, q=q)
    where = _where(site, "q")
    if q.shape[0] != batch:
        raise InputError(
            f"the query has batch {q.shape[0]}, the keys {batch}", where=where, fix="one batch size for both"
        )
    if q.shape[1] % kv_heads:
        raise InputError(
            f"{q.shape[1]} query heads over {kv_heads} kv heads", where=where, fix="a whole number of groups"
        )
    if q.shape[3] != head_dim:
        raise InputError(
            f"the query has head_dim {q.shape[3]}, the keys {head_dim}", where=where, fix="one head_dim for both"
        )


def visibility(
    site: str, q: Tensor, mask: Tensor | None, bias: Tensor | None, keys: tuple[int, int], causal: str, window: int
) -> None:
    """Raise InputError unless mask and bias broadcast to ``[B, H, S, N]`` and causality has a meaning.

    ``keys`` are the two sizes N may have: the keys there are, and those there is room for.
    """
    if mask is not None and mask.dtype != torch.bool:
        raise InputError(
            f"mask is {_word(mask.dtype)}",
            where=_where(site, "mask"),
            fix="a boolean mask, or pass an additive one as bias",
        )
    if bias is not None and not bias.is_floating_point():
        raise InputError(f"bias is {_word(bias.dtype)}", where=_where(site, "bias"), fix="a float tensor that is added")
    for name, x in (("mask", mask), ("bias", bias)):
        if x is None:
            continue
        wanted = q.shape[:3]
        got = (1,) * (4 - x.dim()) + tuple(x.shape)
        if x.dim() > 4 or any(size not in (1, want) for size, want in zip(got[:3], wanted, strict=True)):
            raise InputError(
                f"{name} {tuple(x.shape)} does not broadcast to batch, heads and queries {tuple(wanted)}",
                where=_where(site, name),
                fix="[B, H, S, N] with ones where it is shared",
            )
        if got[3] not in (1, *keys):
            raise InputError(
                f"{name} {tuple(x.shape)} covers {got[3]} keys of {keys[0]}",
                where=_where(site, name),
                fix="one column per key, or a single one for all",
            )
    if causal not in CAUSAL:
        raise InputError(
            f"causal={causal!r}", where=_where(site, "causal"), fix=f"one of {', '.join(map(repr, CAUSAL))}"
        )
    if window < 0:
        raise InputError(f"window={window}", where=_where(site, "window"), fix="a number of keys, or 0 for all")
    if window and not causal:
        raise InputError(
            f"window={window} without causal", where=_where(site, "window"), fix="causal='top_left' or 'bottom_right'"
        )


LEAST = {"softcap": 0, "keys": 0, "subtile": 1, "guard_window": 1, "guard_hold": 0, "hysteresis": 0}


def settings(options: Mapping[str, Any], room: int) -> None:
    """Raise InputError for what means nothing among the numbers and words of an attention over planes that have room
    for so many keys."""
    site = str(options["site"])
    for name, least in LEAST.items():
        if not options[name] >= least:
            raise InputError(f"{name}={options[name]}", where=_where(site, name), fix=f"{least} or more")
    for name, known in (("rotation", rotation.KINDS), ("query_bits", QUERY_BITS)):
        if options[name] not in known:
            raise InputError(
                f"{name}={options[name]!r}", where=_where(site, name), fix=f"one of {', '.join(map(str, known))}"
            )
    if room % options["subtile"]:
        raise InputError(
            f"sub-tiles of {options['subtile']} keys, and room for {room}",
            where=_where(site, "subtile"),
            fix="32, 64 or 128, of which there is room for a whole number",
        )


def heads_of_setting(site: str, name: str, setting: Tensor, kv_heads: int, batch: int | None = None) -> None:
    """Raise InputError unless tau, floor or budget is ``[G]`` or ``[B, G]``."""
    leading = setting.shape[0] if setting.dim() == 2 else 1
    wrong = batch is not None and leading not in (1, batch)
    if setting.dim() not in (1, 2) or setting.shape[-1] != kv_heads or wrong:
        raise InputError(
            f"{name} has shape {tuple(setting.shape)} for {kv_heads} kv heads",
            where=_where(site, name),
            fix="[G] or [B, G]",
        )


def _where(site: str, name: str) -> str:
    return f"{site or 'lamp operator'}, argument {name}"


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
