"""One layer of a slot cache: a pool of pages that all slots draw from, and guard state per slot."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lamp_compile.errors import CacheError
from lamp_compile.runtime import checks, guard, prompt
from lamp_compile.runtime import fused_ops as _fused_ops  # noqa: F401  (registers torch.ops.lamp.append)
from lamp_compile.runtime.cache_layers import LayerShape, LayerSpec, NestedLayer
from lamp_compile.runtime.growable_layer import ordinary_tensors
from lamp_compile.runtime.plane_handle import PlaneHandle
from lamp_compile.runtime.slot_table import SlotRows


class SlotHandle(PlaneHandle):
    """Keys or values of a batch of slots. They are read by attention only."""

    __slots__ = ()

    def dequantize(self) -> Tensor:
        """Not from pages.

        Raises:
            CacheError: Always.
        """
        raise CacheError(
            "keys or values of a slot cache were asked for as floats",
            where=self.layer.name,
            fix="a model that LAMP's attention serves, outside lamp_compile.disable(); fast.lamp.cache() otherwise",
        )


class SlotLayer(NestedLayer):
    """Planes ``[1, G, pages, ...]`` of all slots, guard state ``[slots, G, 4]`` and statistics ``[slots, G, 7]``.

    Args:
        spec: As for ``NestedLayer``.
        shape: Sizes of keys and values.
        rows: The slots, shared by all layers.
        opens: It is the first layer of a step.
        commits: It is the last layer of a step.

    Raises:
        CacheError: The compiled model's settings are of another size or device.
    """

    is_croppable = False

    def __init__(self, spec: LayerSpec, shape: LayerShape, rows: SlotRows, opens: bool, commits: bool) -> None:
        super().__init__(spec, rows.table.width * rows.tile)
        self.rows, self.opens, self.commits = rows, opens, commits
        self.dtype, self.device = shape.dtype, shape.device
        self.batch_size, self.num_heads = rows.count, shape.kv_heads
        self.k_head_dim, self.v_head_dim = shape.head_dim, shape.value_dim
        self._check_device()
        with ordinary_tensors():
            pool = self._allocate(1, shape.kv_heads, rows.table.pages * rows.tile)
            pool["state"] = guard.new_state(rows.count, shape.kv_heads, self.device)
            pool["stats"] = guard.new_stats(rows.count, shape.kv_heads, self.device)
        self._install(pool)
        self.is_initialized = True

    def of(self, rows: SlotRows) -> SlotLayer:
        """This layer as a batch of one slot sees it: the same pool, that slot's state."""
        assert rows.slot is not None
        view = object.__new__(type(self))
        view.__dict__.update(self.__dict__)  # as copy.copy, which takes ten times as long
        view.rows, view.batch_size = rows, rows.count
        with ordinary_tensors():
            view.state = self.state[rows.slot : rows.slot + 1]
            view.stats = self.stats[rows.slot : rows.slot + 1]
        return view

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[PlaneHandle, PlaneHandle]:
        """Store new rows ``[B, G, n, D]`` in the slots' pages; gives back handles of all keys and values.

        Raises:
            CacheError: Another batch or head count than the slots', or no pages left for the rows.
        """
        self._check_rows(key_states, value_states)
        count, rows = int(key_states.shape[-2]), self.rows
        if self.opens:
            rows.open(count)
        self._append(key_states, value_states, rows.positions, rows.block_table)
        compiling = torch.compiler.is_compiling()
        fresh = not compiling and prompt.is_one(self, key_states, value_states, rows.empty)
        if self.commits:
            rows.commit(count)
        return self._handles(SlotHandle, key_states, value_states, fresh)

    def _check_rows(self, key_states: Tensor, value_states: Tensor) -> None:
        checks.keys_and_values(self.name, key_states, value_states)
        got = (*key_states.shape[:2], key_states.shape[3], value_states.shape[3])
        if got != (self.batch_size, self.num_heads, self.k_head_dim, self.v_head_dim):
            raise CacheError(
                f"{got[0]} sequences with {got[1]} kv heads, D {got[2]} and {got[3]} came to {self.batch_size} "
                f"slots with {self.num_heads} kv heads, D {self.k_head_dim} and {self.v_head_dim}",
                where=self.name,
                fix="one row per slot, or cache.view(slot) for a single sequence",
            )

    def attend(
        self, q: Tensor, mask: Tensor | None, bias: Tensor | None, sinks: Tensor | None,
        *, causal: str, window: int, scale: float, softcap: float,
    ) -> Tensor:  # fmt: skip
        """Attention of q ``[B, H, S, D]`` over each slot's pages -> ``[B, H, S, Dv]``; the guard's state is written
        back in place. A slot outside the step gives 0 and keeps its state.

        Raises:
            CacheError: A mask came: what a slot may see are its own tokens.
        """
        if mask is not None or bias is not None:
            raise CacheError(
                "a mask came with a slot cache", where=self.name, fix="leave attention_mask out; slots need no padding"
            )
        seen = (None, None, sinks, None, self.rows.live, self.rows.block_table)
        return self._attend(q, seen, causal=causal, window=window, scale=scale, softcap=softcap)

    def get_seq_length(self) -> Tensor:
        """Tokens held, 0-d, of the one slot.

        Raises:
            CacheError: These are several slots.
        """
        if self.rows.slot is None:
            raise CacheError(
                "slots hold sequences of different lengths",
                where="SlotCache.get_seq_length",
                fix="cache.lengths, cache.length(slot), or cache.view(slot).get_seq_length()",
            )
        return self.rows.lengths[0]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """No mask is as wide as these keys: see ``SlotView.get_mask_sizes``."""
        return 0, 0
