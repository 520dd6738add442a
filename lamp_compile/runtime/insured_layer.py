"""A cache layer with an exact tier: planes for every step, and a copy of keys and values in the host's memory that is
fetched when a head's floor is 2."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lamp_compile.ir import Floor
from lamp_compile.runtime import guard
from lamp_compile.runtime.attend_in_parts import attend_in_parts
from lamp_compile.runtime.cache_layers import NestedLayer
from lamp_compile.runtime.growable_layer import rounded_capacity
from lamp_compile.runtime.host_copy import HostCopy
from lamp_compile.runtime.plane_handle import PlaneHandle

OUTSIDE: Any = torch.compiler.disable(  # type: ignore[no-untyped-call]
    reason="exact_tier 'host' needs eager steps: a graph cannot fetch from the host on demand"
)
"""In a user's own torch.compile a graph break; with fullgraph=True Dynamo raises and gives the reason."""


class InsuredLayer(NestedLayer):
    """``NestedLayer`` for ``exact_tier="host"``. It works outside graphs only: they know neither the host's position
    nor which level comes up.

    Every step asks whether a floor is 2, which waits for a GPU once a layer; a step at floor 2 runs the reference.
    """

    has_exact = True
    copy: HostCopy

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """As of ``NestedLayer``, and the copy."""
        super().lazy_initialization(key_states, value_states)
        self.copy = HostCopy(self.max_cache_len, key_states, value_states)
        self._held = 0

    @OUTSIDE  # type: ignore[untyped-decorator]
    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[PlaneHandle, PlaneHandle]:
        """Quantise new rows into the planes and store them as they are.

        Raises:
            CacheError: See ``admit``.
        """
        handles = super().update(key_states, value_states, *args, **kwargs)
        self.copy.write(key_states, value_states, self._held)
        self._held += int(key_states.shape[-2])
        return handles

    def exact_rows(self) -> tuple[Tensor, Tensor]:
        """Keys ``[B, G, held, D]`` and values as they came, on the model's device."""
        self.spec.ledger.events["exact copies fetched"] += 1
        return self.copy.fetch(self._held)

    @OUTSIDE  # type: ignore[untyped-decorator]
    def _run(self, q: Tensor, seen: tuple[Tensor | None, ...], options: dict[str, Any]) -> Tensor:
        level = torch.maximum(self.state[..., guard.FLOOR], self.controls.floor)
        if not bool((level >= Floor.EXACT).any()):
            return super()._run(q, seen, options)
        hot = (self.controls.tau, self.controls.floor, self.controls.budget, self.state, self.stats)
        out, state, stats = attend_in_parts(
            q, self.planes, hot, (self.balance, *seen), options, exact=self.exact_rows()
        )
        self.state.copy_(state)
        self.stats.copy_(stats)
        return out

    def host_marks(self) -> tuple[int, ...]:
        """What the host counts."""
        return (*super().host_marks(), self._held if self.is_initialized else 0)

    def set_host_marks(self, marks: tuple[int, ...]) -> None:
        """Undo what was counted since ``host_marks()``."""
        super().set_host_marks(marks[:-1])
        self._held = marks[-1]

    def widened(self, keys: int) -> dict[str, Tensor]:
        """As of ``NestedLayer``; the copy grows with ``widen``."""
        wider = super().widened(keys)
        self._wider = self.copy.widened(rounded_capacity(keys)) if wider else None
        return wider

    def widen(self, keys: int, wider: dict[str, Tensor]) -> None:
        """Take over what ``widened(keys)`` made."""
        super().widen(keys, wider)
        if wider and self._wider is not None:
            self.copy, self._wider = self._wider, None

    def forget(self) -> None:
        """What the host counts, at a reset."""
        super().forget()
        self._held = 0

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest tokens; see ``GrowableLayer``."""
        super().crop(tokens_to_remove)
        count = int(tokens_to_remove)
        self._held = min(self._held, count) if count > 0 else max(0, self._held + count)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Sequence i becomes what sequence ``beam_idx[i]`` was."""
        super().reorder_cache(beam_idx)
        if self.is_initialized:
            self.copy.take(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each sequence ``repeats`` times in a row."""
        super().batch_repeat_interleave(repeats)
        if self.is_initialized:
            self.copy.repeat(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences ``indices`` only."""
        super().batch_select_indices(indices)
        if self.is_initialized:
            self.copy.take(torch.arange(self.copy.k.shape[1])[indices.to("cpu")])
