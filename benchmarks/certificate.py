"""How the error certificate compares with the true error, on real text: the estimate, and the worst case.

    python benchmarks/certificate.py MODEL TEXT --windows 4 --context 4096 --device cuda --out results.json

What ``lamp-compile eval --certificate`` prints, on both kinds of outlier twin and for more rows; and for a few rows of
every layer the worst-case bound (``runtime/worst_case.py``), which must never lie below the true error.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import _script
import torch
from torch import Tensor, nn

import lamp_compile
from lamp_compile.frontends.huggingface.attention import NAME, observing
from lamp_compile.frontends.structure import structural_copy
from lamp_compile.plan import Plan
from lamp_compile.quality import certificates, load
from lamp_compile.quality.environment import environment, write_json
from lamp_compile.quality.twin import outlier_twin
from lamp_compile.runtime import reference, worst_case
from lamp_compile.runtime.arguments import Scores, Visibility

TWINS = (("plain", 0.0, ""), ("twin 30 any", 30.0, "any"), ("twin 30 slow", 30.0, "slow"))
BOUND_POSITIONS = 8
"""Query positions of a window whose rows are bounded as well."""


def worst(model: nn.Module, plan: Plan, window: Tensor) -> list[dict[str, Any]]:
    """The worst case of some rows of every layer, under the plan and at its extremes."""
    exact: Any = structural_copy(model)
    exact.set_attn_implementation(NAME)
    names = {id(module): path for path, module in exact.named_modules()}
    rows: list[dict[str, Any]] = []

    def observe(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, arguments: dict[str, Any]) -> None:
        picked = torch.linspace(0, q.shape[2] - 1, BOUND_POSITIONS, device=q.device).long()
        mask = (torch.arange(k.shape[2], device=q.device) <= picked[:, None])[None, None]
        scale = float(arguments["scaling"])
        truth, _ = reference.exact_attention(q[:, :, picked], k, v, Visibility(k.shape[2], mask=mask), scale)
        for setting, changes in certificates.SETTINGS.items():
            row = replace(plan.site(names[id(module)]), **changes)
            error, bound = _bound(row, (q[:, :, picked], k, v), Visibility(k.shape[2], mask=mask), scale, truth)
            ratio = bound / error
            rows.append(
                {
                    "setting": setting, "layer": row.name, "rows": ratio.numel(),
                    "violated": int((error > bound).sum()), "median_bound_over_error": float(ratio.median()),
                    "least_bound_over_error": float(ratio.min()),
                }
            )  # fmt: skip

    with torch.no_grad(), observing(observe):
        exact(input_ids=window[None].to(exact.device), use_cache=False)
    return rows


def _bound(
    row: Any, qkv: tuple[Tensor, Tensor, Tensor], visible: Visibility, scale: float, truth: Tensor
) -> tuple[Tensor, Tensor]:
    """True error and bound ``[B, H, S]``."""
    q, k, v = qkv
    balance = None if row.balance is None else torch.tensor(row.balance, dtype=torch.float32, device=q.device)
    planes = reference.quantize(k, v, balance, row.k_format, row.v_format, row.rotation, row.tile)
    scores = Scores(scale, 0.0, row.rotation, row.query_bits)
    importance = reference.look_ahead(
        q, planes.k_high, planes.k_scale, balance, visible, scores, row.k_format, row.rule, row.subtile
    )
    tau, floor = (torch.tensor(float(x), device=q.device).expand(k.shape[1]) for x in (row.tau, row.floor))
    levels = reference.select(importance, tau, floor, None, None, False)
    out, _, _ = reference.attend(
        q, planes, levels, None, balance, visible, scores, row.k_format, row.v_format, row.subtile
    )
    stored = worst_case.Stored(planes, levels, balance, row.k_format, row.v_format, row.subtile)
    bound = worst_case.bound(q, stored, visible, scores, out)
    return (out.double() - truth).norm(dim=-1), bound


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("text")
    parser.add_argument("--windows", type=int, default=2)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--rows-per-length", type=int, default=certificates.ROWS_PER_LENGTH)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="write the rows as JSON")
    args = parser.parse_args(argv)
    model = load.load_model(args.model, device=args.device)
    picked = load.load_windows(model, args.model, args.text, args.context, args.windows)
    meter = certificates.Meter(rows_per_length=args.rows_per_length)
    bounds: list[dict[str, Any]] = []
    for name, scale, pairs in TWINS:
        measured = outlier_twin(model, scale, pairs=pairs) if scale else model
        plan = lamp_compile.compile(measured, mode="eager").lamp.plan
        meter.measure(measured, plan, picked, name)
        bounds += [{"model": name, **row} for row in worst(measured, plan, picked[0])]
    groups = meter.groups()
    print(certificates.table(groups))
    violated = sum(row["violated"] for row in bounds)
    print(f"worst case: {violated} of {sum(row['rows'] for row in bounds)} rows violate it; bound over error, median:")
    for row in bounds:
        print(f"  {row['model']:14s} {row['setting']:9s} {row['layer']:26s} {row['median_bound_over_error']:10.1f}")
    below = certificates.below(groups, certificates.COVERAGE)
    for line in below:
        print(f"MISSED {line}")
    if args.out:
        data = {
            **environment(args.device),
            "model": Path(args.model).name,
            "text": Path(args.text).name,
            "factor": certificates.FACTOR,
            "windows": args.windows,
            "context": args.context,
            "rows": [group.to_dict() for group in groups],
            "worst_case": bounds,
            "missed": below,
        }
        write_json(args.out, data)
    return 1 if violated or below else 0


if __name__ == "__main__":
    _script.run(main)
