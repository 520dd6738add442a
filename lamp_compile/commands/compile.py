"""``lamp-compile compile``: write the plan, to read, edit and pass back."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from lamp_compile.commands import _options, _output
from lamp_compile.errors import InputError

NAME, HELP = "compile", "write the plan for a model"
CONTEXT, WINDOWS = 512, 4
"""Windows of text on which linear layers are measured, at most."""


def add(parser: argparse.ArgumentParser) -> None:
    """State the options."""
    _options.model(parser)
    _options.plan(parser)
    parser.add_argument(
        "--linears-text", metavar="FILE",
        help="choose INT8 linear layers by what they cost on this text (UTF-8, or token ids in a *.u16 file)",
    )  # fmt: skip
    parser.add_argument(
        "--linears-kl", type=_options.limit, default=1e-4, metavar="X",
        help="mean KL that all INT8 layers together may cost on it (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "-o", "--output", required=True, metavar="FILE", help="where to write the plan, such as plan.json"
    )


def run(args: argparse.Namespace) -> int:
    """Make the plan and write it."""
    from lamp_compile import api
    from lamp_compile.quality import load

    model = load.load_model(args.model, device=args.device)
    options = _options.compile_options(args)
    if args.linears_text is not None:
        options["linears"] = _calibrated(args, model)
    fast = api.compile(model, mode="eager", **options)
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


def _calibrated(args: argparse.Namespace, model: Any) -> Any:
    """Rows for linear layers, by the text."""
    from lamp_compile.commands import _measure
    from lamp_compile.frontends.linears import find
    from lamp_compile.quality import linears, load

    if args.plan is not None or args.linears not in (None, "auto"):
        raise InputError("--linears-text chooses the layers", where="--linears-text", fix="no --plan, --linears auto")
    context = min(CONTEXT, _measure.longest_context(model))
    windows = load.load_windows(model, args.model, args.linears_text, context, WINDOWS)
    step = _output.progress(len(find(model)), "linears")
    return linears.calibrate(model, windows, budget=args.linears_kl, on_layer=step)
