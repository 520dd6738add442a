"""Fragile keys: a model with planted key biases and outlier channels, before and after calibration finds them.

    python benchmarks/fragile_keys.py MODEL TEXT --layers 1,4 --windows 8 --context 1024 --out results.json

Rows: the model and the planted twin (``quality/fragile_twin.py``), each under the preset's plan without balance, the
plan that `compile` makes by itself, and the calibrated one. Every row is held against its own uncompiled model in
float32; how far planting changed the function is a number of its own.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import _script
import torch
from torch import Tensor

import lamp_compile
from lamp_compile.quality import calibrate, load
from lamp_compile.quality.engine import CompiledEngine
from lamp_compile.quality.environment import environment, write_json
from lamp_compile.quality.fragile_twin import fragile_twin
from lamp_compile.quality.metrics import Comparison
from lamp_compile.quality.sensitivity import Bench


def function_change(model: Any, twin: Any, windows: Tensor) -> dict[str, float]:
    """How far planting changed the function, in float32."""
    found = Comparison()
    with torch.no_grad():
        for window in windows:
            ids = window[None].to(model.device)
            found.add(model(input_ids=ids, use_cache=False).logits, twin(input_ids=ids, use_cache=False).logits, ids)
    scores = found.result()
    return {"kl": scores.kl, "agreement": scores.agreement}


def measure(name: str, model: Any, windows: Tensor, preset: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The three rows of one model on held-out windows, and what its calibration reports."""
    first, rest = calibrate.window_halves(windows)
    never, auto = (lamp_compile.compile(model, mode="eager", preset=preset, balance=b) for b in ("never", "auto"))
    engine = CompiledEngine(lamp_compile.compile(model, mode="eager", balance="never"))
    task = calibrate.Task(
        Bench(model, engine, first), Bench(model, engine, rest), never.lamp.plan,
        {site.name: site for site in never.lamp.sites},
        on_step=lambda what: print(f"{name}: {what}", file=sys.stderr, flush=True),
    )  # fmt: skip
    done = calibrate.calibrate(task)
    plans = {"not balanced": never.lamp.plan, "compile() by itself": auto.lamp.plan, "calibrated": done.plan}
    rows = [
        {"name": f"{name}, {title}", **task.held_out.measure(plan).summary(),
         "balanced": [row.name for row in plan.sites if row.balance],
         "kept": [row.name for row in plan.sites if not row.apply]}
        for title, plan in plans.items()
    ]  # fmt: skip
    return rows, done.report


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("text")
    parser.add_argument("--layers", default="1", help="attentions to plant in, such as 1,4")
    parser.add_argument("--bias", type=float, default=200.0, help="in units of the head's median channel rms")
    parser.add_argument("--scale", type=float, default=10.0, help="S of the outlier channels")
    parser.add_argument("--preset", default="balanced")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="write the rows as JSON")
    args = parser.parse_args(argv)
    model = load.load_model(args.model, device=args.device)
    picked = load.load_windows(model, args.model, args.text, args.context, args.windows)
    planted = fragile_twin(model, [int(x) for x in args.layers.split(",")], bias=args.bias, scale=args.scale)
    change = function_change(model, planted.model, picked)
    print(f"planted in {', '.join(planted.sites)}; function changed by KL {change['kl']:.1e}")
    rows: list[dict[str, Any]] = []
    found: dict[str, Any] = {}
    for name, measured in (("plain", model), ("planted", planted.model)):
        made, report = measure(name, measured, picked, args.preset)
        rows += made
        found[name] = report["fragile"]
    for row in rows:
        interval = f"{row['agreement']:.2%} ({row['agreement_low']:.2%} to {row['agreement_high']:.2%})"
        handled = f"{len(row['balanced'])} balanced, {len(row['kept'])} kept"
        print(f"{row['name']:30s} {row['bits_per_value']:6.2f} bits  KL {row['kl']:.2e}  {interval}  {handled}")
    print(f"fragile keys found: {len(found['plain'])} in the model, {len(found['planted'])} in the planted twin")
    if args.out:
        about = {"model": Path(args.model).name, "text": Path(args.text).name, "preset": args.preset}
        data = {
            **environment(args.device), **about, "windows": args.windows, "context": args.context,
            "planted": {"sites": planted.sites, "channels": planted.channels, "bias": args.bias, "scale": args.scale},
            "function_change": change, "fragile": found, "rows": rows,
        }  # fmt: skip
        write_json(args.out, data)
    return 0


if __name__ == "__main__":
    _script.run(main)
