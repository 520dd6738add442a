"""``lamp-compile rewrite``: give every attention of an ONNX file look-ahead mixed precision."""

from __future__ import annotations

import argparse

from lamp_compile.commands import _options, _output
from lamp_compile.errors import OptionError
from lamp_compile.plan import PRESETS

NAME, HELP = "rewrite", "ONNX in, ONNX out: rewrite the attention of a file, report what stays and why"


def add(parser: argparse.ArgumentParser) -> None:
    """State the options."""
    parser.add_argument("model", metavar="MODEL.onnx", help="the file to read; it stays as it is")
    parser.add_argument("output", metavar="OUT.onnx", nargs="?", help="the file to write; external data goes beside it")
    parser.add_argument("--dry-run", action="store_true", help="report only, write nothing")
    parser.add_argument("--preset", choices=sorted(PRESETS), help="starting point of the plan (default: balanced)")
    _options.settings(parser)
    parser.add_argument("--plan", metavar="FILE", help="use this plan instead")
    parser.add_argument("--fuel", type=int, metavar="N", help="rewrite only the first N sites, to find one that hurts")
    parser.add_argument(
        "--guard", choices=("if", "select"), default="if",
        help="read residual planes inside an If, or without control flow (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--domain", action="append", default=[], metavar="NAME", dest="domains",
        help="operator domain to accept besides the known ones; may be repeated; '*' is any",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Rewrite the file and print the report."""
    if (args.output is None) != args.dry_run:
        what = "nowhere to write to" if args.output is None else "--dry-run beside a file to write"
        raise OptionError(what, where="OUT.onnx", fix="name a file, or give --dry-run")
    from lamp_compile.frontends.onnx.rewriting.rewrite import rewrite_onnx

    given = {name: getattr(args, name) for name in ("preset", "plan") if getattr(args, name) is not None}
    done = rewrite_onnx(
        args.model, args.output, fuel=args.fuel, guard=args.guard, domains=args.domains, **given, **dict(args.settings)
    )
    if args.json:
        _output.print_json({"output": args.output, **done.report.to_dict()})
        return 0
    print(done.report.text())
    for title, text in (("before", done.report.before), ("after", done.report.after)):
        if text:
            print(f"\none site {title}:\n{text}")
    if args.output is not None:
        print(f"\nwrote {args.output}")
    return 0
