"""Which pages belong to which slot: device tensors that all layers share, and a free list on the host.

A slot holds one sequence at a time. A page is one storage tile of every layer's pool; sequences grow by being given
pages, and finish by giving them back. No plane byte moves, and no address changes.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lamp_compile.errors import CacheError
from lamp_compile.runtime import layout
from lamp_compile.runtime.growable_layer import ordinary_tensors

SHARED = ("block_table", "lengths", "running", "positions", "live")


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on a device, without waiting for what the device is at."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


class SlotTable:
    """Pages and lengths of all slots.

    Attributes:
        block_table: int32 ``[slots, width]``; a slot's pages in order, -1 where there is none.
        lengths: int64 ``[slots]``; tokens held.
        running: bool ``[slots]``; whether the slot takes part in steps of the whole batch, once it holds tokens.
        positions: int64 ``[slots]``; of the step at hand: where the first new row goes, -1 = nowhere.
        live: int64 ``[slots]``; of the step at hand: tokens to attend to, 0 = none.
        tile: Tokens per page.
        pages: Pages there are.
    """

    block_table: Tensor
    lengths: Tensor
    running: Tensor
    positions: Tensor
    live: Tensor

    def __init__(self, slots: int, pages: int, width: int, tile: int, device: torch.device) -> None:
        with ordinary_tensors():
            self.block_table = torch.full((slots, width), -1, dtype=torch.int32, device=device)
            self.lengths = torch.zeros(slots, dtype=torch.int64, device=device)
            self.running = torch.zeros(slots, dtype=torch.bool, device=device)
            self.positions = torch.full((slots,), -1, dtype=torch.int64, device=device)
            self.live = torch.zeros(slots, dtype=torch.int64, device=device)
        for name in SHARED:
            torch._dynamo.mark_static_address(getattr(self, name))
        self.slots, self.pages, self.width, self.tile = slots, pages, width, tile
        self.admissions = [0] * slots
        self.filled = [False] * slots
        """Whether a slot was given tokens since it was admitted, as far as forwards of its own go."""
        self._free = list(range(pages))[::-1]
        self._owned: list[list[int] | None] = [None] * slots

    @property
    def free_pages(self) -> int:
        """Pages that belong to no slot."""
        return len(self._free)

    def taken(self) -> list[int]:
        """Slots that hold a sequence, or are kept for one."""
        return [slot for slot, owned in enumerate(self._owned) if owned is not None]

    def room(self, slot: int) -> int:
        """Tokens that the slot's pages hold; 0 for a free slot."""
        return len(self._owned[slot] or ()) * self.tile

    def columns_for(self, tokens: int) -> int:
        """Columns of the block table that so many tokens need, rounded up to a power of two: kernels are compiled for
        few numbers."""
        return min(self.width, 1 << (layout.tiles_for(tokens, self.tile) - 1).bit_length())

    def admit(self, tokens: int) -> int:
        """A free slot with pages for ``tokens`` tokens and a length of 0.

        Raises:
            CacheError: No slot or not enough pages are free, or the table lists fewer. Nothing has changed then.
        """
        free = next((slot for slot, owned in enumerate(self._owned) if owned is None), None)
        if free is None:
            raise CacheError(
                f"all {self.slots} slots are taken", where="SlotCache.admit", fix="cache.free(slot), or more streams"
            )
        self._check({free: tokens})
        self._owned[free] = []
        self.admissions[free] += 1
        self.filled[free] = False
        self.lengths[free].zero_()  # to assign a number would wait for the device
        self.running[free].fill_(True)
        self._give({free: tokens})
        return free

    def ensure(self, tokens: Mapping[int, int]) -> None:
        """Give slots the pages they lack for so many tokens in all; all of them, or none.

        Raises:
            CacheError: As ``admit``, or a slot holds no sequence.
        """
        for slot in tokens:
            self.check_taken(slot)
        self._check(tokens)
        self._give(tokens)

    def free(self, slot: int) -> None:
        """Take a slot's pages back; what is in them stays until another sequence writes there.

        Raises:
            CacheError: It holds no sequence.
        """
        self.check_taken(slot)
        self._free.extend(reversed(self._owned[slot] or ()))
        self._owned[slot] = None
        self.block_table[slot].fill_(-1)
        self.lengths[slot].zero_()
        self.running[slot].fill_(False)

    def check_taken(self, slot: int) -> None:
        """Raise CacheError unless the slot holds a sequence."""
        if not 0 <= slot < self.slots or self._owned[slot] is None:
            raise CacheError(
                f"slot {slot} holds no sequence",
                where="SlotCache",
                fix=f"slot = cache.admit(tokens); taken are {self.taken() or 'none'}",
            )

    def _lacking(self, slot: int, tokens: int) -> int:
        return max(0, layout.tiles_for(tokens, self.tile) - len(self._owned[slot] or ()))

    def _check(self, tokens: Mapping[int, int]) -> None:
        for slot, count in tokens.items():
            if count > self.width * self.tile:
                raise CacheError(
                    f"{count} tokens in one sequence, and a slot lists pages for {self.width * self.tile}",
                    where=f"SlotCache, slot {slot}",
                    fix="fast.lamp.slots(max_length=...)",
                )
        lacking = sum(self._lacking(slot, count) for slot, count in tokens.items())
        if lacking > len(self._free):
            raise CacheError(
                f"{lacking} more pages of {self.tile} tokens are needed, {len(self._free)} of {self.pages} are free",
                where=f"SlotCache, {'slots' if len(tokens) > 1 else 'slot'} {', '.join(map(str, tokens))}",
                fix="cache.free(slot) of a finished sequence, or fast.lamp.slots(tokens=...) with more tokens",
            )

    def _give(self, tokens: Mapping[int, int]) -> None:
        for slot, count in tokens.items():
            owned = self._owned[slot]
            assert owned is not None
            new = [self._free.pop() for _ in range(self._lacking(slot, count))]
            if new:
                listed = upload(torch.tensor(new, dtype=torch.int32), self.block_table.device)
                self.block_table[slot, len(owned) : len(owned) + len(new)] = listed
                owned.extend(new)


