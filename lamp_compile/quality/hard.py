"""Measure hard tasks and the build-up of errors over layers, row by row, against the uncompiled model in float32."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lamp_compile.plan import Plan
from lamp_compile.quality import rows as specs
from lamp_compile.quality.engine import Engine
from lamp_compile.quality.metrics import Comparison, wilson
from lamp_compile.quality.rows import RowSpec
from lamp_compile.quality.tasks._base import Choices, Material, Sample, Task

ROWS = (specs.BF16, specs.FP8, specs.ALL_HIGH, specs.LAMP)
ALL = "all"
KEPT = {"k_format": "fp16", "v_format": "fp16", **specs.PLAIN}
"""Layers that are left out of a measurement of layers: fp16, whose own error is small against what is measured."""
MOST_DEPTHS = 8


@dataclass(frozen=True)
class TaskRow:
    """One KV precision on one part of one task.

    Attributes:
        task: Name of the task.
        part: Which part of it; ``"all"`` for all parts together.
        name: KV precision.
        positions: Predictions compared, or questions asked.
        kl: Mean KL (nats) against the uncompiled model.
        agreement: Share of positions with the same most likely token; of questions with the same choice.
        agreement_low: Lower end of its 95 % Wilson interval.
        agreement_high: Upper end.
        accuracy: Share of questions answered right; None where nothing is asked.
        reference_accuracy: The same of the uncompiled model.
        refined_share: Share of live sub-tiles refined, over whole samples.
    """

    task: str
    part: str
    name: str
    positions: int
    kl: float
    agreement: float
    agreement_low: float
    agreement_high: float
    accuracy: float | None
    reference_accuracy: float | None
    refined_share: float

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


def measure(
    task: Task, material: Material, engine: Engine, wanted: Sequence[RowSpec] = ROWS,
    on_run: Callable[[str], None] | None = None,
) -> list[TaskRow]:  # fmt: skip
    """All rows on all parts of one task; each sample is held in memory with one pair of logits at a time.

    Raises:
        InputError: The text or the context does not do for the task.
    """
    counted = {spec.name: _Counted() for spec in wanted}
    plans = {spec.name: specs.changed(engine.plan, spec.changes) for spec in wanted}
    device = next(material.model.parameters()).device
    for sample in task.build(material):
        ids = sample.ids[None].to(device)
        with torch.no_grad():
            reference = material.model(input_ids=ids, use_cache=False).logits[0]
            for name, plan in plans.items():
                run = engine.run(ids, plan)
                tiles = torch.stack([site.counts for site in run.tiles.values()]).sum(0) if run.tiles else None
                counted[name].add(sample, reference, run.logits[0], tiles)
                if on_run is not None:
                    on_run(f"{task.name}, {name}")
    return [row for name, sums in counted.items() for row in sums.rows(task.name, name)]


class _Counted:
    """Sums of one row over samples, by part."""

    def __init__(self) -> None:
        self.parts: dict[str, Comparison] = {}
        self.asked: dict[str, list[int]] = {}
        """Questions, same choice, right, right in the uncompiled model."""
        self.live = self.refined = 0

    def add(self, sample: Sample, reference: Tensor, test: Tensor, tiles: Tensor | None) -> None:
        if tiles is not None:
            live, refined = (int(n) for n in tiles.tolist())
            self.live, self.refined = self.live + live, self.refined + refined
        following = torch.cat([sample.ids[1:], sample.ids.new_full((1,), -1)])
        for label, positions in sample.parts.items():
            self._compare(label, positions, reference, test, following)
        for label, choices in sample.choices.items():
            self._compare(label, choices.positions, reference, test, following)
            self._ask(label, choices, reference, test)

    def _compare(self, label: str, positions: Tensor, reference: Tensor, test: Tensor, following: Tensor) -> None:
        at = positions.to(reference.device)
        for name in (ALL, label):
            self.parts.setdefault(name, Comparison()).add_rows(reference[at], test[at], following[positions])

    def _ask(self, label: str, choices: Choices, reference: Tensor, test: Tensor) -> None:
        at, among = choices.positions.to(test.device), choices.candidates.to(test.device)
        expected = reference[at][:, among].argmax(-1).cpu()
        chosen = test[at][:, among].argmax(-1).cpu()
        found = (
            chosen.numel(),
            int((chosen == expected).sum()),
            int((chosen == choices.answers).sum()),
            int((expected == choices.answers).sum()),
        )
        for name in (ALL, label):
            before = self.asked.get(name, [0, 0, 0, 0])
            self.asked[name] = [a + b for a, b in zip(before, found, strict=True)]

    def rows(self, task: str, name: str) -> Iterator[TaskRow]:
        """One row for each part, all together first."""
        for part in sorted(self.parts, key=lambda label: label != ALL):
            scores = self.parts[part].result()
            agreement, low, high = scores.agreement, scores.agreement_low, scores.agreement_high
            accuracy = expected = None
            if part in self.asked:
                questions, same, right, reference_right = self.asked[part]
                agreement, (low, high) = same / questions, wilson(same, questions)
                accuracy, expected = right / questions, reference_right / questions
            share = self.refined / max(1, self.live)
            yield TaskRow(
                task, part, name, scores.positions, scores.kl, agreement, low, high, accuracy, expected, share
            )


@dataclass(frozen=True)
class LayerRow:
    """What one KV precision costs in some layers only, the others in fp16.

    Attributes:
        name: KV precision.
        first: Layers from the bottom that have it.
        kl: Mean KL (nats) against the uncompiled model with these layers.
        kl_alone: With the last of them alone; None where depths are skipped.
        agreement: Share of positions with the same most likely token.
    """

    name: str
    first: int
    kl: float
    kl_alone: float | None
    agreement: float

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


def layers(
    windows: Tensor, model: Any, engine: Engine, wanted: Sequence[RowSpec] = ROWS[1:],
    on_run: Callable[[str], None] | None = None,
) -> list[LayerRow]:  # fmt: skip
    """How errors build up: the first n layers at each precision, n = 1 ... all (at most eight depths), and each layer
    alone where every depth is measured.

    If layers did not influence each other, ``kl`` would be the sum of ``kl_alone`` so far.

    Args:
        windows: int64 ``[n, T]``.
        model: The uncompiled model in float32.
        engine: The compiled one.
        wanted: Precisions.
        on_run: Called after each measurement.
    """
    names = [site.name for site in engine.plan.sites if site.apply]
    depths = _depths(len(names))
    plans: dict[tuple[str, int, bool], Plan] = {}
    for spec in wanted:
        for depth in depths:
            plans[spec.name, depth, False] = _only(engine.plan, names[:depth], spec)
            if len(depths) == len(names):
                plans[spec.name, depth, True] = _only(engine.plan, names[depth - 1 : depth], spec)
    sums = {key: Comparison() for key in plans}
    for window in windows:
        ids = window[None].to(next(model.parameters()).device)
        with torch.no_grad():
            reference = model(input_ids=ids, use_cache=False).logits
            for key, plan in plans.items():
                sums[key].add(reference, engine.run(ids, plan).logits, ids)
                if on_run is not None:
                    on_run(f"layers, {key[0]}")
    found = []
    for spec in wanted:
        for depth in depths:
            together = sums[spec.name, depth, False].result()
            alone = sums[spec.name, depth, True].result().kl if (spec.name, depth, True) in sums else None
            found.append(LayerRow(spec.name, depth, together.kl, alone, together.agreement))
    return found


def _depths(count: int) -> list[int]:
    if count <= MOST_DEPTHS:
        return list(range(1, count + 1))
    return sorted({round(count * (i + 1) / MOST_DEPTHS) for i in range(MOST_DEPTHS)})


def _only(plan: Plan, names: Iterable[str], spec: RowSpec) -> Plan:
    """The plan with a row's changes at these sites, and fp16 at the others."""
    chosen = set(names)
    sites = tuple(
        replace(site, **(spec.changes if site.name in chosen else KEPT)) if site.apply else site for site in plan.sites
    )
    return replace(plan, sites=sites)


