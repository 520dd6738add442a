"""``lamp-compile tune``: measure how the GPU kernels cut their work best, and write it into a plan."""

from __future__ import annotations

import argparse
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from lamp_compile.commands import _options, _output
from lamp_compile.errors import InputError

NAME, HELP = "tune", "measure how the GPU kernels run fastest here, and write it into a plan"
KEEP_ORIGINAL = "measured slower than bf16 SDPA"


def add(parser: argparse.ArgumentParser) -> None:
    """State the options."""
    _options.model(parser)
    parser.set_defaults(device="cuda")  # what there is to tune
    _options.plan(parser)
    parser.add_argument(
        "--case", action="append", type=_case, metavar="BATCHxTOKENS", dest="cases",
        help="sequences and cached tokens of each to tune for; may be repeated, the first decides the plan "
        "(default: 8x16384)",
    )  # fmt: skip
    parser.add_argument("--share", type=_options.share, default=0.1, help="refined share to impose (default: 0.1)")
    parser.add_argument("-o", "--output", metavar="FILE", help="write the plan here, with what was measured")


def run(args: argparse.Namespace) -> int:
    """Measure the cases and write the plan."""
    import torch

    from lamp_compile import api
    from lamp_compile.quality import load, tune
    from lamp_compile.runtime import kernels

    device = load.checked_device(args.device)
    if reason := tune.nothing_on(torch.device(device)):
        raise InputError(f"nothing to tune: {reason}", where=f"--device {args.device}", fix="a CUDA or ROCm device")
    model = load.load_model(args.model, device=args.device)
    fast = api.compile(model, mode="eager", **_options.compile_options(args))
    plan, sites = fast.lamp.plan, [site for site in fast.lamp.sites if not site.reason]
    site, done = sites[0], []
    for batch, length in args.cases or [(8, 16384)]:
        tune.check_length(length)
        shape = tune.Shape(batch, length, site.heads, site.kv_heads, site.head_dim, site.value_dim)
        bench = tune.Bench(shape, plan.site(site.name), torch.device(device), args.share)
        done.append(tune.tune(bench, (lambda text: None) if args.json else print))
    name = kernels.target_name(torch.device(device))
    plan = replace(plan, launch={**plan.launch, name: done[0].launch})
    if done[0].ratio < 1:
        reason = f"{KEEP_ORIGINAL} at {done[0].shape.name} on {name}: {done[0].ratio:.2f} times as fast"
        rows = tuple(replace(row, apply=False, reason=reason) if row.apply else row for row in plan.sites)
        plan = replace(plan, sites=rows)
    if args.output:
        plan.save(Path(args.output))
    _report(args, name, done, plan)
    return 0


def _report(args: argparse.Namespace, target: str, done: list[Any], plan: Any) -> None:
    rows = [{**asdict(one), "launch": one.launch.text(), "ratio_to_bf16": one.ratio} for one in done]
    if args.json:
        _output.print_json({"target": target, "cases": rows, "plan": args.output})
        return
    for one in done:
        print(
            f"{one.shape.name:>12} on {target}: {one.best_ms:.4f} ms (defaults {one.default_ms:.4f}), bf16 "
            f"{one.bf16_ms:.4f} ms, {one.ratio:.2f} times as fast; {one.launch.text() or 'the defaults'}"
        )
    if not all(row.apply for row in plan.sites):
        print(f"the plan keeps the original attention: {next(row.reason for row in plan.sites if not row.apply)}")
    if args.output:
        print(f"wrote {args.output}")


def _case(value: str) -> tuple[int, int]:
    """``8x16384``."""
    parts = value.split("x")
    if len(parts) != 2 or not all(part.isdigit() and int(part) for part in parts):
        raise argparse.ArgumentTypeError(f"{value} is no case: sequences x tokens, such as 8x16384")
    return int(parts[0]), int(parts[1])
