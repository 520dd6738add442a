"""``lamp-compile frontier``: bits against KL against tokens per second, over presets, tau and formats."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lamp_compile.commands import _options, _output
from lamp_compile.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from lamp_compile.quality.frontier import Point, Setting

NAME, HELP = "frontier", "a table of bits, KL and tokens per second over presets, tau and formats"
CONTEXT, TOKENS = 1024, 8192
PROMPT, NEW = 1024, 64


def add(parser: argparse.ArgumentParser) -> None:
    """State the options."""
    _options.model(parser)
    _options.text(parser)
    parser.set_defaults(max_tokens=TOKENS)
    parser.add_argument(
        "--tau", type=_options.limit, action="append", metavar="X",
        help="tau of the sweep; may be repeated (default: 0.1, 0.03, 0.01, 0.003, 0)",
    )  # fmt: skip
    parser.add_argument("--plan", metavar="FILE", help="a plan to add as a row")
    parser.add_argument("--no-speed", action="store_true", help="leave the times out")
    parser.add_argument(
        "--prompt-tokens", type=_options.positive, default=PROMPT, metavar="N",
        help="tokens of the text that generation continues (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--max-new-tokens", type=_options.positive, default=NEW, metavar="N",
        help="tokens to write (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--mode", choices=("auto", "default", "eager", "reduce-overhead"), default="auto",
        help="as of lamp_compile.compile, for the times",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Measure and print."""
    from lamp_compile import api
    from lamp_compile.commands import _measure
    from lamp_compile.plan import Plan
    from lamp_compile.quality import frontier
    from lamp_compile.quality.engine import CompiledEngine
    from lamp_compile.quality.environment import environment
    from lamp_compile.quality.sensitivity import Bench

    plan = None if args.plan is None else Plan.load(args.plan)
    wanted = frontier.settings(tuple(args.tau) if args.tau else frontier.TAUS, plan)
    args.linears = args.preset = args.balance = None
    measured = _measure.prepare(args, usual=CONTEXT)
    prompt = None if args.no_speed else _prompt(args, measured)
    step = _output.progress(len(wanted) * (1 if args.no_speed else 2) + 1, "frontier")
    points = frontier.measure(
        wanted,
        lambda setting: api.compile(measured.model, mode="eager", **setting.options),
        lambda fast: Bench(measured.model, CompiledEngine(fast), measured.windows),
        step,
    )
    if prompt is not None:
        points = _with_times(args, wanted, points, prompt, step)
    head = {**environment(args.device), **measured.describe(args)}
    if args.json:
        times = {} if prompt is None else {
            "prompt_tokens": prompt.shape[1], "new_tokens": args.max_new_tokens, "mode": args.mode
        }  # fmt: skip
        _output.print_json({**head, **times, "rows": [point.to_dict() for point in points]})
    else:
        where = f"{head['windows']} windows of {head['context']} tokens; {head['device']}"
        print(f"{head['model']} on {head['text']}: {where}")
        print(frontier.table(points))
    return 0


def _prompt(args: argparse.Namespace, measured: Any) -> Tensor:
    from lamp_compile.commands import _measure
    from lamp_compile.quality import load, windows

    encode = None if args.text.endswith(".u16") else load.encoder(args.model)
    ids = windows.token_ids(args.text, encode)
    room = min(_measure.longest_context(measured.model) - args.max_new_tokens, ids.numel())
    if args.prompt_tokens > room:
        raise InputError(
            f"{args.prompt_tokens} prompt tokens and {args.max_new_tokens} new ones: there is room for {room}",
            where="--prompt-tokens", fix="a shorter prompt, or --no-speed",
        )  # fmt: skip
    return ids[None, : args.prompt_tokens]


def _with_times(
    args: argparse.Namespace, wanted: list[Setting], points: list[Point], prompt: Tensor, step: Callable[[str], None]
) -> list[Point]:
    """Every row with its time, behind that of the model without LAMP, in the dtype the model is stored in."""
    from lamp_compile import api
    from lamp_compile.quality import frontier, load
    from lamp_compile.runtime import kernel_notes

    model = load.load_model(args.model, dtype="auto", device=args.device)
    prompt = prompt.to(model.device)
    base, stored = frontier.timed(model, prompt, args.max_new_tokens)
    positions = points[0].positions
    found = [
        frontier.Point("uncompiled", 16.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, positions, base, 1.0, stored)
    ]  # fmt: skip
    step("uncompiled")
    for setting, point in zip(wanted, points, strict=True):
        fast = api.compile(model, mode=args.mode, **setting.options)
        per_s, stored = frontier.timed(fast, prompt, args.max_new_tokens)
        notes = fast.lamp.report().notes
        kernels = not any(note.startswith(kernel_notes.START) for note in notes)
        found.append(replace(point, tokens_per_s=per_s, speed=per_s / base, kv_bytes=stored, kernels=kernels))
        step(setting.name)
    return found
