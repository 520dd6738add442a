"""``lamp-compile eval``: what the plan costs on the user's text, against controls and on an outlier twin."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from lamp_compile import _plugins
from lamp_compile.commands import _options, _output
from lamp_compile.errors import InputError, ModelError

if TYPE_CHECKING:
    from lamp_compile.commands._measure import Measured
    from lamp_compile.quality.evaluate import Row
    from lamp_compile.quality.hard import LayerRow, TaskRow

NAME, HELP = "eval", "measure what the plan costs on a text, against controls"
BUDGET_EXCEEDED = 3
DEFAULT_TWIN = 30.0
LAYER_WINDOWS = 2


def add(parser: argparse.ArgumentParser) -> None:
    """State the options."""
    _options.model(parser)
    _options.text(parser)
    _options.plan(parser)
    twin = parser.add_mutually_exclusive_group()
    twin.add_argument(
        "--twin",
        type=_options.factor,
        metavar="S",
        help="key channels of the outlier twin are S times as large (default: 30, where the model can have a twin)",
    )
    twin.add_argument("--no-twin", action="store_true", help="leave the rows of the outlier twin out")
    parser.add_argument(
        "--pairs", choices=("any", "slow"), default="any", help="RoPE pairs that the twin scales (default: any)"
    )
    parser.add_argument(
        "--lookahead", metavar="FILE", help="measure this look-ahead network too, at the refined share of `lamp`"
    )
    parser.add_argument(
        "--tasks",
        action="append",
        choices=("all", *_plugins.names("quality/tasks")),
        help="also measure a task that is hard for a small cache, and how errors build up over layers; may be repeated",
    )
    parser.add_argument(
        "--samples",
        type=_options.positive,
        default=4,
        metavar="N",
        help="sequences of a task (default: %(default)s)",
    )
    parser.add_argument(
        "--max-kl", type=_options.limit, metavar="X", help="exit 3 when the mean KL of a `lamp` row is above X"
    )
    parser.add_argument(
        "--min-agreement",
        type=_options.share,
        metavar="Y",
        help="exit 3 when the agreement of a `lamp` row is below Y (0 to 1)",
    )
    parser.add_argument(
        "--certificate",
        action="store_true",
        help="compare the error estimate of every output row with the true error instead, by layer, length and twin",
    )
    parser.add_argument(
        "--min-coverage",
        type=_options.share,
        metavar="Y",
        help="with --certificate: exit 3 when fewer of the plan's rows are within the documented factor (0 to 1)",
    )


def run(args: argparse.Namespace) -> int:
    """Measure, print, and compare with the limits.

    Raises:
        InputError: A limit of one table was given with the other.
    """
    if args.certificate and (args.max_kl is not None or args.min_agreement is not None):
        raise InputError("--max-kl and --min-agreement limit other rows", where="--certificate", fix="--min-coverage")
    if args.certificate and args.tasks:
        raise InputError("tasks are another table", where="--tasks", fix="two calls, one with --certificate")
    if args.min_coverage is not None and not args.certificate:
        raise InputError("--min-coverage limits rows that are not measured", where="eval", fix="add --certificate")
    return _certificate(args) if args.certificate else _rows(args)


def _certificate(args: argparse.Namespace) -> int:
    """The certificate against the true error."""
    from lamp_compile import api
    from lamp_compile.commands import _measure
    from lamp_compile.quality import certificates
    from lamp_compile.quality.environment import environment
    from lamp_compile.quality.twin import outlier_twin

    measured = _measure.prepare(args)
    options = _options.compile_options(args)
    step = _output.progress(measured.windows.shape[0] * (1 if args.no_twin else 2), "certificate")
    meter, notes = certificates.Meter(), []
    plan = api.compile(measured.model, mode="eager", **options).lamp.plan
    meter.measure(measured.model, plan, measured.windows, on_window=step)
    try:
        if not args.no_twin:
            scale = args.twin or DEFAULT_TWIN
            twin = outlier_twin(measured.model, scale, pairs=args.pairs)
            plan = api.compile(twin, mode="eager", **options).lamp.plan
            meter.measure(twin, plan, measured.windows, f"twin {scale:g} {args.pairs}", step)
    except ModelError as error:
        if args.twin:
            raise
        notes.append(f"no rows of an outlier twin: {error.what}")
    groups = meter.groups()
    exceeded = [] if args.min_coverage is None else certificates.below(groups, args.min_coverage)
    if args.json:
        head = {**environment(args.device), **measured.describe(args), "factor": certificates.FACTOR}
        rows = [group.to_dict() for group in groups]
        _output.print_json({**head, "rows": rows, "notes": notes, "exceeded": exceeded})
    else:
        print(certificates.table(groups))
        for line in [*(f"note: {note}" for note in notes), *(f"below the limit: {line}" for line in exceeded)]:
            print(line)
    return BUDGET_EXCEEDED if exceeded else 0


def _rows(args: argparse.Namespace) -> int:
    """Rows of KV precisions."""
    from lamp_compile.commands import _measure
    from lamp_compile.quality import evaluate, hard, rows
    from lamp_compile.quality.environment import environment
    from lamp_compile.quality.network.row import lamp_network

    measured = _measure.prepare(args)
    wanted = list(rows.STANDARD)
    twins = [] if args.no_twin else [spec.on_twin(args.twin or DEFAULT_TWIN, args.pairs) for spec in rows.TWIN]
    total = len(wanted) + len(twins) + (args.lookahead is not None)
    step = _output.progress(total * measured.windows.shape[0], "eval")
    evaluation = measured.evaluation(args, step)
    network = None if args.lookahead is None else measured.network_engine(args)
    done, notes = evaluation.measure_all(wanted), []
    if network is not None:
        done.append(lamp_network(evaluation, network))
    try:
        done += evaluation.measure_all(twins)
    except ModelError as error:
        if args.twin:
            raise
        notes.append(f"no rows of an outlier twin: {error.what}")
    task_rows, layer_rows = _tasks(args, measured) if args.tasks else ([], [])
    exceeded = over_limits(done, args.max_kl, args.min_agreement)
    if args.json:
        head = {**environment(args.device), **measured.describe(args)}
        lists = {"rows": [row.to_dict() for row in done]}
        if args.tasks:
            lists |= {"tasks": [r.to_dict() for r in task_rows], "layers": [r.to_dict() for r in layer_rows]}
        _output.print_json({**head, **lists, "notes": notes, "exceeded": exceeded})
    else:
        about = measured.describe(args)
        count = f"{about['windows']} window{'s' if about['windows'] > 1 else ''}"
        print(f"{about['model']} on {about['text']}: {count} of {about['context']} tokens")
        print(evaluate.table(done))
        if args.tasks:
            print(hard.table(task_rows))
            print(hard.layers_table(layer_rows))
        for note in notes:
            print(f"note: {note}")
        for line in exceeded:
            print(f"over the limit: {line}")
    return BUDGET_EXCEEDED if exceeded else 0


def _tasks(args: argparse.Namespace, measured: Measured) -> tuple[list[TaskRow], list[LayerRow]]:
    """The tasks that were asked for, and the build-up over layers on the first windows."""
    from lamp_compile.quality import hard, load, tasks
    from lamp_compile.quality.tasks._base import Material

    chosen = [task for name, task in tasks.all_tasks().items() if "all" in args.tasks or name in args.tasks]
    encode = load.encoder(args.model) if any(task.needs_tokenizer for task in chosen) else None
    context, engine = measured.windows.shape[1], measured.engine(args)
    material = Material(measured.model, measured.ids, encode, context, args.samples)
    step = _output.progress(len(chosen) * args.samples * len(hard.ROWS), "tasks")
    rows = [row for task in chosen for row in hard.measure(task, material, engine, on_run=step)]
    return rows, hard.layers(measured.windows[:LAYER_WINDOWS], measured.model, engine)


def over_limits(done: list[Row], max_kl: float | None, min_agreement: float | None) -> list[str]:
    """What the rows called ``lamp`` exceed, in words. A value that is no number is over every limit."""
    found = []
    for row in done:
        if row.name != "lamp":
            continue
        on = f" on the twin {row.twin:g}" if row.twin else ""
        if max_kl is not None and not row.kl <= max_kl:
            found.append(f"KL {row.kl:.2e}{on}, --max-kl {max_kl:.2e}")
        if min_agreement is not None and not row.agreement >= min_agreement:
            found.append(f"agreement {row.agreement:.4f}{on}, --min-agreement {min_agreement:.4f}")
    return found
