"""How agreement with the original model follows from the estimated error that the controller holds, on real text.

    python benchmarks/control_relation.py MODEL TEXT --windows 8 --context 1024 --out results.json

For each tau: the root mean square over layers, kv heads and windows of the certificate's estimate of the relative error
of an attention's output, and the share of positions whose most likely next token is the uncompiled model's. The guard
is off; every query decides for itself, as in decoding. ``predicted`` is the disagreement that the controller's default
relation (``control_plan.RELATION``) gives for the estimate: cautious where it is at least the measured one.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import Any

import torch

import lamp_compile
from lamp_compile.control_plan import RELATION
from lamp_compile.errors import LampError
from lamp_compile.quality import load
from lamp_compile.quality.environment import environment, write_json
from lamp_compile.quality.metrics import Comparison
from lamp_compile.runtime import guard

TAUS = (0.0, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)


def estimate(cache: Any) -> float:
    """Mean over layers, sequences and kv heads of the squared relative error of the only step (a window of 1)."""
    return float(torch.stack([layer.state[..., guard.ERROR].mean() for layer in cache.layers]).mean())


def measure(model: Any, windows: torch.Tensor, device: str, taus: tuple[float, ...] = TAUS) -> list[dict[str, Any]]:
    """One row per tau."""
    fast = lamp_compile.compile(model, mode="eager", guard_window=1, guard_budget=math.inf)
    comparisons = {tau: Comparison() for tau in taus}
    squares: dict[float, list[float]] = {tau: [] for tau in taus}
    for window in windows:
        ids = window[None].to(device)
        with torch.no_grad():
            wanted = model(input_ids=ids).logits
            for tau in taus:
                fast.lamp.controls.set(tau=tau)
                cache = fast.lamp.cache(ids.shape[1])
                for layer in cache.layers:
                    layer.reference_only = True
                comparisons[tau].add(wanted, fast(input_ids=ids, past_key_values=cache).logits, ids)
                squares[tau].append(estimate(cache))
    base, start, slope = RELATION
    rows = []
    for tau in taus:
        scores, error = comparisons[tau].result(), math.sqrt(sum(squares[tau]) / len(squares[tau]))
        rows.append(
            {
                "tau": tau,
                "estimate": error,
                "agreement": scores.agreement,
                "agreement_low": scores.agreement_low,
                "kl": scores.kl,
                "positions": scores.positions,
                "predicted": base + slope * max(0.0, error - start),
            }
        )
    return rows


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
    rows = measure(model, picked, args.device)
    head = environment(args.device)
    print(f"{Path(args.model).name}, {args.windows} windows of {args.context} on {head['device']}")
    print(f"{'tau':>6s} {'estimate':>9s} {'agreement':>10s} {'KL':>9s} {'predicted':>10s}")
    for row in rows:
        numbers = f"{row['tau']:6g} {row['estimate']:9.4f} {row['agreement']:10.4%} {row['kl']:9.2e}"
        print(f"{numbers} {1 - row['predicted']:10.4%}")
    if args.out:
        data = {**head, "model": Path(args.model).name, "windows": args.windows, "context": args.context, "rows": rows}
        write_json(args.out, data)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except LampError as error:
        sys.exit(f"error: {error}")
