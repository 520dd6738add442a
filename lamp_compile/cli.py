"""``lamp-compile``: exit codes 0 done, 1 error, 2 usage, 3 a limit was exceeded or something differs."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from lamp_compile import __version__
from lamp_compile.commands import (
    _output,
    bisect,
    calibrate,
    compile,
    diff,
    doctor,
    evaluate,
    explain,
    export,
    frontier,
    rewrite,
    run,
    snapshot,
    train_lookahead,
    tune,
)
from lamp_compile.errors import LampError

COMMANDS = (
    run,
    explain,
    evaluate,
    frontier,
    compile,
    calibrate,
    export,
    rewrite,
    tune,
    train_lookahead,
    bisect,
    diff,
    snapshot,
    doctor,
)
LIGHT = ("doctor", "diff", "snapshot")
"""Commands that load no model of transformers."""
EPILOG = "exit codes: 0 done, 1 error, 2 usage, 3 a limit was exceeded, or something differs"


def parser() -> argparse.ArgumentParser:
    """The command line, all subcommands included."""
    made = argparse.ArgumentParser(
        prog="lamp-compile", description="Look-ahead mixed precision for transformer attention.", epilog=EPILOG
    )
    made.add_argument("--version", action="version", version=f"lamp-compile {__version__}")
    chosen = made.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        sub = chosen.add_parser(command.NAME, help=command.HELP, description=command.__doc__, epilog=EPILOG)
        command.add(sub)
        sub.add_argument("--json", action="store_true", help="one JSON object on standard output")
        sub.set_defaults(run=command.run)
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; gives back the exit code.

    Raises:
        SystemExit: On ``--help``, ``--version`` (0) and usage errors (2), as argparse does.
    """
    args = parser().parse_args(argv)
    _output.print_anything()
    if args.command not in LIGHT:
        _output.quiet_loading()
    try:
        code: int = args.run(args)
    except LampError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except ModuleNotFoundError as error:
        # Only what is not ours: a missing module of lamp_compile itself is a bug, to be shown as one.
        if not error.name or error.name.split(".")[0] == "lamp_compile":
            raise
        missing = LampError(
            f"the package {error.name.split('.')[0]} is not installed",
            where=f"python {sys.executable}",
            fix="pip install 'lamp_compile[hf]'",
        )
        print(f"error: {missing}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        # The reader has gone (`| head`). Python would complain once more when it flushes standard output at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return code


if __name__ == "__main__":
    sys.exit(main())
