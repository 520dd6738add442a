"""What the presets cost on a trained model, with their targets: agreement with its interval, KL, bits.

    python benchmarks/presets.py MODEL TEXT --windows 16 --context 4096 --device cuda --out results.json

Every row is one forward per window on the real cache and operators (the reference's arithmetic), against the uncompiled
model in float32; 16 windows of 4,096 are 65,536 positions. ``--plan FILE`` adds a plan, such as one of `lamp-compile
calibrate`. With --targets it exits 1 when a preset misses its target.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import _script

import lamp_compile
from lamp_compile.plan import PRESETS, Plan
from lamp_compile.quality import frontier, load
from lamp_compile.quality.engine import CompiledEngine
from lamp_compile.quality.environment import environment, write_json
from lamp_compile.quality.frontier import Point, Setting
from lamp_compile.quality.sensitivity import Bench

TARGETS = {"preset conservative": 0.994, "preset balanced": 0.99}
"""Agreement that a preset is to reach on the 25 M-parameter model."""


def wanted(plans: list[str]) -> list[Setting]:
    """bf16 for comparison, the presets, conservative's tau without a layer kept, and the plans given."""
    made = [setting for setting in frontier.settings(()) if setting.name == "format bf16"]
    made += [Setting(f"preset {name}", {"preset": name}) for name in PRESETS]
    made.append(Setting("conservative, none kept", {"tau": PRESETS["conservative"]["tau"]}))
    return made + [Setting(f"plan {Path(path).stem}", {"plan": Plan.load(path)}) for path in plans]


def targets(points: list[Point]) -> list[dict[str, object]]:
    """Each target, and whether the agreement measured reaches it."""
    named = {point.name: point for point in points}
    return [
        {"target": name, "limit": limit, "measured": named[name].agreement, "met": named[name].agreement >= limit}
        for name, limit in TARGETS.items()
    ]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("text")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--plan", action="append", default=[], help="a plan to add; may be repeated")
    parser.add_argument("--targets", action="store_true", help="exit 1 when a target is missed")
    parser.add_argument("--out", type=Path, help="write the rows as JSON")
    args = parser.parse_args(argv)
    model = load.load_model(args.model, device=args.device)
    picked = load.load_windows(model, args.model, args.text, args.context, args.windows)
    points = frontier.measure(
        wanted(args.plan),
        lambda setting: lamp_compile.compile(model, mode="eager", **setting.options),
        lambda fast: Bench(model, CompiledEngine(fast), picked),
        lambda name: print(f"measured {name}", file=sys.stderr, flush=True),
    )
    print(frontier.table(points))
    checked = targets(points)
    for item in checked:
        print(
            f"{'met   ' if item['met'] else 'MISSED'} {item['target']}: {item['measured']:.4f} (limit {item['limit']})"
        )
    if args.out:
        about = {"model": Path(args.model).name, "text": Path(args.text).name}
        data = {
            **environment(args.device), **about, "windows": args.windows, "context": args.context,
            "rows": [point.to_dict() for point in points], "targets": checked,
        }  # fmt: skip
        write_json(args.out, data)
    return 1 if args.targets and not all(item["met"] for item in checked) else 0


if __name__ == "__main__":
    _script.run(main)
