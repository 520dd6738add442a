"""KL and flipped tokens against the refined share, per selection rule and per unit of selection.

    python benchmarks/lamp_curves.py MODEL TEXT --windows 4 --context 4096 --device cuda --out results.json

Rules: LAMP strict and relaxed (arXiv 2601.21623 v2), top-p (its v1), energy (the default here), and as controls keys
drawn at random and the first and newest ones, at the same share of live keys. Units: single keys, and tiles of 16, 32,
64 and 128 keys. In a model with grouped queries the heads of a group share the keys they refine; `own` gives every
query head keys of its own (the same function, kv heads repeated), as the papers count.

MODEL is a local folder (safetensors), TEXT a UTF-8 file or *.u16 token ids. Every row is one forward per window on the
real cache and operators, compared with the uncompiled model in float32.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import _script
import torch
from _ungrouped import ungrouped
from torch import Tensor, nn

import lamp_compile
from lamp_compile.quality import load, rows
from lamp_compile.quality.engine import CompiledEngine
from lamp_compile.quality.environment import environment, write_json
from lamp_compile.quality.evaluate import Evaluation, Row
from lamp_compile.quality.rows import RowSpec

TWIN_SCALE = 30.0
TAUS = {
    "energy": (0.3, 0.1, 0.03, 0.01, 0.003),
    "lamp_strict": (1.0, 0.3, 0.1, 0.03, 0.01),
    "lamp_relaxed": (0.5, 0.2, 0.1, 0.03, 0.01),
    "mass": (0.7, 0.5, 0.3, 0.1, 0.03),
}
FINER = {"energy": (0.001,), "lamp_strict": (0.003, 0.001), "lamp_relaxed": (0.003, 0.001), "mass": (0.01,)}
"""For single keys besides: a key weighs less than its tile."""
SHARES = (0.01, 0.03, 0.1, 0.3)
"""Of the controls."""
UNITS = (1, 16, 32, 64, 128)
TWIN_UNITS = (1, 32)
READ_AT = (0.02, 0.05, 0.1)
"""Shares at which curves are compared, by interpolation."""


@dataclass(frozen=True)
class Case:
    """One point of one curve."""

    spec: RowSpec
    rule: str
    unit: int
    own: bool
    """Every query head refines keys of its own."""


def cases(context: int, groups: int, units: Sequence[int] = UNITS) -> Iterator[Case]:
    """All points, those of the model with grouped queries last."""
    for own, twin, sizes in ((True, 0.0, (1,)), (False, 0.0, units), (False, TWIN_SCALE, TWIN_UNITS)):
        if own and groups == 1:
            continue
        for unit in sizes:
            for rule, tau in _points(unit, context, 1 if own else groups):
                name = f"{rule} {tau:.4g} of {unit}" + (" own" if own else "")
                changes = {"rule": rule, "tau": tau, "subtile": unit, "tile": max(32, unit), "floor": 0}
                yield Case(RowSpec(name, changes, twin=twin), rule, unit, own)


def _points(unit: int, context: int, groups: int) -> Iterator[tuple[str, float]]:
    for rule, taus in TAUS.items():
        for tau in (*taus, *(FINER[rule] if unit == 1 else ())):
            yield rule, tau
    for share in SHARES:
        yield "random_tiles", (1 - share) ** (1 / groups)
        yield "static_tiles", 1 / (_newest(share, unit, context) + 0.5)


def _newest(share: float, unit: int, context: int) -> int:
    """How many of the newest units, beside the first, come to this share of all live ones, over all positions."""
    seen = [math.ceil((i + 1) / unit) for i in range(context)]
    total, low, high = sum(seen), 1, max(seen)
    while low < high:
        middle = (low + high) // 2
        if sum(min(t, middle + 1) for t in seen) >= share * total:
            high = middle
        else:
            low = middle + 1
    return low


def point(case: Case, row: Row) -> dict[str, Any]:
    """One point, JSON-ready."""
    return {
        "rule": case.rule,
        "unit": case.unit,
        "own": case.own,
        "twin": case.spec.twin,
        "tau": case.spec.changes["tau"],
        "refined_share": row.refined_share,
        "bits_per_value": row.bits_per_value,
        "kl": row.kl,
        "flips": 1 - row.agreement,
        "flips_low": 1 - row.agreement_high,
        "flips_high": 1 - row.agreement_low,
        "positions": row.positions,
    }


def at_shares(points: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each curve's KL and flips at the shares of ``READ_AT``, interpolated in logarithms; None outside of it."""
    curves: dict[tuple[str, int, bool, float], list[dict[str, Any]]] = {}
    for item in points:
        curves.setdefault((item["rule"], item["unit"], item["own"], item["twin"]), []).append(item)
    found = []
    for (rule, unit, own, twin), curve in curves.items():
        row: dict[str, Any] = {"rule": rule, "unit": unit, "own": own, "twin": twin}
        for share in READ_AT:
            row[f"kl_at_{share:g}"] = interpolate(curve, "kl", share)
            row[f"flips_at_{share:g}"] = interpolate(curve, "flips", share)
        found.append(row)
    return found


