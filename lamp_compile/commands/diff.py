"""``lamp-compile diff``: what changed between two graphs, plans or snapshots. Exit 0 same, 3 different."""

from __future__ import annotations

import argparse
from pathlib import Path

from lamp_compile import _plugins
from lamp_compile.commands import _options, _output
from lamp_compile.errors import OptionError

NAME, HELP = "diff", "what changed between two ONNX files, exported programs, plans or snapshots"
DIFFERENT = 3
SIDE = "ONNX file, torch.export archive (.pt2), plan (.json) or snapshot (.lamp.txt)"


def add(parser: argparse.ArgumentParser) -> None:
    """State the options."""
    parser.add_argument("a", metavar="A", help=f"before: {SIDE}")
    parser.add_argument("b", metavar="B", help="after: any of these")
    parser.add_argument(
        "--format", choices=_plugins.names("diff/reporters"), help="how the report is written (default: text)"
    )
    parser.add_argument("-o", "--output", metavar="FILE", help="write the report to a file, and print it as text")
    parser.add_argument(
        "--allow", action="append", default=[], metavar="RULE", type=_rule,
        help="an expected change: TIER[@WHERE][#SUBJECT], shell patterns; may be repeated",
    )  # fmt: skip
    parser.add_argument("--allow-file", metavar="FILE", help="rules, one a line")
    parser.add_argument(
        "--limit", type=_count, default=20, metavar="N", help="differences shown per tier, 0 = all (default: 20)"
    )
    parser.add_argument("--weights", action="store_true", help="compare the values of parameters too")
    parser.add_argument(
        "--numerics", action="store_true", help="run both on the same random inputs and compare outputs"
    )
    parser.add_argument("--seed", type=_count, default=0, metavar="N", help="of those inputs (default: 0)")
    parser.add_argument(
        "--tolerance", type=_options.limit, metavar="X",
        help="largest difference of an output over its largest value (default: 1e-5)",
    )  # fmt: skip
    parser.add_argument(
        "--size", action="append", default=[], metavar="NAME=N", type=_size,
        help="a symbolic size of those inputs, such as d1=64; may be repeated",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Compare, and write the report."""
    from lamp_compile.diff import api, reporters, rules

    if not args.numerics and (args.size or args.tolerance is not None):
        raise OptionError("--size and --tolerance are for --numerics", where="options", fix="add --numerics")
    if args.json and args.format not in (None, "json"):
        raise OptionError(f"--json next to --format {args.format}", where="options", fix="one of the two")
    allow = [*args.allow, *(rule.text for rule in (rules.read(args.allow_file) if args.allow_file else ()))]
    found = api.compare(
        args.a, args.b, allow=allow, weights=args.weights, numerics=args.numerics, seed=args.seed,
        tolerance=api.TOLERANCE if args.tolerance is None else args.tolerance, sizes=dict(args.size),
    )  # fmt: skip
    name = "json" if args.json else args.format or "text"
    text = reporters.render(found, name, args.limit)
    if args.output:
        _output.write(Path(args.output), text)
    print(text if args.json or not args.output else reporters.render(found, "text", args.limit), end="")
    if args.output and not args.json:
        print(f"wrote {args.output}")
    return 0 if found.same else DIFFERENT


def _rule(text: str) -> str:
    from lamp_compile.diff import rules

    try:
        return rules.parse(text).text
    except OptionError as error:
        raise argparse.ArgumentTypeError(f"{error.what} ({error.fix})") from None


def _count(value: str) -> int:
    number = int(value)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{value} is below 0")
    return number


def _size(value: str) -> tuple[str, int]:
    name, equals, number = value.partition("=")
    if not equals or not name or not number.isdigit() or int(number) < 1:
        raise argparse.ArgumentTypeError(f"{value!r} is not NAME=N with a whole number above 0")
    return name, int(number)