def table(rows: Sequence[TaskRow]) -> str:
    """The rows as aligned text."""
    lines = [
        f"{'task':24s} {'KV precision':12s} {'KL':>8s} {'agreement (95 %)':>26s} {'accuracy (of the model)':>24s}"
        f" {'refined':>8s}"
    ]
    for row in rows:
        task = row.task if row.part == ALL else f"  {row.part}"
        interval = f"{row.agreement:7.2%} ({row.agreement_low:.2%}-{row.agreement_high:.2%})"
        accuracy = "" if row.accuracy is None else f"{row.accuracy:.1%} ({row.reference_accuracy:.1%})"
        share = f"{row.refined_share:8.2%}" if row.part == ALL else ""
        lines.append(f"{task:24s} {row.name:12s} {row.kl:8.1e} {interval:>26s} {accuracy:>24s} {share:>8s}")
    return "\n".join(lines)


def layers_table(rows: Sequence[LayerRow]) -> str:
    """The rows as aligned text, with the sum of what the layers cost alone."""
    lines = [f"{'first layers':>12s} {'KV precision':12s} {'KL':>8s} {'alone':>8s} {'sum':>8s} {'agreement':>10s}"]
    sums: dict[str, float] = {}
    for row in rows:
        alone = sums_so_far = ""
        if row.kl_alone is not None:
            sums[row.name] = sums.get(row.name, 0.0) + row.kl_alone
            alone, sums_so_far = f"{row.kl_alone:.1e}", f"{sums[row.name]:.1e}"
        lines.append(
            f"{row.first:12d} {row.name:12s} {row.kl:8.1e} {alone:>8s} {sums_so_far:>8s} {row.agreement:10.2%}"
        )
    return "\n".join(lines)
