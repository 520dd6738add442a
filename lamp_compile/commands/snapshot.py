"""``lamp-compile snapshot``: the canonical text of graphs and plans, to commit, and to check in CI."""

from __future__ import annotations

import argparse
from pathlib import Path

from lamp_compile.commands import _output
from lamp_compile.errors import InputError, OptionError

NAME, HELP = "snapshot", "canonical text of a graph or plan, to commit and to compare with"
DIFFERENT = 3
SUFFIX = ".lamp.txt"


def add(parser: argparse.ArgumentParser) -> None:
    """State the options."""
    parser.add_argument(
        "files", metavar="FILE", nargs="+", help="ONNX file, torch.export archive (.pt2) or plan (.json)"
    )
    parser.add_argument("-o", "--output", metavar="FILE", help="write it there instead of printing it (one FILE only)")
    parser.add_argument("--write", action="store_true", help=f"write each to FILE{SUFFIX}, beside the original")
    parser.add_argument("--check", action="store_true", help=f"compare each with FILE{SUFFIX}; exit 3 when one differs")
    parser.add_argument("--weights", action="store_true", help="hash the values of parameters too")


def run(args: argparse.Namespace) -> int:
    """Print, write or check."""
    from lamp_compile.diff.inputs import snapshot

    if sum((bool(args.output), args.write, args.check)) > 1:
        raise OptionError("--output, --write and --check exclude each other", where="options", fix="one of them")
    if len(args.files) > 1 and not (args.write or args.check):
        raise OptionError(f"{len(args.files)} files to print", where="options", fix="--write or --check, or one FILE")
    if args.check:
        return _check(args)
    made = [(Path(name), snapshot(name, weights=args.weights)) for name in args.files]
    written = []
    for path, found in made:
        text = found.text()
        target = Path(args.output) if args.output else _beside(path) if args.write else None
        if target is None:
            if args.json:
                _output.print_json({"file": str(path), "operations": found.nodes(), "snapshot": text})
            else:
                print(text, end="")
            continue
        _output.write(target, text)
        written.append({"file": str(path), "operations": found.nodes(), "snapshot": str(target)})
        if not args.json:
            print(f"wrote {target} ({found.nodes():,} operations)")
    if args.json and written:
        _output.print_json({"written": written})
    return 0


def _check(args: argparse.Namespace) -> int:
    """Each file against the snapshot beside it."""
    from lamp_compile.diff import api, reporters

    results = []
    for name in args.files:
        saved = _beside(Path(name))
        if not saved.is_file():
            raise InputError(
                f"{name} has no snapshot", where=str(saved), fix=f"lamp-compile snapshot --write {name}, and commit it"
            )
        results.append((name, api.compare(saved, name, weights=args.weights)))
    if args.json:
        _output.print_json({"files": [{"file": name, **found.to_dict()} for name, found in results]})
    else:
        for name, found in results:
            if not found.same:
                print(reporters.render(found, "text", 20), end="")
                print(f"  accept it with: lamp-compile snapshot --write {name}")
    return 0 if all(found.same for _, found in results) else DIFFERENT


def _beside(path: Path) -> Path:
    return path.with_name(path.name + SUFFIX)
