"""docs/selection.md: what selection rules give for what they refine, and hard tasks, from benchmarks/results.

``python -m tests.project.results_page --write`` renews it with the other tables.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

CURVES, TASKS = "<!-- curves: make golden -->", "<!-- tasks: make golden -->"
RULES = {
    "energy": "`energy`, the default",
    "lamp_strict": "`lamp_strict`",
    "lamp_relaxed": "`lamp_relaxed`",
    "mass": "`mass`, top-p",
    "random_tiles": "drawn at random",
    "static_tiles": "the first and the newest",
}
SHARE = "0.05"
NAMES = {"bf16": "bf16", "fp8_kv": "fp8", "all_high": "both planes", "lamp": "**default plan**"}


def latest(results: Path, benchmark: str) -> tuple[str, dict[str, Any]]:
    """The newest results of a benchmark: file name and content."""
    path = sorted(results.glob(f"*-{benchmark}-*.json"))[-1]
    return path.name, json.loads(path.read_text(encoding="utf-8"))


def curves(results: Path) -> str:
    """KL and flips of every rule and unit at 5 % of the live keys."""
    name, data = latest(results, "lamp_curves")
    units = sorted({row["unit"] for row in data["at_shares"] if not row["own"] and not row["twin"]})
    kinds = [(1, True, 0.0), *((unit, False, 0.0) for unit in units)]
    twins = sorted({(row["unit"], False, row["twin"]) for row in data["at_shares"] if row["twin"]})
    head = (
        f"`{name}`: {data['model']} on {data['text']}, {data['windows']} windows of {data['context']:,} tokens, "
        f"{data['rows'][0]['positions']:,} positions, on {data['device']}.\n\n"
        f"Flipped tokens where {float(SHARE):.0%} of the live keys are refined, interpolated (-: the measured points "
        "of that curve all lie on one side):\n\n"
    )
    return (
        head
        + _curve_table(data, [*kinds, *twins], "flips")
        + "\nKL, nats:\n\n"
        + _curve_table(data, [*kinds, *twins], "kl")
    )


def _curve_table(data: dict[str, Any], kinds: list[tuple[int, bool, float]], field: str) -> str:
    found = {(r["rule"], r["unit"], r["own"], r["twin"]): r[f"{field}_at_{SHARE}"] for r in data["at_shares"]}
    titles = [_title(*kind) for kind in kinds]
    rows = []
    for rule, words in RULES.items():
        values = [found.get((rule, *kind)) for kind in kinds]
        cells = ["-" if v is None else f"{v:.2%}" if field == "flips" else f"{v:.1e}" for v in values]
        rows.append([words, *cells])
    return _table(["rule", *titles], rows)


def _title(unit: int, own: bool, twin: float) -> str:
    keys = "single keys" if unit == 1 else f"tiles of {unit}"
    return keys + (", each query head its own" if own else "") + (f", twin {twin:g}" if twin else "")


def tasks(results: Path) -> str:
    """Hard tasks, whole and by part, and the build-up over layers."""
    name, data = latest(results, "hard_tasks")
    head = f"`{name}`: {data['model']} and {data['text']}, {data['context']:,} tokens, on {data['device']}.\n\n"
    whole = [_task(row) for row in data["rows"] if row["part"] == "all"]
    columns = ["task", "KV cache", "positions", "KL", "agreement (95 %)", "right answers (uncompiled model)", "refined"]
    parts = [_task(row, part=True) for row in data["rows"] if row["part"] != "all" and row["name"] == "lamp"]
    layers: dict[int, list[str]] = {}
    for row in data["layers"]:
        alone = "-" if row["kl_alone"] is None else f"{row['kl_alone']:.1e}"
        layers.setdefault(row["first"], [str(row["first"])]).extend([f"{row['kl']:.1e}", alone])
    kinds = list(dict.fromkeys(row["name"] for row in data["layers"]))
    titles = ["first layers", *(t for kind in kinds for t in (f"{NAMES[kind]}: KL", "the last of them alone"))]
    return (
        head
        + _table(columns, whole)
        + "\nThe default plan, part by part:\n\n"
        + _table(["task", "part", "positions", "KL", "agreement (95 %)", columns[5]], parts)
        + "\nErrors over layers: the first n layers at this precision, the others in fp16.\n\n"
        + _table(titles, layers.values())
    )


def _task(row: dict[str, Any], part: bool = False) -> list[str]:
    interval = f"{row['agreement']:.2%} ({row['agreement_low']:.2%} to {row['agreement_high']:.2%})"
    right = "" if row["accuracy"] is None else f"{row['accuracy']:.1%} ({row['reference_accuracy']:.1%})"
    cells = [f"{row['positions']:,}", f"{row['kl']:.1e}", interval, right]
    if part:
        return [row["task"], row["part"], *cells]
    refined = f"{row['refined_share']:.1%}" if row["refined_share"] else "-"
    return [row["task"], NAMES[row["name"]], *cells, refined]


def _table(titles: Iterable[str], rows: Iterable[list[str]]) -> str:
    titles = list(titles)
    lines = [titles, ["---"] * len(titles), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)
