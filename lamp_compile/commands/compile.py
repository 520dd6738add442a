"""``lamp-compile compile``: write the plan, to read, edit and pass back."""

from __future__ import annotations

import argparse
from pathlib import Path

from lamp_compile.commands import _options, _output
from lamp_compile.errors import InputError

NAME, HELP = "compile", "write the plan for a model"


def add(parser: argparse.ArgumentParser) -> None:
    """State the options."""
    _options.model(parser)
    _options.plan(parser)
    parser.add_argument(
        "-o", "--output", required=True, metavar="FILE", help="where to write the plan, such as plan.json"
    )


def run(args: argparse.Namespace) -> int:
    """Make the plan and write it."""
    from lamp_compile import api
    from lamp_compile.quality import load

    model = load.load_model(args.model, device=args.device)
    fast = api.compile(model, mode="eager", **_options.compile_options(args))
    report = fast.lamp.report()
    path = Path(args.output)
    try:
        report.plan.save(path)
    except OSError as error:
        raise InputError(f"cannot write the plan: {error.strerror}", where=str(path), fix="another path") from None
    if args.json:
        _output.print_json({"plan": str(path), "rewritten": report.rewritten, "sites": len(report.sites)})
    else:
        print(report.text())
        print(f"wrote {path}")
    return 0
