"""Which linear layers a text says may be read in INT8: one layer at a time, then all that were chosen together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from lamp_compile.errors import InputError, OptionError
from lamp_compile.frontends import linears
from lamp_compile.frontends.structure import structural_copy
from lamp_compile.linear_plan import LinearPlan
from lamp_compile.quality.metrics import Comparison

BUDGET = 1e-4
"""Mean KL in nats that all layers together may cost: about as much as the default plan's attention does."""

KEPT_BYTES = 1 << 30
"""Reference logits of all windows are kept up to this size."""


def calibrate(
    model: nn.Module, windows: Tensor, *, budget: float = BUDGET, on_layer: Callable[[str], None] | None = None
) -> tuple[LinearPlan, ...]:
    """Rows for ``lamp_compile.compile(model, linears=rows)``: INT8 where it is measured faster at one row, as long as
    the model's predictions on the text stay within a budget; the output head as any other layer.

    Each layer is put into INT8 alone and its KL measured. Layers enter by KL per weight, least first, while the sum is
    within the budget; then all are measured together, and the costliest leave until the budget holds.

    Args:
        model: A transformers decoder on a CPU, in evaluation mode; it stays as it is.
        windows: Token ids ``[n, T]``; a forward for each layer and window. Some thousand positions are enough.
        budget: Mean KL in nats.
        on_layer: Called with a layer's name once it is measured.

    Raises:
        InputError: No windows of two tokens.
        OptionError: The budget is no number of 0 or more.
    """
    if windows.dim() != 2 or windows.shape[0] < 1 or windows.shape[1] < 2:
        raise InputError(f"windows {tuple(windows.shape)}", where="calibrate", fix="token ids [n, T], T of 2 or more")
    if isinstance(budget, bool) or not isinstance(budget, int | float) or not budget >= 0:
        raise OptionError(f"budget is {budget!r}", where="calibrate", fix="mean KL in nats, 0 or more")
    bench = _Bench(structural_copy(model), windows)
    layers = linears.find(model)
    rows = {name: _row(name, layer, bench, on_layer) for name, layer in layers.items()}
    chosen: list[LinearPlan] = []
    for row in sorted((row for row in rows.values() if row.apply), key=lambda row: _cost(row, layers)):
        if sum(other.kl or 0.0 for other in chosen) + (row.kl or 0.0) <= budget:
            chosen.append(row)
    while chosen and not bench.kl(chosen) <= budget:
        chosen.pop()
    kept = {row.name for row in chosen}
    return tuple(
        replace(row, apply=False, reason=f"{row.reason}; the budget of {budget:.1e} is spent")
        if row.apply and name not in kept
        else row
        for name, row in rows.items()
    )


class _Bench:
    """The KL of a model under rows; reference predictions are kept while they are small, and made anew otherwise."""

    def __init__(self, model: nn.Module, windows: Tensor) -> None:
        self.model, self.windows = model, windows
        self._kept: dict[int, Tensor] = {}

    def _reference(self, index: int) -> Tensor:
        if index in self._kept:
            return self._kept[index]
        logits: Tensor = self.model(input_ids=self.windows[index : index + 1], use_cache=False).logits
        if logits.nbytes * self.windows.shape[0] <= KEPT_BYTES:
            self._kept[index] = logits
        return logits

    @torch.no_grad()
    def kl(self, rows: Sequence[LinearPlan]) -> float:
        """Mean KL(original || rows) in nats."""
        found = Comparison()
        for index in range(self.windows.shape[0]):
            ids = self.windows[index : index + 1]
            reference = self._reference(index)
            with linears.applied(self.model, rows):
                found.add(reference, self.model(input_ids=ids, use_cache=False).logits, ids)
        return found.result().kl


def _row(name: str, layer: nn.Linear, bench: _Bench, on_layer: Callable[[str], None] | None) -> LinearPlan:
    reason = linears.why_not(layer)
    row = LinearPlan(name, False, reason) if reason else linears.speed_row(name, layer)
    if row.apply:
        kl = float(f"{bench.kl([row]):.3g}")
        row = replace(row, kl=kl, reason=f"{row.reason}, KL {kl:.1e} alone")
        if not kl >= 0:  # NaN, or an infinity that cancelled
            row = replace(row, apply=False, kl=None, reason="its KL is no number")
    if on_layer is not None:
        on_layer(name)
    return row


def _cost(row: LinearPlan, layers: dict[str, nn.Linear]) -> float:
    """KL per weight."""
    return (row.kl or 0.0) / layers[row.name].weight.numel()
