"""Where balancing key channels pays: predicted gain and measured KL, on a model and on milder and wilder outlier twins.

    python benchmarks/balance.py MODEL TEXT --windows 1 --context 2048 --out results.json

For every twin: the smallest and largest gain that the probe predicts over the sites (what ``balance="auto"`` compares
with its threshold), and the KL of both planes everywhere, balanced nowhere and everywhere.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import _script

import lamp_compile
from lamp_compile.frontends.huggingface import balance
from lamp_compile.quality import evaluate, load, rows
from lamp_compile.quality.engine import CompiledEngine
from lamp_compile.quality.environment import environment, write_json
from lamp_compile.quality.twin import outlier_twin

TWINS = ((0.0, "any"), (3.0, "any"), (3.0, "slow"), (10.0, "any"), (10.0, "slow"), (30.0, "any"), (30.0, "slow"))


def gains(model: Any) -> list[float]:
    """Predicted gain of every site."""
    fast = lamp_compile.compile(model, mode="eager", balance="never")
    return [balance.gain(*balance.pooled(site, model.config)) for site in fast.lamp.sites]


def measure(evaluation: evaluate.Evaluation, scale: float, pairs: str) -> dict[str, Any]:
    """One row: a twin, its gains, its KL without and with balance."""
    model = outlier_twin(evaluation.model, scale, pairs=pairs) if scale else evaluation.model
    predicted = gains(model)
    kl = {}
    for mode in ("never", "always"):
        spec = replace(rows.ALL_HIGH, balance=mode)
        kl[mode] = evaluation.measure(spec.on_twin(scale, pairs) if scale else spec).kl
    return {
        "name": f"twin {scale:g} {pairs}" if scale else "plain",
        "least_gain": min(predicted),
        "largest_gain": max(predicted),
        "kl_unbalanced": kl["never"],
        "kl_balanced": kl["always"],
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("text")
    parser.add_argument("--windows", type=int, default=1)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="write the rows as JSON")
    args = parser.parse_args(argv)
    model = load.load_model(args.model, device=args.device)
    evaluation = evaluate.Evaluation(
        model,
        load.load_windows(model, args.model, args.text, args.context, args.windows),
        lambda m, mode: CompiledEngine(lamp_compile.compile(m, mode="eager", balance=mode)),
    )
    print(f"{'':14s} {'gain':>13s} {'KL unbalanced':>14s} {'balanced':>10s}")
    done = []
    for scale, pairs in TWINS:
        row = measure(evaluation, scale, pairs)
        done.append(row)
        print(
            f"{row['name']:14s} {row['least_gain']:5.2f} to {row['largest_gain']:5.2f} {row['kl_unbalanced']:13.2e} "
            f"{row['kl_balanced']:10.2e}",
            flush=True,
        )
    if args.out:
        about = {"model": Path(args.model).name, "windows": args.windows, "context": args.context}
        write_json(args.out, {**environment(args.device), **about, "threshold": balance.THRESHOLD, "rows": done})
    return 0


if __name__ == "__main__":
    _script.run(main)