def interpolate(curve: Sequence[dict[str, Any]], field: str, share: float) -> float | None:
    """A curve's value at one share: linear between its points in log share and log value."""
    known = sorted((p["refined_share"], p[field]) for p in curve if p["refined_share"] > 0 and p[field] > 0)
    for (x0, y0), (x1, y1) in itertools.pairwise(known):
        if x0 <= share <= x1 and x1 > x0:
            part = math.log(share / x0) / math.log(x1 / x0)
            return float(math.exp(math.log(y0) + part * math.log(y1 / y0)))
    return None


def measure(model: nn.Module, windows: Tensor, units: Sequence[int], only: str, out: list[dict[str, Any]]) -> None:
    """All points of the model, appended to ``out`` as they are done."""
    config: Any = model.config
    groups = config.num_attention_heads // config.num_key_value_heads
    evaluations: dict[bool, Evaluation] = {}
    for case in cases(windows.shape[1], groups, units):
        if only and only not in case.spec.name:
            continue
        if case.own not in evaluations:
            subject = ungrouped(model) if case.own else model
            evaluations = {case.own: Evaluation(subject, windows, _engine)}
        row = evaluations[case.own].measure(case.spec)
        out.append(point(case, row))
        name = case.spec.name + (" (twin)" if case.spec.twin else "")
        print(
            f"{name:44s} {row.refined_share:8.3%} KL {row.kl:.2e} flips {1 - row.agreement:.2%}",
            flush=True,
        )


def _engine(model: nn.Module, balance: str) -> CompiledEngine:
    return CompiledEngine(lamp_compile.compile(model, mode="eager", balance=balance))


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("text")
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--units", type=int, nargs="+", default=list(UNITS), help="keys per decision")
    parser.add_argument("--only", default="", help="points whose name contains this")
    parser.add_argument("--out", type=Path, help="write the points as JSON")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    model = load.load_model(args.model, device=args.device)
    windows = load.load_windows(model, args.model, args.text, args.context, args.windows)
    done: list[dict[str, Any]] = []
    plain = Evaluation(model, windows, _engine)
    edges = [plain.measure(spec).to_dict() for spec in (rows.ALL_LOW, rows.ALL_HIGH)]
    with torch.no_grad():
        measure(model, windows, args.units, args.only, done)
    data = {
        **environment(args.device),
        "model": Path(args.model).resolve().name,
        "text": Path(args.text).name,
        "windows": args.windows,
        "context": args.context,
        "edges": edges,
        "rows": done,
        "at_shares": at_shares(done),
    }
    if args.out:
        write_json(args.out, data)
    for row in data["at_shares"]:
        print({k: v if not isinstance(v, float) else float(f"{v:.3g}") for k, v in row.items()})
    return 0


if __name__ == "__main__":
    _script.run(main)
