"""``lamp-compile explain``: what would be done to a model, and why."""

from __future__ import annotations

import argparse

from lamp_compile.commands import _options, _output

NAME, HELP = "explain", "say which attentions are claimed, which refused and why, and show one before and after"


def add(parser: argparse.ArgumentParser) -> None:
    """State the options."""
    _options.model(parser)
    _options.plan(parser)


def run(args: argparse.Namespace) -> int:
    """Print the report."""
    from lamp_compile import api
    from lamp_compile.quality import load

    model = load.load_model(args.model, device=args.device)
    report = api.explain(model, **_options.compile_options(args))
    if args.json:
        _output.print_json(report.to_dict())
        return 0
    print(report.text())
    for title, text in (("before", report.before), ("after", report.after)):
        if text:
            print(f"\none site {title}:\n{text}")
    return 0
