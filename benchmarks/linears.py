"""Linear layers in INT8 on a CPU: what they cost in predictions, and how fast one layer is.

    python benchmarks/linears.py MODEL TEXT --windows 4 --context 1024 --out results.json

Predictions: agreement and KL against the uncompiled model in float32, of INT8 linears alone (the attention as it was),
of LAMP's attention alone, and of both. Speed: each shape of the model at one row, as the compiler runs it in a decode
step (``lamp_compile.quality.linear_speed``), and ``int8_dynamic`` at 128 rows, against float32.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Any

import _script
import torch
import torch.nn.functional as F
from _cpu_machine import describe

import lamp_compile
from lamp_compile.frontends import linears
from lamp_compile.linear_plan import LinearPlan
from lamp_compile.quality import frontier, linear_speed, load
from lamp_compile.quality.engine import CompiledEngine
from lamp_compile.quality.environment import environment, write_json
from lamp_compile.quality.frontier import Setting
from lamp_compile.quality.sensitivity import Bench
from lamp_compile.quality.timing import milliseconds
from lamp_compile.runtime.linear import Int8Linear

ALONE = {"fuel": 0}
"""No attention is rewritten."""
SETTINGS = (
    Setting("int8", {**ALONE, "linears": "int8"}),
    Setting("int8_dynamic", {**ALONE, "linears": "int8_dynamic"}),
    Setting("lamp attention", {}),
    Setting("lamp attention, int8", {"linears": "int8"}),
    Setting("lamp attention, int8_dynamic", {"linears": "int8_dynamic"}),
)
CPU = torch.device("cpu")
MANY = 128
"""Rows of a short prompt."""


def speeds(model: Any, threads: int) -> list[dict[str, Any]]:
    """A row for each shape of linear layer that the model has, times float32's speed."""
    torch.set_num_threads(threads)
    shapes = {(layer.out_features, layer.in_features): layer for layer in linears.find(model).values()}
    rows = []
    for (outputs, inputs), layer in sorted(shapes.items()):
        row: dict[str, Any] = {"outputs": outputs, "inputs": inputs}
        for name in ("int8", "int8_dynamic"):
            group = linears.default_group(layer, name)
            row[f"{name}, 1 row"] = linear_speed.speedup(outputs, inputs, group, torch.float32, name == "int8_dynamic")
        x, fast = torch.randn(MANY, inputs), Int8Linear(layer, LinearPlan("speed", format="int8_dynamic", group=0))
        calls = (partial(F.linear, x, layer.weight), partial(fast, x))
        with torch.no_grad():
            before, after = (milliseconds([call], 30, CPU) for call in calls)
        row[f"int8_dynamic, {MANY} rows"] = before / after
        rows.append(row)
        print({key: round(x, 2) if isinstance(x, float) else x for key, x in row.items()}, flush=True)
    return rows


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("text")
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, help="write the rows as JSON")
    args = parser.parse_args(argv)
    model = load.load_model(args.model)
    fast = speeds(model, args.threads)
    picked = load.load_windows(model, args.model, args.text, args.context, args.windows)
    points = frontier.measure(
        SETTINGS,
        lambda setting: lamp_compile.compile(model, mode="eager", **setting.options),
        lambda compiled: Bench(model, CompiledEngine(compiled), picked),
        lambda name: print(f"measured {name}", file=sys.stderr, flush=True),
    )
    print(frontier.table(points))
    if args.out:
        about = {"model": Path(args.model).name, "text": Path(args.text).name, "machine": describe()}
        data = {
            **environment("cpu"), **about, "windows": args.windows, "context": args.context,
            "rows": [point.to_dict() for point in points], "speeds": fast,
        }  # fmt: skip
        write_json(args.out, data)
    return 0


if __name__ == "__main__":
    _script.run(main)
