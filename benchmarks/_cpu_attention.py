"""The attention step of a CPU benchmark: every way over the same inputs, in rounds that take turns, and its worth."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import _cpu_ort
import _rivals
import torch
from _cpu_machine import Reading
from _cpu_ways import DISTINCT, PRODUCTS, SDPA, Lamp, Sources, Way, floats, fp8, measure
from _planes import Case, Shape, make
from _timing import release

FIXED = (0.0, 0.05, 0.1, 0.2, 1.0)
SDPA_ROWS = ("sdpa_fp32", "sdpa_bf16")
FLOAT_ROWS = (*SDPA_ROWS, "matmul_bf16", "ort_fp32")
"""Ways over a cache in floats, which the best rival is chosen from."""
BESIDE = ("lamp append", "read")
"""Rows that are no attention."""
ROWS = (*FLOAT_ROWS, "fp8", "ort_int8", "ort_int4", "lamp", "lamp append")


@dataclass
class Bench:
    """What all cases share."""

    shape: Shape
    shares: list[float]
    rounds: int
    seconds: float
    cache: int
    reading: Reading
    names: Sequence[str] = ROWS
    fixed_at: Sequence[str] = ()
    rows: list[dict[str, Any]] = field(default_factory=list)

    def case(self, case: Case) -> list[dict[str, Any]]:
        """All rows of one case; what cannot run is a row that says why."""
        release(torch.device("cpu"))
        inputs = [make(case, self.shape, torch.device("cpu"), seed) for seed in range(DISTINCT)]
        sources = Sources(case, self.shape, inputs, self.cache)
        ways: list[Way] = []
        failed: list[dict[str, Any]] = []
        for name, build in self.builders(sources):
            try:
                ways.append(build())
            except ImportError as problem:
                failed.append({"name": name, "skipped": f"{problem}"})
            except Exception as problem:  # noqa: BLE001  (one rival that fails must not cost the run)
                traceback.print_exc(limit=-4)
                failed.append({"name": name, "failed": f"{type(problem).__name__}: {str(problem)[:400]}"})
        wanted = [_rivals.references(one) for one in inputs]
        ways.append(Way("read", self.reading.calls(), self.reading.size, {"how": self.reading.best}))
        rows = measure(ways, wanted, self.rounds, self.seconds) + failed
        finish(rows, case)
        self.rows += rows
        return rows

    def builders(self, sources: Sources) -> list[tuple[str, Callable[[], Way]]]:
        """Names and what makes them, lamp last: its planes are made once for all of its rows."""
        made: dict[str, Callable[[], Way]] = {
            "sdpa_fp32": lambda: floats("sdpa_fp32", sources, torch.float32, SDPA),
            "sdpa_bf16": lambda: floats("sdpa_bf16", sources, torch.bfloat16, SDPA),
            "matmul_bf16": lambda: floats("matmul_bf16", sources, torch.bfloat16, PRODUCTS),
            "fp8": lambda: fp8(sources),
            **{name: lambda n=name: _cpu_ort.way(n, sources) for name in _cpu_ort.BITS},
        }
        chosen = [(name, made[name]) for name in self.names if name in made]
        if "lamp" not in self.names:
            return chosen
        lamp = Lamp(sources)
        if "lamp append" in self.names:
            chosen.append(("lamp append", lamp.append))
        chosen.append(("lamp", lambda: lamp.at("lamp", self.shares)))
        for share in self.fixed_at and FIXED if sources.case.name in self.fixed_at else ():
            name = "lamp all refined" if share >= 1 else f"lamp {share:.0%}"
            chosen.append((name, lambda n=name, s=share: lamp.at(n, [s])))
        return chosen


def finish(rows: list[dict[str, Any]], case: Case) -> None:
    """Ratios to the rivals of the same case, bytes a second, and their share of what reading alone reached then."""
    named = {row["name"]: row["ms"] for row in rows if "ms" in row and "failed" not in row}
    sdpa = min((named[name] for name in SDPA_ROWS if name in named), default=None)
    read = next(row for row in rows if row["name"] == "read")
    best = min((named[name] for name in FLOAT_ROWS if name in named), default=None)
    for row in rows:
        row["case"] = case.name
        if "ms" in row:
            row["gb_per_s"] = row["bytes"] / row["ms"] / 1e6
        if "ms" not in row or row["name"] in BESIDE:
            continue
        row["ratio_to_sdpa"] = sdpa and sdpa / row["ms"]
        row["ratio_to_best"] = best and best / row["ms"]
        row["bandwidth_share"] = row["bytes"] / row["ms"] / (read["bytes"] / read["ms"])
        if row["name"].startswith("lamp") and "lamp append" in named:
            row["ms_with_append"] = row["ms"] + named["lamp append"]


def line(row: dict[str, Any]) -> str:
    """One row as printed."""
    head = f"{row['case']:8s} {row['name']:16s}"
    if "skipped" in row or "failed" in row:
        return f"{head} {'skipped' if 'skipped' in row else 'failed'}: {(row.get('skipped') or row['failed'])[:110]}"
    if row["name"] == "read":
        return f"{head} {row['ms']:9.4f}  {row['gb_per_s']:.1f} GB/s, {row['how']}"
    if row["name"] == "lamp append":
        return f"{head} {row['ms']:9.4f}  {row['how']}; bytes changed: {row['values_changed']}"
    share = "" if row["refined_share"] is None else f"{row['refined_share']:.1%}"
    ratios = [f"{row[key]:6.2f}" if row.get(key) else "     -" for key in ("ratio_to_sdpa", "ratio_to_best")]
    off = "" if row["error"] is None else f"{row['error']:.2e}"
    return (
        f"{head} {row['ms']:9.4f} {' '.join(ratios)} {share:>7s} {off:>9s} {row['bytes'] / 1e6:9.2f} "
        f"{row['gb_per_s']:7.1f} {row['bandwidth_share']:6.0%}  {row.get('how', '')}"
        + (f"; with append {row['ms_with_append']:.3f} ms" if "ms_with_append" in row else "")
    )


HEAD = f"{'case':8s} {'name':16s} {'ms':>9s} x sdpa x best refined     error        MB    GB/s of max"
