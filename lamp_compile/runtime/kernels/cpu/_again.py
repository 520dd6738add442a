"""Decode steps store rows in and attend over the same planes again and again: what such a call hands to the core is
kept, and only what differs from step to step is filled in. To check and fill in everything takes longer than a short
context.

Kept per plane of keys, and attention per guard state, while all of its tensors live; every call makes sure that all
are those it was made for. Since that call the whole model has gone through the caches: facts of many tensors are
compared by one hash, because each number kept as an object would be waited for.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from lamp_compile.runtime.kernels.cpu import _library

STATIC = 12
"""Arguments of ``lamp::fused_attention`` behind q that stay: planes, tau, floor, budget, state, stats, balance."""
STATE = 9
"""The state of the guard among them."""
SHOWN = ("mask", "bias", "sinks", "start", "lengths", "table")
"""The arguments behind those: what is seen, which may be other tensors in every step."""
TENSORS = STATIC + len(SHOWN)
_known: dict[tuple[int, int], _Kept] = {}
_stored: dict[int, _Kept] = {}
_settings: dict[tuple[Any, ...], tuple[Any, ...]] = {}

_place, _dense, _steps = Tensor.data_ptr, Tensor.is_contiguous, Tensor.stride
_shape, _dtype, _is_cpu = (attrgetter(name) for name in ("shape", "dtype", "is_cpu"))


def _facts(static: tuple[Tensor | None, ...], moving: tuple[Tensor | None, ...]) -> int:
    """A hash, of 64 bits: of tensors that stay, which they are, where and of what shape; of others shape, steps and
    dtype."""
    still, other = [x for x in static if x is not None], [x for x in moving if x is not None]
    return hash((
        *map(id, static), *map(_place, still), *map(_dense, still), *map(_shape, still),
        *(x is None for x in moving), *map(_shape, other), *map(_steps, other), *map(_dtype, other),
        *map(_is_cpu, other),
    ))  # fmt: skip


class _Kept:
    """One call: facts of its tensors, its settings, and the structure that the core was given, which is used again: two
    threads that attend with the same guard state, or store in the same planes, would be in each other's way anyhow."""

    __slots__ = ("argument", "call", "facts", "given", "settings", "shape", "watched")

    def __init__(
        self, static: tuple[Tensor | None, ...], moving: dict[str, Tensor | None], settings: tuple[Any, ...],
        call: Any, shape: tuple[int, ...], forget: Callable[[Any], object],
    ) -> None:  # fmt: skip
        """``moving``: in every step other tensors may come, with other numbers. ``shape``: of the output. ``forget`` is
        called when one of ``static`` is gone, so that none of another address is taken for it."""
        self.watched = [weakref.ref(x, forget) for x in static if x is not None]
        self.facts, self.shape = _facts(static, tuple(moving.values())), shape
        self.call, self.argument = call, _library.pointer(call)
        self.given = [name if x is not None else "" for name, x in moving.items()]
        self.settings = _settings.setdefault(settings, settings)  # one object for all layers that have the same

    def holds(
        self, static: tuple[Any, ...], moving: tuple[Tensor | None, ...], settings: tuple[Any, ...]
    ) -> bool:  # fmt: skip
        """Whether this call is that one again, but for the numbers in what moves."""
        return settings == self.settings and _facts(static, moving) == self.facts

    def fill(self, moving: tuple[Any, ...]) -> Any:
        """What the core is given with these tensors, to be filled further."""
        call = self.call
        for name, x in zip(self.given, moving, strict=True):
            if name:
                setattr(call, name, x.data_ptr())
        call.threads = torch.get_num_threads()
        return call


def _as_they_are(args: tuple[Any, ...], heads: int) -> bool:
    """Whether the core reads these very tensors. A copy in another dtype lives no longer than its call."""
    settings = [x for x in (*args[6:9], args[11]) if x is not None]
    _, bias, sinks, _, _, table = args[STATIC:]
    return (
        all(x.dtype is torch.float32 and x.is_contiguous() for x in settings)
        and (bias is None or bias.dtype is torch.float32)
        and (sinks is None or (sinks.dtype is torch.float32 and sinks.shape == (heads,) and sinks.is_contiguous()))
        and (table is None or (table.dtype is torch.int32 and table.is_contiguous()))
    )


def keep(q: Tensor, args: tuple[Any, ...], settings: tuple[Any, ...], call: Any, out: Tensor) -> None:
    """Keep a call that has passed all checks and worked.

    Args:
        q: ``[B, H, S, D]``.
        args: The other tensors of ``lamp::fused_attention``, in order.
        settings: What comes behind them.
        call: What the core was given.
        out: What it wrote.
    """
    if not _as_they_are(args, q.shape[1]):
        return
    key, drop = (id(args[0]), id(args[STATE])), _known.pop

    def forget(_: Any) -> None:
        drop(key, None)

    moving = {"q": q, **dict(zip(SHOWN, args[STATIC:], strict=True))}
    _known[key] = _Kept(args[:STATIC], moving, settings, call, tuple(out.shape), forget)


def attend(q: Tensor, args: tuple[Any, ...]) -> Tensor | None:
    """The output ``[B, H, S, Dv]``, or None where there was no such call before. ``args``: the tensors behind the
    query, and the settings."""
    kept = _known.get((id(args[0]), id(args[STATE])))
    moving = (q, *args[STATIC:TENSORS])
    if kept is None or not kept.holds(args[:STATIC], moving, args[TENSORS:]):
        return None
    out = q.new_empty(kept.shape)
    kept.fill(moving).out = out.data_ptr()
    return None if _library.load().lamp_attend(kept.argument) else out


def keep_stored(
    k: Tensor, v: Tensor, planes: tuple[Tensor, ...], balance: Tensor | None, positions: Tensor, table: Tensor | None,
    rotation: str, call: Any,
) -> None:  # fmt: skip
    """Keep a call of ``lamp::append``, of one new token, that has passed all checks and worked; arguments as given,
    and what the core was given."""
    straight = k.stride(-1) == 1 and v.stride(-1) == 1 and v.dtype == k.dtype and k.shape[2] == 1
    dense = balance is None or (balance.dtype is torch.float32 and balance.is_contiguous())
    if not straight or not dense or not (table is None or (table.dtype is torch.int32 and table.is_contiguous())):
        return
    key, drop = id(planes[0]), _stored.pop

    def forget(_: Any) -> None:
        drop(key, None)

    moving = {"k": k, "v": v, "positions": positions, "table": table}
    _stored[key] = _Kept((*planes, balance), moving, (rotation,), call, (), forget)


def append(
    k: Tensor, v: Tensor, planes: tuple[Tensor, ...], balance: Tensor | None, positions: Tensor, table: Tensor | None,
    rotation: str,
) -> bool:  # fmt: skip
    """Whether k ``[B, G, 1, D]`` and v ``[B, G, 1, Dv]`` are stored now: there was such a call before, and they fit."""
    kept = _stored.get(id(planes[0]))
    moving = (k, v, positions, table)
    if kept is None or not kept.holds((*planes, balance), moving, (rotation,)):
        return False
    kept.fill(moving)
    return not _library.load().lamp_append(kept.argument)
