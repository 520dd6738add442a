"""A cache for many sequences of different lengths, which come, grow, finish and are replaced while one compiled
decode step goes on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor

from lamp_compile.errors import CacheError, OptionError
from lamp_compile.runtime import cache_argument, layout
from lamp_compile.runtime.allocation import allocate, zero
from lamp_compile.runtime.cache_layers import LayerShape
from lamp_compile.runtime.growable_layer import ordinary_tensors
from lamp_compile.runtime.kv_cache import CacheSpec, NestedCache
from lamp_compile.runtime.slot_layer import SlotLayer
from lamp_compile.runtime.slot_table import SlotRows, SlotTable


class SlotView(NestedCache):
    """A batch of slots as a model's forward takes it: all of a ``SlotCache``, or one of them (``cache.view(slot)``).

    It needs no mask and no position ids: both follow from the slots' lengths.
    """

    layers: list[SlotLayer]
    watched = False

    def __init__(self, spec: CacheSpec, rows: SlotRows, layers: list[SlotLayer]) -> None:
        super().__init__(spec, layers=layers)
        self.rows = rows

    @property
    def lengths(self) -> Tensor:
        """Tokens held, int64 ``[slots]``, on the device."""
        return self.rows.lengths

    def next_positions(self, tokens: int) -> Tensor:
        """Position ids ``[slots, tokens]`` of the next tokens."""
        return self.lengths[:, None] + torch.arange(tokens, device=self.lengths.device)

    def check(self, spec: CacheSpec, batch: int | None = None) -> None:
        """Raise unless this cache belongs to the model of ``spec`` and has ``batch`` slots.

        Raises:
            CacheError: It is another model's cache, has another number of slots, or the slot's sequence is gone.
        """
        super().check(spec)
        self.rows.check_current()
        if batch is not None and batch != self.rows.count:
            raise CacheError(
                f"{batch} sequences came to {self.rows.count} slot{'s' if self.rows.count > 1 else ''}",
                where=cache_argument.NAME,
                fix="one row per slot, or cache.view(slot) for a single sequence",
            )

    def _make_room(self, layer_idx: int, rows: int) -> None:
        """The first layer asks the table."""

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """(0, 0): the mask function takes it as "these keys need no mask" (length, causality and window say it all)."""
        return 0, 0

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Of use for masks only, so none here."""
        return 0

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest tokens of one slot: a negative number counts those to remove, a positive one is the length
        to keep. The pages stay with the slot.

        Raises:
            CacheError: These are several slots.
        """
        if self.rows.slot is None:
            _refuse("crop", "cache.view(slot).crop(tokens)")
        count = int(tokens_to_remove)
        if count > 0:
            self.lengths.clamp_(max=count)
        elif count < 0:
            self.lengths.sub_(-count).clamp_(min=0)

    def ensure_capacity(self, keys: int) -> None:
        """Not for slots.

        Raises:
            CacheError: Always.
        """
        _refuse("generate or ensure_capacity", "fast.lamp.generate_many(prompts), or cache.ensure(slot, tokens)")

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Not for slots.

        Raises:
            CacheError: Always.
        """
        _refuse("reorder_cache", "fast.lamp.cache() for beams")

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Not for slots.

        Raises:
            CacheError: Always.
        """
        _refuse("batch_repeat_interleave", "fast.lamp.cache() for beams, or cache.admit(tokens) for each sequence")

    def batch_select_indices(self, indices: Tensor) -> None:
        """Not for slots.

        Raises:
            CacheError: Always.
        """
        _refuse("batch_select_indices", "cache.free(slot) for those to leave out")

    def reset(self) -> None:
        """Not for a part of the slots.

        Raises:
            CacheError: Always.
        """
        _refuse("reset of one slot", "cache.free(slot) and cache.admit(tokens)")

    @property
    def bits_per_value(self) -> float:
        """Allocated bits per key or value element that the pools hold."""
        table = self.rows.table
        values = sum(
            table.pages * table.tile * layer.num_heads * (layer.k_head_dim + layer.v_head_dim) for layer in self.layers
        )
        return self.nbytes * 8 / values


class SlotCache(SlotView):
    """Pages for up to ``streams`` sequences at a time; make one with ``fast.lamp.slots()``.

    Every layer keeps one pool of pages (a page is a storage tile), and all layers share one block table and one tensor
    of lengths. ``admit`` and ``ensure`` hand out pages from a free list on the host, ``free`` takes them back: nothing
    is copied, and no address changes, so that a captured decode step goes on.

    Args:
        spec: What the compiled model's layers need (``fast.lamp.spec``).
        shapes: Sizes of keys and values of every layer.
        streams: Slots, the batch of a decode step.
        tokens: Tokens there is room for in all slots together, rounded up to pages.
        max_length: Longest sequence, rounded up to pages.

    Raises:
        CacheError: A layer keeps float keys and values, layers differ in tile or device, or memory is short.
        OptionError: A size is no whole number above 0.
    """

    def __init__(
        self, spec: CacheSpec, shapes: Sequence[LayerShape], *, streams: int, tokens: int, max_length: int
    ) -> None:
        for name, value in (("streams", streams), ("tokens", tokens), ("max_length", max_length)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise OptionError(f"{name} is {value!r}", where="SlotCache", fix="a whole number above 0")
        tile = _common_tile(spec)
        devices = sorted({str(shape.device) for shape in shapes})
        if len(devices) != 1:
            raise CacheError(
                f"layers on {', '.join(devices)}", where="SlotCache", fix="a model on one device; fast.lamp.cache()"
            )
        pages = layout.tiles_for(tokens, tile)

        def make() -> tuple[SlotRows, list[SlotLayer]]:
            width = min(layout.tiles_for(max_length, tile), pages)
            rows = SlotRows(SlotTable(streams, pages, width, tile, shapes[0].device))
            last = len(shapes) - 1
            return rows, [
                SlotLayer(layer, shape, rows, index == 0, index == last)
                for index, (layer, shape) in enumerate(zip(spec.layers, shapes, strict=True))
                if layer is not None
            ]

        super().__init__(
            spec,
            *allocate(
                make,
                f"{len(shapes)} layers of {pages} pages of {tile} tokens",
                where="SlotCache",
                fix="fewer tokens=...",
            ),
        )
        self._table = self.rows.table
        spec.ledger.watch(self)

    @property
    def capacity(self) -> int:
        """Tokens there is room for, in all slots together."""
        return self._table.pages * self._table.tile

    @property
    def free_tokens(self) -> int:
        """Tokens that the free pages hold."""
        return self._table.free_pages * self._table.tile

    @property
    def max_length(self) -> int:
        """Tokens that one slot can list pages for."""
        return self._table.width * self._table.tile

    @property
    def streams(self) -> int:
        """Slots there are."""
        return self._table.slots

    def taken(self) -> list[int]:
        """Slots that hold a sequence, or are kept for one."""
        return self._table.taken()

    def fits(self, tokens: int) -> bool:
        """Whether ``admit(tokens)`` would succeed now."""
        table = self._table
        pages = layout.tiles_for(tokens, table.tile)
        return pages <= min(table.width, table.free_pages) and len(table.taken()) < table.slots

    def admit(self, tokens: int) -> int:
        """Take a free slot for a new sequence, with pages for ``tokens`` tokens. Its guard state and statistics start
        anew.

        It takes part in steps of the whole batch from its first tokens on, which come by ``cache.view(slot)``.

        Raises:
            CacheError: No slot or not enough pages are free, or the sequence is too long. Nothing has changed then.
        """
        slot = self._table.admit(tokens)
        with ordinary_tensors():
            stats = [layer.stats[slot : slot + 1] for layer in self.layers]
            state = [layer.state[slot : slot + 1] for layer in self.layers]
        # Few launches for all layers together: requests come often.
        self.spec.ledger.retire(zip((layer.name for layer in self.layers), stats, strict=True))
        zero([*stats, *state])
        return slot

    def ensure(self, slot: int, tokens: int) -> None:
        """Give a slot pages for ``tokens`` tokens in all. Eager steps do so by themselves; a compiled step cannot.

        Raises:
            CacheError: As ``admit``, or the slot holds no sequence.
        """
        self._table.ensure({slot: tokens})

    def free(self, slot: int) -> None:
        """The slot's sequence is finished: its pages and the slot are free for another.

        Raises:
            CacheError: The slot holds no sequence.
        """
        self._table.free(slot)

    def pause(self, slot: int) -> None:
        """Leave a slot out of steps of the whole batch, such as between the chunks of its prefill.

        Raises:
            CacheError: The slot holds no sequence.
        """
        self._table.check_taken(slot)
        self._table.running[slot] = False

    def resume(self, slot: int) -> None:
        """Undo ``pause``.

        Raises:
            CacheError: The slot holds no sequence.
        """
        self._table.check_taken(slot)
        self._table.running[slot] = True

    def view(self, slot: int, upto: int | None = None) -> SlotView:
        """One slot as a batch of one: ``fast(ids, cache=cache.view(slot))`` adds tokens to it alone.

        Args:
            slot: One that was admitted.
            upto: The slot holds so many tokens at most while this view is used, and has pages for them (``admit``,
                ``ensure``). Then no forward waits for the device to say how many it holds; tokens behind are lost, as
                in a compiled step. None reads the device and hands out pages.

        Raises:
            CacheError: The slot holds no sequence, or lacks pages for ``upto`` tokens.
            OptionError: ``upto`` is no whole number above 0.
        """
        if upto is not None:
            if not isinstance(upto, int) or isinstance(upto, bool) or upto < 1:
                raise OptionError(f"upto is {upto!r}", where="SlotCache.view", fix="a whole number above 0")
            self._table.check_taken(slot)
            if self._table.room(slot) < upto:
                raise CacheError(
                    f"slot {slot} has pages for {self._table.room(slot)} tokens, not for {upto}",
                    where="SlotCache.view",
                    fix="cache.ensure(slot, tokens) first",
                )
        rows = SlotRows(self._table, slot, upto)
        return SlotView(self.spec, rows, [layer.of(rows) for layer in self.layers])

    def length(self, slot: int) -> int:
        """Tokens that a slot holds. Reads the device.

        Raises:
            CacheError: The slot holds no sequence, or compiled steps went on without pages (and those tokens are lost).
        """
        self._table.check_taken(slot)
        held = int(self._table.lengths[slot])
        if held > self._table.room(slot):
            raise CacheError(
                f"{held} tokens were stepped through, with pages for {self._table.room(slot)}",
                where=f"SlotCache, slot {slot}",
                fix="cache.ensure(slot, tokens) before a compiled step; cache.free(slot) now",
            )
        return held

    def reset(self) -> None:
        """Free all slots; the memory and its addresses stay."""
        for slot in self.taken():
            self.free(slot)


def _common_tile(spec: CacheSpec) -> int:
    for index, layer in enumerate(spec.layers):
        if layer is None:
            raise CacheError(
                f"layer {index} keeps float keys and values",
                where=f"SlotCache for {spec.model}",
                fix="a plan that applies every site, or fast.lamp.cache() and generate",
            )
    tiles = sorted({layer.plan.tile for layer in spec.layers if layer is not None})
    if len(tiles) != 1:
        raise CacheError(
            f"layers with storage tiles of {' and '.join(map(str, tiles))} keys",
            where=f"SlotCache for {spec.model}",
            fix="one `tile` for all sites of the plan: pages are tiles",
        )
    return tiles[0]


def _refuse(what: str, instead: str) -> NoReturn:
    raise CacheError(f"{what} does not work on a slot cache", where="SlotCache", fix=instead)


__all__ = ["LayerShape", "SlotCache", "SlotView"]
