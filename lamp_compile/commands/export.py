"""``lamp-compile export``: a decoder as one ONNX file, verified on the user's text, with a report beside it."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from lamp_compile.commands import _options, _output
from lamp_compile.errors import LimitError, OptionError

NAME, HELP = "export", "write a LAMP-enabled ONNX file and its report"
LIMIT_EXCEEDED = 3
CONTEXT, MAX_TOKENS = 256, 1024


def add(parser: argparse.ArgumentParser) -> None:
    """State the options."""
    _options.model(parser)
    _options.plan(parser)
    _options.text(parser)
    parser.set_defaults(max_tokens=MAX_TOKENS)
    parser.add_argument("-o", "--output", required=True, metavar="FILE", help="where to write, such as model.onnx")
    parser.add_argument(
        "--target", choices=("portable", "cpu", "cuda", "migraphx"), default="portable",
        help="what it is to run on (default: portable, any ONNX Runtime)",
    )  # fmt: skip
    parser.add_argument(
        "--guard", choices=("if", "select"), help="control flow, or none (default: select for cuda and migraphx)"
    )
    parser.add_argument(
        "--max-kl", type=_options.limit, metavar="X", help="exit 3, and write nothing, above this mean KL"
    )
    parser.add_argument(
        "--min-agreement", type=_options.share, metavar="Y",
        help="exit 3, and write nothing, below this agreement with the float model (0 to 1)",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Export, verify, and say what was measured."""
    from lamp_compile.commands import _measure
    from lamp_compile.frontends.onnx.exporting import report
    from lamp_compile.onnx_export import export_onnx

    options = _options.compile_options(args)
    if options.pop("linears", "never") != "never":
        raise OptionError("linear layers are exported in float", where="--linears", fix="leave it out")
    if args.context is None:
        args.context = CONTEXT
    measured = _measure.prepare(args)
    try:
        made = export_onnx(
            measured.model, measured.windows, args.output, target=args.target, guard=args.guard, max_kl=args.max_kl,
            min_agreement=args.min_agreement, **options,
        )  # fmt: skip
    except LimitError as error:
        print(f"over the limit: {error}")
        return LIMIT_EXCEEDED
    if args.json:
        about = {"path": str(made.path), "report": str(made.report_path), "target": made.target, "guard": made.guard}
        _output.print_json({**about, "plan": asdict(made.report.plan), "verification": made.verification.to_dict()})
        return 0
    print(made.report.text())
    print(f"verified on {made.verification.what}")
    print(report.table(made.verification))
    print(f"wrote {made.path} and {made.report_path}")
    return 0
