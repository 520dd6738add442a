"""Decode steps call attention over the same planes again and again: what such a call hands to the core is kept, and
only what differs from step to step is filled in. To check and fill in everything takes longer than a short context.

Kept per plane of keys and guard state, while both live; every call makes sure that all tensors are those it was made
for.
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
STATE = 9
"""Of the guard."""
SHOWN = ("mask", "bias", "sinks", "start", "lengths", "table")
"""The arguments behind those: what is seen, which may be other tensors in every step."""
_known: dict[tuple[int, int], _Kept] = {}


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

    __slots__ = ("call", "given", "options", "out", "query", "shown", "static")

    def __init__(
        self, q: Tensor, args: tuple[Any, ...], options: Mapping[str, Any], call: Any, out: Tensor,
        at_end: Callable[[Any], object],
    ) -> None:  # fmt: skip
        """``at_end`` is called when the planes or the guard's state are gone; nothing of it is left with the other, of
        which a slot's pages outlive many states."""
        self.static = tuple(
            None if x is None else _Tensor(x, at_end if at in (0, STATE) else None)
            for at, x in enumerate(args[:STATIC])
        )
        self.query, self.shown = _like(q), [_like(x) for x in args[STATIC:]]
        self.given = [(name, at) for at, name in enumerate(SHOWN, STATIC) if args[at] is not None]
        self.options, self.call, self.out = dict(options), bytes(call), tuple(out.shape)

    def holds(self, q: Tensor, args: tuple[Any, ...], options: Mapping[str, Any]) -> bool:
        """Whether this call is that one again, but for the numbers in the query and in what is seen."""
        for was, x in zip(self.static, args, strict=False):
            if was is not x and (was is None or not was.holds(x)):
                return False
        return (
            _like(q) == self.query
            and all(_like(x) == was for x, was in zip(args[STATIC:], self.shown, strict=True))
            and options == self.options
        )


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

    _known[key] = _Kept(q, args, options, call, out, at_end)


def attend(q: Tensor, args: tuple[Any, ...], options: Mapping[str, Any]) -> Tensor | None:
    """The output ``[B, H, S, Dv]``, or None where there was no such call before; arguments as of ``keep``."""
    kept = _known.get((id(args[0]), id(args[STATE])))
    if kept is None or not kept.holds(q, args, options):
        return None
    call = _library.Attend.from_buffer_copy(kept.call)
    out = q.new_empty(kept.out)
    call.q, call.out, call.threads = q.data_ptr(), out.data_ptr(), torch.get_num_threads()
    for name, at in kept.given:
        setattr(call, name, args[at].data_ptr())
    return None if _library.load().lamp_attend(_library.pointer(call)) else out