class SlotRows:
    """The part of a ``SlotTable`` that one batch steps through: all slots, or one. Tensors are the table's own.

    A step is ``open(rows)``, which says where rows go and what is live, and ``commit(rows)`` after the last layer. A
    forward that fails in between leaves the lengths as they were.

    Args:
        table: Of all slots.
        slot: The one; None for all.
        upto: The one slot holds so many tokens at most, and has pages for them; None: pages are handed out as needed.
    """

    block_table: Tensor
    lengths: Tensor
    running: Tensor
    positions: Tensor
    live: Tensor

    def __init__(self, table: SlotTable, slot: int | None = None, upto: int | None = None) -> None:
        self.table, self.slot, self.upto = table, slot, upto
        self.count = table.slots if slot is None else 1
        self.tile = table.tile
        if slot is not None:
            table.check_taken(slot)
        self._admission = 0 if slot is None else table.admissions[slot]
        self.empty = False
        """Of the step at hand, outside graphs: the one slot held nothing before it."""
        with ordinary_tensors():
            for name in SHARED:
                tensor = getattr(table, name)
                setattr(self, name, tensor if slot is None else tensor[slot : slot + 1])
            if upto is not None:  # attention is cut for as many tokens as the table lists
                self.block_table = self.block_table[:, : table.columns_for(upto)]

    def open(self, rows: int) -> None:
        """Begin a step of ``rows`` new tokens per sequence. Outside a compiled graph, slots get the pages they lack;
        within one, a row without a page goes nowhere (``SlotCache.length`` tells).

        Raises:
            CacheError: There are no pages for it, or the slot's sequence is gone.
        """
        taking = self._taking()
        if not torch.compiler.is_compiling():
            self._make_room(rows, taking)
            self.empty = self.slot is not None and not self.table.filled[self.slot]
        self.positions.copy_(torch.where(taking, self.lengths, -1))
        room = (self.block_table >= 0).sum(-1) * self.tile
        self.live.copy_(torch.where(taking, torch.minimum(self.lengths + rows, room), 0))

    def commit(self, rows: int) -> None:
        """Count the step's tokens."""
        if self.slot is not None:  # also by a graph, which does so at every call
            self.table.filled[self.slot] = True
        self.lengths.add_((self.positions >= 0) * rows)

    def check_current(self) -> None:
        """Raise CacheError if another sequence has the slot by now."""
        if self.slot is None:
            return
        self.table.check_taken(self.slot)
        if self.table.admissions[self.slot] != self._admission:
            raise CacheError(
                f"slot {self.slot} was freed and holds another sequence",
                where="SlotCache.view",
                fix="cache.view(slot) anew after cache.admit(tokens)",
            )

    def _taking(self) -> Tensor:
        """Which sequences take the step, bool ``[count]``: the one; of all, those that run and were filled."""
        if self.slot is not None:
            return torch.ones_like(self.running)
        return self.running & (self.lengths > 0)

    def _make_room(self, rows: int, taking: Tensor) -> None:
        self.check_current()
        if self.upto is not None:
            return
        first = 0 if self.slot is None else self.slot
        wanted = {
            first + index: int(held) + rows
            for index, (held, takes) in enumerate(zip(self.lengths.tolist(), taking.tolist(), strict=True))
            if takes
        }
        self.table.ensure(wanted)
