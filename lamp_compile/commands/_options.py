"""Options that several subcommands share."""

from __future__ import annotations

import argparse
import json
import math
from typing import Any

from lamp_compile.plan import PRESETS


def model(parser: argparse.ArgumentParser) -> None:
    """``MODEL`` and ``--device``."""
    parser.add_argument("model", metavar="MODEL", help="local folder with config.json and *.safetensors")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")


def plan(parser: argparse.ArgumentParser, *, given: bool = True) -> None:
    """What decides the plan: ``--preset``, ``--balance`` and ``--set``; or ``--plan``, and ``--linears``, where
    ``given``."""
    parser.add_argument("--preset", choices=sorted(PRESETS), help="starting point of the plan (default: balanced)")
    parser.add_argument("--balance", choices=("auto", "always", "never"), help="balance key channels (default: auto)")
    settings(parser)
    if not given:
        parser.set_defaults(linears=None, plan=None)
        return
    parser.add_argument(
        "--linears", choices=("never", "auto", "int8", "int8_dynamic"),
        help="linear layers in INT8 on a CPU: auto where measured faster (default: never)",
    )  # fmt: skip
    parser.add_argument("--plan", metavar="FILE", help="use this plan instead (see `lamp-compile compile`)")


def settings(parser: argparse.ArgumentParser) -> None:
    """``--set``."""
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", type=_setting, dest="settings",
        help="field of every site of the plan, such as tau=0.02 or k_format=fp8; may be repeated",
    )  # fmt: skip


def text(parser: argparse.ArgumentParser) -> None:
    """``--text``, ``--context`` and ``--max-tokens``."""
    parser.add_argument("--text", required=True, metavar="FILE", help="UTF-8 text, or token ids in a *.u16 file")
    parser.add_argument(
        "--context", type=positive, metavar="N", help="tokens of a window (default: the model's, at most 4096)"
    )
    parser.add_argument(
        "--max-tokens",
        type=positive,
        default=65536,
        metavar="N",
        help="tokens to measure on, spread over the text (default: %(default)s)",
    )


def compile_options(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of ``lamp_compile.compile`` that the command line gave; nothing that it left open."""
    given = {
        name: getattr(args, name)
        for name in ("preset", "balance", "linears", "plan")
        if getattr(args, name) is not None
    }
    return {**given, **dict(args.settings)}


def positive(value: str) -> int:
    """A whole number above 0."""
    number = int(value)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{value} is not above 0")
    return number


def limit(value: str) -> float:
    """A finite number, 0 or more."""
    number = float(value)
    if not (math.isfinite(number) and number >= 0):
        raise argparse.ArgumentTypeError(f"{value} is no limit: a number, 0 or more")
    return number


def factor(value: str) -> float:
    """A finite number above 0."""
    number = float(value)
    if not (math.isfinite(number) and number > 0):
        raise argparse.ArgumentTypeError(f"{value} is no factor: a number above 0, such as 30")
    return number


def share(value: str) -> float:
    """A number from 0 to 1."""
    number = float(value)
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"{value} is no share: a number from 0 to 1, such as 0.98")
    return number


def _setting(value: str) -> tuple[str, Any]:
    name, equals, raw = value.partition("=")
    if not equals or not name:
        raise argparse.ArgumentTypeError(f"{value!r} is not NAME=VALUE")
    try:
        return name, json.loads(raw)
    except json.JSONDecodeError:
        return name, raw
