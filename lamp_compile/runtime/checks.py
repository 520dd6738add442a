"""Checks of the operators' tensors: shapes, dtypes and devices, before anything is computed. Host work only, no
synchronisation."""

from __future__ import annotations

import torch
from torch import Tensor

from lamp_compile.errors import InputError
from lamp_compile.runtime.arguments import CAUSAL

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


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
    if window and not causal:
        raise InputError(
            f"window={window} without causal", where=_where(site, "window"), fix="causal='top_left' or 'bottom_right'"
        )


def heads_of_setting(site: str, name: str, setting: Tensor, kv_heads: int) -> None:
    """Raise InputError unless tau, floor or budget is ``[G]`` or ``[B, G]``."""
    if setting.dim() not in (1, 2) or setting.shape[-1] != kv_heads:
        raise InputError(
            f"{name} has shape {tuple(setting.shape)} for {kv_heads} kv heads",
            where=_where(site, name),
            fix="[G] or [B, G]",
        )


def _where(site: str, name: str) -> str:
    return f"{site or 'lamp operator'}, argument {name}"


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
