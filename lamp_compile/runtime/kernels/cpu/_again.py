"""Decode steps store rows in and attend over the same planes again and again: what such a call hands to the core is
kept, and only what differs from step to step is filled in. To check and fill in everything takes longer than a short
context.

Kept per plane of keys, and attention per guard state, while they live; every call makes sure that all tensors are those
it was made for.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from lamp_compile.runtime.kernels.cpu import _library

STATIC = 12
"""Arguments of ``lamp::fused_attention`` behind q that stay: planes, tau, floor, budget, state, stats, balance."""
V_HIGH, STATE = 3, 9
"""The high plane of the values, and the state of the guard, among them."""
SHOWN = ("mask", "bias", "sinks", "start", "lengths", "table")
"""The arguments behind those: what is seen, which may be other tensors in every step."""
_known: dict[tuple[int, int], _Kept] = {}
_stored: dict[int, _Kept] = {}


def _like(x: Tensor | None) -> Any:
    return None if x is None else (x.shape, x.stride(), x.dtype, x.is_cpu)


class _Tensor:
    """A tensor that must still be what it was."""

    __slots__ = ("dtype", "given", "place", "shape", "steps")

    def __init__(self, x: Tensor, at_end: Callable[[Any], object] | None = None) -> None:
        self.given, self.place, self.dtype = weakref.ref(x, at_end), x.data_ptr(), x.dtype
        self.shape, self.steps = x.shape, x.stride()

    def holds(self, x: Any) -> bool:
        same = self.given() is x
        return (
            same
            and x.data_ptr() == self.place
            and bool(x.shape == self.shape)
            and x.stride() == self.steps
            and x.dtype is self.dtype
        )


class _Kept:
    """One call: its tensors, its options, and the structure that the core was given."""

    __slots__ = ("call", "given", "moving", "options", "shown", "static")

    def __init__(
        self, moving: dict[str, Tensor], static: tuple[Tensor | None, ...], shown: dict[str, Tensor | None],
        options: Any, call: Any, at_end: Callable[[Any], object], owners: tuple[int, ...],
    ) -> None:  # fmt: skip
        """Of ``moving`` and ``shown`` other tensors may come in every step, with other numbers. ``at_end`` is called
        when an owner among ``static`` is gone, the planes or the guard's state; nothing of it is left with the other,
        of which a slot's pages outlive many states."""
        self.static = tuple(
            None if x is None else _Tensor(x, at_end if at in owners else None) for at, x in enumerate(static)
        )
        self.moving, self.shown = [_like(x) for x in moving.values()], [_like(x) for x in shown.values()]
        self.given = [name for name, x in (*moving.items(), *shown.items()) if x is not None]
        self.options, self.call = options, bytes(call)

    def holds(
        self, moving: tuple[Tensor, ...], static: tuple[Any, ...], shown: tuple[Any, ...], options: Any
    ) -> bool:  # fmt: skip
        """Whether this call is that one again, but for the numbers in what moves and in what is shown."""
        for was, x in zip(self.static, static, strict=True):
            if was is not x and (was is None or not was.holds(x)):
                return False
        return (
            all(_like(x) == was for x, was in zip(moving, self.moving, strict=True))
            and all(_like(x) == was for x, was in zip(shown, self.shown, strict=True))
            and bool(options == self.options)
        )

    def filled(self, structure: type[Any], tensors: tuple[Tensor | None, ...]) -> Any:
        """What the core is given with these tensors, in the order of ``moving`` and ``shown``."""
        call = structure.from_buffer_copy(self.call)
        for name, x in zip(self.given, (x for x in tensors if x is not None), strict=True):
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


def keep(q: Tensor, args: tuple[Any, ...], options: Mapping[str, Any], call: Any, out: Tensor) -> None:
    """Keep a call that has passed all checks and worked.

    Args:
        q: ``[B, H, S, D]``.
        args: The other tensors of ``lamp::fused_attention``, in order.
        options: Its keyword arguments.
        call: What the core was given.
        out: What it wrote.
    """
    if not _as_they_are(args, q.shape[1]):
        return
    key = (id(args[0]), id(args[STATE]))
    forget = _known.pop

    def at_end(_: Any) -> None:
        forget(key, None)

    shown = dict(zip(SHOWN, args[STATIC:], strict=True))
    _known[key] = _Kept({"q": q}, args[:STATIC], shown, dict(options), call, at_end, (0, STATE))


def attend(q: Tensor, args: tuple[Any, ...], options: Mapping[str, Any]) -> Tensor | None:
    """The output ``[B, H, S, Dv]``, or None where there was no such call before; arguments as of ``keep``."""
    kept = _known.get((id(args[0]), id(args[STATE])))
    if kept is None or not kept.holds((q,), args[:STATIC], args[STATIC:], options):
        return None
    call = kept.filled(_library.Attend, (q, *args[STATIC:]))
    out = q.new_empty(*q.shape[:3], 2 * args[V_HIGH].shape[3])
    call.out = out.data_ptr()
    return None if _library.load().lamp_attend(_library.pointer(call)) else out


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
    key, forget = id(planes[0]), _stored.pop

    def at_end(_: Any) -> None:
        forget(key, None)

    shown = {"positions": positions, "table": table}
    _stored[key] = _Kept({"k": k, "v": v}, (*planes, balance), shown, rotation, call, at_end, (0,))


def append(
    k: Tensor, v: Tensor, planes: tuple[Tensor, ...], balance: Tensor | None, positions: Tensor, table: Tensor | None,
    rotation: str,
) -> bool:  # fmt: skip
    """Whether k ``[B, G, 1, D]`` and v ``[B, G, 1, Dv]`` are stored now: there was such a call before, and they fit."""
    kept = _stored.get(id(planes[0]))
    if kept is None or not kept.holds((k, v), (*planes, balance), (positions, table), rotation):
        return False
    call = kept.filled(_library.Append, (k, v, positions, table))
    return not _library.load().lamp_append(_library.pointer(call))
