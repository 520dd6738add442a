"""What every layer of our cache has in common: tensors that belong to sequences, follow every operation, and grow.

All have static addresses, so that a decode step that writes into them can be captured in a CUDA graph.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from transformers.cache_utils import StaticLayer

from lamp_compile.errors import CacheError
from lamp_compile.runtime import capacity, layout
from lamp_compile.runtime.allocation import allocate, zero

KEPT_FOR = {"state": "guard", "stats": "guard", **dict.fromkeys(("summary", "history", "trust"), "network")}
"""Per-sequence tensors that are no keys or values, and what they are kept for."""


def rounded_capacity(keys: int, tile: int = layout.TILE) -> int:
    """Keys to allocate for ``keys`` keys: whole tiles, few different sizes."""
    return capacity.rounded_capacity(keys, tile)


def ordinary_tensors() -> AbstractContextManager[None]:
    """Tensors made within can be changed in place anywhere, also when ``torch.inference_mode`` is on around it."""
    if torch.compiler.is_compiling() or not torch.is_inference_mode_enabled():
        return nullcontext()
    return torch.inference_mode(False)


class GrowableLayer(StaticLayer):  # type: ignore[misc]
    """Per-sequence tensors that follow every cache operation, and grow. Subclasses name them and say how to widen
    them."""

    is_compileable = True
    is_sliding = False
    is_croppable = True
    per_sequence: tuple[str, ...] = ()
    max_cache_len: int
    cumulative_length: Tensor

    def __init__(self, capacity: int, name: str) -> None:
        with ordinary_tensors():
            super().__init__(max_cache_len=capacity)
        self.name = name
        self.batch_size = -1
        # Upper bound of the length, kept on the host: growth can be decided without asking the device at each step.
        self._longest = 0

    def _allocate(self, batch: int, kv_heads: int, capacity: int) -> dict[str, Tensor]:
        """Fresh per-sequence tensors."""
        raise NotImplementedError

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate for the batch, heads and sizes of these keys ``[B, G, n, D]`` and values ``[B, G, n, Dv]``."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.batch_size, self.num_heads = key_states.shape[:2]
        self.k_head_dim, self.v_head_dim = key_states.shape[-1], value_states.shape[-1]
        self._check_device()
        with ordinary_tensors():
            if self.cumulative_length.device != self.device:
                # Made there: nothing is held yet, and a copy from the host would wait for all that was launched.
                self.cumulative_length = torch.zeros((), dtype=self.cumulative_length.dtype, device=self.device)
            self._install(self._allocate(self.batch_size, self.num_heads, self.max_cache_len))
        if not torch.compiler.is_compiling():
            torch._dynamo.mark_static_address(self.cumulative_length)
        self.is_initialized = True

    def _check_device(self) -> None:
        """Raise where something the layer needs is elsewhere."""

    def _install(self, tensors: dict[str, Tensor]) -> None:
        compiling = torch.compiler.is_compiling()
        for name, tensor in tensors.items():
            setattr(self, name, tensor)
            if not compiling:
                torch._dynamo.mark_static_address(tensor)

    def admit(self, key_states: Tensor, value_states: Tensor) -> int:
        """Make ready for new rows; gives back how many. Nothing is overwritten before everything is checked.

        Raises:
            CacheError: Another batch size than the rows held, or more rows than a captured graph has room for.
        """
        rows = int(key_states.shape[-2])
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if key_states.shape[0] != self.batch_size:
            self._change_batch(key_states, value_states)
        if torch.compiler.is_compiling():
            if rows > self.max_cache_len:
                raise CacheError(
                    f"{rows} new tokens do not fit into a cache of {self.max_cache_len}",
                    where=self.name,
                    fix="call cache.ensure_capacity(tokens) before the compiled call",
                )
            self._longest = self.max_cache_len  # the graph does not count: the next eager call reads the length
            return rows
        self._longest += rows
        if self._longest > self.max_cache_len:
            self._longest = int(self.cumulative_length) + rows
            if self._longest > self.max_cache_len:
                self.ensure_capacity(rounded_capacity(self._longest))
        return rows

    def _change_batch(self, key_states: Tensor, value_states: Tensor) -> None:
        if torch.compiler.is_compiling() or int(self.cumulative_length):
            raise CacheError(
                f"the cache holds {self.batch_size} sequences and {key_states.shape[0]} came",
                where=self.name,
                fix="one cache per batch, or cache.reset(), batch_select_indices(...), batch_repeat_interleave(...)",
            )
        self.lazy_initialization(key_states, value_states)

    def ensure_capacity(self, keys: int) -> None:
        """Grow to hold ``keys`` keys; contents are kept. The tensors move, so a compiled graph is made anew for the
        new size.

        Raises:
            CacheError: There was not enough memory. The layer is as it was.
        """
        wider = allocate(
            lambda: self.widened(keys),
            f"growing from {self.max_cache_len} to {rounded_capacity(keys)} tokens",
            where=self.name,
            fix="a cache of the final size from the start, fast.lamp.cache(tokens); the cache is as it was",
        )
        self.widen(keys, wider)

    def exceeds(self, rows: int) -> bool:
        """Whether new rows need growth. Asks the device only where the host's upper bound of the length says they
        might.

        Raises:
            CacheError: A captured step went on past the end: rows were lost.
        """
        if self._longest + rows <= self.max_cache_len:
            return False
        held = int(self.cumulative_length)
        if held > self.max_cache_len:
            raise CacheError(
                f"{held} tokens went into a cache of {self.max_cache_len}: a compiled step cannot grow it, "
                "and what came last is lost",
                where=self.name,
                fix="cache.ensure_capacity(tokens) ahead of the loop, and cache.reset() or crop(...) now",
            )
        return held + rows > self.max_cache_len

    def widened(self, keys: int) -> dict[str, Tensor]:
        """Copies of the layer's tensors with room for ``keys`` keys, for ``widen``; none if nothing is held."""
        if keys <= self.max_cache_len or not self.is_initialized:
            return {}
        with ordinary_tensors():
            wider = self._allocate(self.batch_size, self.num_heads, rounded_capacity(keys))
        for name, tensor in wider.items():
            old = getattr(self, name)
            if old.shape == tensor.shape:
                tensor.copy_(old)
            else:
                tensor[:, :, : old.shape[2]] = old
        return wider

    def widen(self, keys: int, wider: dict[str, Tensor]) -> None:
        """Take over what ``widened(keys)`` made."""
        if keys > self.max_cache_len:
            self.max_cache_len = rounded_capacity(keys)
            self._install(wider)

    def host_marks(self) -> tuple[int, ...]:
        """What the host counts, to be undone by ``set_host_marks``."""
        return (self._longest,)

    def set_host_marks(self, marks: tuple[int, ...]) -> None:
        """Undo what was counted since ``host_marks()``."""
        (self._longest,) = marks

    def reset(self) -> None:
        """Forget all sequences; the memory and its addresses stay."""
        zero(self.of_sequences())
        self.forget()

    def of_sequences(self) -> list[Tensor]:
        """The tensors that a reset zeroes."""
        held = [getattr(self, name) for name in self.per_sequence] if self.is_initialized else []
        return [*held, self.cumulative_length]

    def forget(self) -> None:
        """What the host counts, at a reset."""
        self._longest = 0

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest tokens: a negative number counts those to remove, a positive one is the length to keep."""
        count = int(tokens_to_remove)
        if count > 0:
            self.cumulative_length.clamp_(max=count)
        elif count < 0:
            self.cumulative_length.sub_(-count).clamp_(min=0)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Sequence i becomes what sequence ``beam_idx[i]`` was, in place.

        Raises:
            CacheError: There are more or fewer indices than sequences, or others (on a GPU nobody waits to see).
        """
        if not self.is_initialized:
            return
        integers = beam_idx.dtype in (torch.int64, torch.int32) and beam_idx.shape == (self.batch_size,)
        if not integers or (
            beam_idx.device.type == "cpu" and not set(beam_idx.tolist()) <= set(range(self.batch_size))
        ):
            given = beam_idx.tolist() if beam_idx.numel() <= 16 else f"{beam_idx.dtype} {tuple(beam_idx.shape)}"
            raise CacheError(
                f"sequences {given} of a cache that holds {self.batch_size}",
                where="reorder_cache",
                fix="an index for each sequence; batch_select_indices keeps fewer",
            )
        for name in self.per_sequence:
            tensor = getattr(self, name)
            tensor.copy_(tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each sequence ``repeats`` times in a row."""
        if self.is_initialized:
            with ordinary_tensors():
                repeated = {name: getattr(self, name).repeat_interleave(repeats, dim=0) for name in self.per_sequence}
            self._install(repeated)
            self.batch_size *= repeats

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences ``indices`` only."""
        if self.is_initialized:
            with ordinary_tensors():
                kept = {name: getattr(self, name)[indices].contiguous() for name in self.per_sequence}
            self._install(kept)
            self.batch_size = int(getattr(self, self.per_sequence[0]).shape[0])

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values, scales included."""
        if not self.is_initialized:
            return 0
        tensors = [getattr(self, name) for name in self.per_sequence if name not in KEPT_FOR]
        return sum(t.numel() * t.element_size() for t in tensors)
