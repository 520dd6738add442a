"""How agreement with the original model follows from the estimated error that the controller holds, on real text.

    python benchmarks/control_relation.py MODEL TEXT --windows 8 --context 1024 --out results.json

For each tau: the root mean square over layers, kv heads and windows of the certificate's estimate of the relative error
of an attention's output, and the share of positions whose most likely next token is the uncompiled model's. The guard
is off; every query decides for itself, as in decoding. ``predicted`` is the disagreement that the controller's default
relation gives for the estimate (``control_plan.RELATION``): cautious where it is at least the measured one.
``relation`` is what fits this model: for ``fast.lamp.control(quality=..., relation=...)`` and plans.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import _script

import lamp_compile
from lamp_compile.control_plan import RELATION
from lamp_compile.quality import load, relation
from lamp_compile.quality.environment import environment, write_json


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("text")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="write the rows as JSON")
    args = parser.parse_args(argv)
    model = load.load_model(args.model, device=args.device)
    picked = load.load_windows(model, args.model, args.text, args.context, args.windows)
    fast = lamp_compile.compile(model, mode="eager", guard_window=1, guard_budget=math.inf)
    rows = list(relation.measure(model, fast, picked))
    fitted = relation.fit(rows)
    head = environment(args.device)
    print(f"{Path(args.model).name}, {args.windows} windows of {args.context} on {head['device']}")
    print(f"{'tau':>6s} {'estimate':>9s} {'agreement':>10s} {'KL':>9s} {'predicted':>10s}")
    for row in rows:
        numbers = f"{row.tau:6g} {row.estimate:9.4f} {row.agreement:10.4%} {row.kl:9.2e}"
        print(f"{numbers} {1 - relation.predict(RELATION, row.estimate):10.4%}")
    print("relation of this model: " + ", ".join(f"{value:.4g}" for value in fitted))
    if args.out:
        data = {**head, "model": Path(args.model).name, "windows": args.windows, "context": args.context}
        write_json(args.out, {**data, "relation": fitted, "rows": relation.to_dicts(rows)})
    return 0


if __name__ == "__main__":
    _script.run(main)
