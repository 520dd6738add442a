"""How agreement with the original model follows from the estimated error that the controller holds: measured on text,
and drawn together into the ``relation`` of a ``ControlPlan``."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from lamp_compile.errors import InputError
from lamp_compile.quality.metrics import Comparison
from lamp_compile.runtime import cache_argument, guard
from lamp_compile.runtime.kv_cache import NestedLayer

TAUS = (0.0, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
NEAR = 1.05
"""Estimates up to this multiple of the least are those of everything refined."""


@dataclass(frozen=True)
class RelationRow:
    """One tau. Disagreements are shares of positions."""

    tau: float
    estimate: float
    """Relative error of an attention's output by the certificate: root mean square over layers, kv heads, windows."""
    agreement: float
    agreement_low: float
    """Lower end of its 95 % interval."""
    kl: float
    positions: int


def measure(model: Any, fast: Any, windows: Tensor, taus: Sequence[float] = TAUS) -> Iterator[RelationRow]:
    """One row per tau. Every query decides for itself, as in decoding; tau is put back at the end.

    Args:
        model: The original.
        fast: The same, compiled with ``guard_window=1`` and ``guard_budget=math.inf``.
        windows: Token ids ``[n, S]``.
        taus: Thresholds to try.

    Raises:
        InputError: The guard of ``fast`` would mix windows, or act.
    """
    for row in fast.lamp.plan.sites:
        if row.apply and (row.guard.window != 1 or row.guard.budget != math.inf):
            raise InputError(
                "the guard averages or acts", where=row.name, fix="compile with guard_window=1, guard_budget=math.inf"
            )
    comparisons, squares = [Comparison() for _ in taus], [0.0] * len(taus)
    before = {name: fast.lamp.controls[name].tau.tolist() for name in fast.lamp.controls}
    try:
        for window in windows:
            ids = window[None].to(fast.device)
            with torch.no_grad():
                wanted = model(input_ids=ids).logits
                for index, tau in enumerate(taus):
                    fast.lamp.controls.set(tau=tau, by="measurement")
                    got, square = _forward(fast, ids)
                    comparisons[index].add(wanted, got, ids)
                    squares[index] += square / len(windows)
    finally:
        for name, tau in before.items():
            fast.lamp.controls.set(tau=tau, sites=name, by="measurement")
    for tau, comparison, square in zip(taus, comparisons, squares, strict=True):
        scores, error = comparison.result(), math.sqrt(square)
        yield RelationRow(tau, error, scores.agreement, scores.agreement_low, scores.kl, scores.positions)


def predict(relation: tuple[float, float, float], error: float) -> float:
    """Disagreement that a relation gives for an estimated error."""
    base, start, slope = relation
    return base + slope * max(0.0, error - start)


def fit(rows: Sequence[RelationRow]) -> tuple[float, float, float]:
    """The relation (base, start, slope) that lies above the upper end of every row's 95 % interval of disagreement.

    Raises:
        InputError: Fewer than two different estimates.
    """
    start = min((row.estimate for row in rows), default=0.0)
    near = [row for row in rows if row.estimate <= NEAR * start]
    far = [row for row in rows if row.estimate > NEAR * start]
    if not far or start <= 0:
        raise InputError("rows with one estimate say nothing of a slope", where="relation.fit", fix="more taus")
    base = max(1.0 - row.agreement_low for row in near)
    slope = max((1.0 - row.agreement_low - base) / (row.estimate - start) for row in far)
    return base, start, max(slope, 1e-6)


def to_dicts(rows: Sequence[RelationRow]) -> list[dict[str, Any]]:
    """JSON-ready."""
    return [asdict(row) for row in rows]


def _forward(fast: Any, ids: Tensor) -> tuple[Tensor, float]:
    """Logits ``[1, S, V]``, and the mean squared relative error by the certificate."""
    cache = fast.lamp.cache(ids.shape[1])
    layers = [layer for layer in cache.layers if isinstance(layer, NestedLayer)]
    for layer in layers:
        layer.reference_only = True
    logits: Tensor = fast(input_ids=ids, **cache_argument.given(fast, cache), use_cache=True).logits
    return logits, float(torch.stack([layer.state[..., guard.ERROR].mean() for layer in layers]).mean())
