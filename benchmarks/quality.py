"""What each KV precision costs on a trained model, on the project's own runtime: the table behind the claims.

    python benchmarks/quality.py MODEL TEXT --windows 16 --context 4096 --device cuda --out results.json

MODEL is a local folder (safetensors), TEXT a UTF-8 file or *.u16 token ids. Every row is one forward per window on the
real cache and operators, compared with the uncompiled model in float32. With --targets it exits 1 when one is missed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import _script

import lamp_compile
from lamp_compile.quality import evaluate, load, rows
from lamp_compile.quality.engine import CompiledEngine
from lamp_compile.quality.environment import environment, write_json
from lamp_compile.quality.evaluate import Row
from lamp_compile.quality.rows import RowSpec

INT8 = RowSpec("int8_kv", {"k_format": "int8", "v_format": "int8", **rows.PLAIN})
BALANCED = RowSpec("all_high_balanced", {"floor": 1}, balance="always")
UNBALANCED = RowSpec("all_high_unbalanced", {"floor": 1}, balance="never")
ENERGY_TAU = (0.1, 0.03, 0.02, 0.01, 0.003)
OTHER_RULES = (
    ("lamp_strict", (0.1, 0.02)),
    ("lamp_relaxed", (0.1, 0.03)),
    ("mass", (0.3, 0.1)),
)
TWIN_SCALE = 30.0


def row_specs(quick: bool) -> list[RowSpec]:
    """All rows, each control after the row it is held against."""
    made = [rows.BF16, rows.FP8, INT8, rows.ALL_HIGH, BALANCED, UNBALANCED, rows.ALL_LOW]
    made += [RowSpec(f"energy_{tau:g}", {"rule": "energy", "tau": tau}) for tau in ENERGY_TAU]
    made += [rows.LAMP, rows.RANDOM, rows.STATIC]
    if not quick:
        for rule, taus in OTHER_RULES:
            made += [RowSpec(f"{rule}_{tau:g}", {"rule": rule, "tau": tau}) for tau in taus]
        made += [
            RowSpec(f"energy_{tau:g}_balanced", {"rule": "energy", "tau": tau}, balance="always")
            for tau in (0.03, 0.01)
        ]
        made += [RowSpec("no_rotation_low", {"rotation": "none", "tau": rows.NEVER, "balance": None}, balance="never")]
    for pairs in ("any", "slow"):
        made += [spec.on_twin(TWIN_SCALE, pairs) for spec in (rows.FP8, INT8, UNBALANCED, rows.ALL_HIGH)]
        made += [
            RowSpec(f"energy_{tau:g}", {"rule": "energy", "tau": tau}).on_twin(TWIN_SCALE, pairs)
            for tau in (0.03, 0.01)
        ]
        made += [rows.LAMP.on_twin(TWIN_SCALE, pairs)]
    return made


def targets(done: list[Row]) -> list[dict[str, Any]]:
    """The project's quality targets (small model, 4,096-token windows), each with what was measured."""
    named = {(row.name, row.twin, row.pairs): row for row in done}
    found: list[dict[str, Any]] = []

    def check(text: str, row: Row | None, value: Callable[[Row], float], limit: float, at_least: bool = False) -> None:
        measured = None if row is None else value(row)
        met = measured is not None and (measured >= limit if at_least else measured <= limit)
        found.append({"target": text, "row": row and row.name, "measured": measured, "limit": limit, "met": met})

    def energy(share: float, pairs: str = "") -> Row | None:
        """The row of the energy rule that refines most without exceeding the share."""
        twin = TWIN_SCALE if pairs else 0.0
        fitting = [
            r
            for r in done
            if r.name in _energy_names() and (r.twin, r.pairs) == (twin, pairs) and r.refined_share <= share
        ]
        return max(fitting, key=lambda r: r.refined_share, default=None)

    high, lamp = named.get(("all_high", 0.0, "")), named.get(("lamp", 0.0, ""))
    check("all_high KL", high, lambda r: r.kl, 1.3e-4)
    check("energy at <= 5 %: KL", energy(0.05), lambda r: r.kl, 6e-4)
    check("energy at <= 5 %: agreement", energy(0.05), lambda r: r.agreement, 0.986, True)
    check("energy at <= 10.5 %: KL", energy(0.105), lambda r: r.kl, 2.8e-4)
    check("energy at <= 10.5 %: agreement", energy(0.105), lambda r: r.agreement, 0.990, True)
    check("energy at <= 10.5 %: perplexity ratio", energy(0.105), lambda r: r.perplexity_ratio, 1.0005)
    check("default plan: agreement", lamp, lambda r: r.agreement, 0.99, True)
    check("default plan: bits per value", lamp, lambda r: r.bits_per_value, 4.65)
    for pairs in ("any", "slow"):
        check(f"twin {pairs}: all_high KL", named.get(("all_high", TWIN_SCALE, pairs)), lambda r: r.kl, 1.5 * 1.3e-4)
        check(f"twin {pairs}: energy at <= 5 %: KL", energy(0.05, pairs), lambda r: r.kl, 1.5 * 6e-4)
        check(f"twin {pairs}: energy at <= 10.5 %: KL", energy(0.105, pairs), lambda r: r.kl, 1.5 * 2.8e-4)
    return found


def _energy_names() -> set[str]:
    return {f"energy_{tau:g}" for tau in ENERGY_TAU}


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("text")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quick", action="store_true", help="leave out the other rules and the ablations")
    parser.add_argument("--targets", action="store_true", help="exit 1 when a quality target is missed")
    parser.add_argument("--out", type=Path, help="write the rows as JSON")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    model = load.load_model(args.model, device=args.device)
    picked = load.load_windows(model, args.model, args.text, args.context, args.windows)
    evaluation = evaluate.Evaluation(
        model, picked, lambda m, balance: CompiledEngine(lamp_compile.compile(m, mode="eager", balance=balance))
    )
    head = environment(args.device)
    print(
        f"{Path(args.model).name}, {Path(args.text).name}: {args.windows} windows of {args.context} on {head['device']}"
    )
    print(evaluate.HEADER, flush=True)
    done = evaluation.measure_all(row_specs(args.quick), lambda row: print(evaluate.line(row), flush=True))
    checked = targets(done)
    for item in checked:
        word = "met   " if item["met"] else "MISSED"
        print(f"{word} {item['target']}: {item['measured']} (limit {item['limit']:g}, row {item['row']})")
    if args.out:
        data = {
            **head,
            "model": Path(args.model).name,
            "text": Path(args.text).name,
            "windows": args.windows,
            "context": args.context,
            "rows": [row.to_dict() for row in done],
            "targets": checked,
        }
        write_json(args.out, data)
    return 1 if args.targets and not all(item["met"] for item in checked) else 0


if __name__ == "__main__":
    _script.run(main)
