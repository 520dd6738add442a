"""``lamp-compile bisect``: the first site whose rewrite takes the KL over a limit."""

from __future__ import annotations

import argparse

from lamp_compile.commands import _options, _output

NAME, HELP = "bisect", "find the first site that takes the error over a limit"
FOUND = 3


def add(parser: argparse.ArgumentParser) -> None:
    """State the options."""
    _options.model(parser)
    _options.text(parser)
    _options.plan(parser)
    parser.add_argument(
        "--max-kl",
        type=_options.limit,
        required=True,
        metavar="X",
        help="mean KL allowed; exit 3 when a site exceeds it",
    )
    parser.set_defaults(max_tokens=8192)


def run(args: argparse.Namespace) -> int:
    """Search, and name the site."""
    from lamp_compile import api
    from lamp_compile.commands import _measure
    from lamp_compile.quality import rows
    from lamp_compile.quality.bisect import bisect
    from lamp_compile.quality.engine import CompiledEngine

    measured = _measure.prepare(args)
    options = _options.compile_options(args)
    whole = api.compile(measured.model, mode="eager", **options)
    sites = [site.name for site in whole.lamp.plan.sites if site.apply]
    step = _output.progress((len(sites).bit_length() + 2) * measured.windows.shape[0], "bisect")
    # One evaluation for all fuels: the reference logits are computed once.
    evaluation = measured.evaluation(args, step)

    def kl(fuel: int) -> float:
        fast = api.compile(measured.model, mode="eager", fuel=fuel, **options)
        return evaluation.measure_with(CompiledEngine(fast), rows.LAMP).kl

    def say(fuel: int, value: float) -> None:
        if not args.json:
            print(f"first {fuel:3d} of {len(sites)} sites rewritten: KL {value:.2e}", flush=True)

    found = bisect(sites, kl, args.max_kl, say)
    if args.json:
        _output.print_json({**measured.describe(args), "sites": len(sites), **found.to_dict()})
    elif found.culprit is None:
        print(f"no site: all {len(sites)} together have KL {found.after:.2e}, the limit is {args.max_kl:.2e}")
    else:
        print(f"{found.culprit}: KL {found.before:.2e} without it, {found.after:.2e} with it (limit {args.max_kl:.2e})")
        print("  try:   a smaller tau, floor 1 or apply false for it in the plan (`lamp-compile compile` writes one)")
    return 0 if found.culprit is None else FOUND
