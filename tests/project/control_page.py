"""The table of docs/control.md, from benchmarks/results. ``python -m tests.project.control_page --write`` writes it."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

from lamp_compile.control_plan import RELATION
from lamp_compile.quality.relation import predict

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "control.md"
MODELS = ("small", "nano")
BEGIN, END = "<!-- relation table: make golden -->", "<!-- end -->"


def latest(model: str) -> dict:
    """The newest results of a model."""
    (*_, file) = sorted((ROOT / "benchmarks" / "results").glob(f"*-control_relation-{model}-*.json"))
    return json.loads(file.read_text(encoding="utf-8"))


def table() -> str:
    """One row per tau; both models."""
    found = {model: {row["tau"]: row for row in latest(model)["rows"]} for model in MODELS}
    columns = "".join(f" {model}: estimate | disagreement | default says |" for model in MODELS)
    lines = [f"| tau |{columns}", "|---|" + "---|---|---|" * len(MODELS)]
    for tau in found[MODELS[0]]:
        cells = []
        for model in MODELS:
            row = found[model][tau]
            says = predict(RELATION, row["estimate"])
            cells += [f"{row['estimate']:.4f}", f"{1 - row['agreement']:.2%}", f"{says:.2%}"]
        lines.append(f"| {tau:g} | " + " | ".join(cells) + " |")
    heads = [
        f"{data['model']}: {data['windows']} windows of {data['context']} tokens on {data['device']}, torch "
        f"{data['versions']['torch']}"
        for data in map(latest, MODELS)
    ]
    return "\n".join((*lines, "", "; ".join(heads) + "."))


def page() -> str:
    """The page with its table made anew."""
    text = PAGE.read_text(encoding="utf-8")
    return re.sub(f"{BEGIN}.*?{END}", lambda _: f"{BEGIN}\n{table()}\n{END}", text, flags=re.DOTALL)


if __name__ == "__main__" and "--write" in sys.argv:
    PAGE.write_text(page(), encoding="utf-8")
