"""``lamp-compile calibrate``: a plan whose tau is measured on the user's text, site by site."""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Callable, Iterator, MutableMapping
from pathlib import Path
from typing import Any

from lamp_compile.commands import _options, _output
from lamp_compile.control_plan import ControlPlan
from lamp_compile.errors import InputError

NAME, HELP = "calibrate", "measure on a text what each layer costs, and write the plan that makes the most of its bits"
CONTEXT = 1024
TOKENS = 16384
LIMIT_EXCEEDED = 3
SAMPLED = 4096
"""Numbers of each weight that tell one model from another."""


def add(parser: argparse.ArgumentParser) -> None:
    """State the options."""
    _options.model(parser)
    _options.text(parser)
    _options.plan(parser, given=False)
    parser.set_defaults(max_tokens=TOKENS)
    parser.add_argument(
        "--max-kl", type=_options.limit, metavar="X",
        help="fewest bits with at most this mean KL (default: least KL at the bits of the preset)",
    )  # fmt: skip
    parser.add_argument(
        "--quality", type=_options.share, metavar="Q",
        help="let the plan's controller hold this agreement (0 to 1), by a relation measured on the text",
    )  # fmt: skip
    parser.add_argument("--heads", action="store_true", help="choose tau for every kv head, not for every layer")
    parser.add_argument(
        "-o", "--output", "--out", dest="output", required=True, metavar="FILE",
        help="where to write the plan; FILE.partial holds what was measured until it is done",
    )  # fmt: skip
    parser.add_argument(
        "--measurements", metavar="FILE",
        help="keep what was measured here, to calibrate other presets or limits without measuring again",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Measure, write the plan, print what was found."""
    from lamp_compile import api
    from lamp_compile.commands import _measure
    from lamp_compile.quality import calibrate
    from lamp_compile.quality.engine import CompiledEngine
    from lamp_compile.quality.environment import environment
    from lamp_compile.quality.sensitivity import Bench

    if args.linears not in (None, "never"):
        raise InputError("linear layers have a calibration of their own", where="--linears",
                         fix="`lamp-compile compile --linears-text`")  # fmt: skip
    if args.quality is not None:
        ControlPlan.of({"quality": args.quality, "relation": (0.0, 0.0, 1.0)}, "--quality")
    path = Path(args.output)
    if not path.resolve().parent.is_dir():
        raise InputError("the folder does not exist", where=str(path), fix="another path")
    measured = _measure.prepare(args, usual=CONTEXT, least=2)
    first, rest = calibrate.window_halves(measured.windows)
    options = _options.compile_options(args)
    preset = api.compile(measured.model, mode="eager", **options)
    # Every site that LAMP can take, whatever the preset keeps.
    whole = api.compile(measured.model, mode="eager", **{**options, "preset": "balanced"})
    engine = CompiledEngine(whole)
    digest = hashlib.sha256(Path(args.text).read_bytes()).hexdigest()
    settings = sorted(f"{name}={value}" for name, value in options.items() if name not in ("preset", "tau", "floor"))
    identity = [preset.lamp.plan.fingerprint, digest, list(first.shape), settings, weights_digest(measured.model)]
    memory = Memory(Path(args.measurements or f"{path}.partial"), json.dumps(identity))
    task = calibrate.Task(
        Bench(measured.model, engine, first), Bench(measured.model, engine, rest), preset.lamp.plan,
        {site.name: site for site in preset.lamp.sites}, args.max_kl, args.heads, memory,
    )  # fmt: skip
    step = _output.progress(calibrate.steps(task), "calibrate")
    done = calibrate.calibrate(_stepping(task, step))
    provenance = {**done.plan.provenance, "text_sha256": digest, **environment(args.device)}
    chosen = done.plan if args.quality is None else _holding(measured.model, done.plan, first, args.quality)
    plan = _write(chosen, provenance, path)
    if args.measurements is None:
        memory.forget()
    held = done.report["held_out"]
    over = args.max_kl is not None and not held["calibrated"]["kl"] <= args.max_kl
    if args.json:
        _output.print_json({**environment(args.device), **measured.describe(args), "plan": str(path), **done.report})
    else:
        print(summary(plan, done.report))
        if plan.control is not None:
            print(f"the controller holds {args.quality:.1%} agreement: estimated error {plan.control.error_limit:.3g}")
        print(f"wrote {path}")
        if over:
            print(f"over the limit: KL {held['calibrated']['kl']:.2e} on held-out text, --max-kl {args.max_kl:.2e}")
    return LIMIT_EXCEEDED if over else 0


class Memory(MutableMapping[str, list[float]]):
    """Measurements in a file, so that an interrupted calibration goes on where it was.

    Args:
        path: The file; one of another model, text or setting is started anew.
        identity: Of model, text and settings.

    Raises:
        InputError: There is a file of that name that holds no measurements.
    """

    def __init__(self, path: Path, identity: str) -> None:
        self._path, self._identity = path, identity
        self._values: dict[str, list[float]] = {}
        if not path.exists():
            return
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError):
            data = None
        if not isinstance(data, dict) or set(data) != {"identity", "values"} or not isinstance(data["values"], dict):
            raise InputError("this file holds no measurements", where=str(path), fix="another name, or remove it")
        if data["identity"] == identity:
            self._values = {
                name: pair for name, pair in data["values"].items()
                if isinstance(pair, list) and len(pair) == 2 and all(isinstance(x, float) for x in pair)
            }  # fmt: skip

    def __getitem__(self, name: str) -> list[float]:
        return self._values[name]

    def __setitem__(self, name: str, value: list[float]) -> None:
        self._values[name] = value
        text = json.dumps({"identity": self._identity, "values": self._values})
        whole = self._path.with_name(f"{self._path.name}.new")
        try:
            whole.write_text(text + "\n", encoding="utf-8")
            whole.replace(self._path)  # an interruption leaves the last whole file
        except OSError as error:
            raise InputError(f"cannot write: {error.strerror}", where=str(self._path), fix="another --output") from None

    def __delitem__(self, name: str) -> None:
        del self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def forget(self) -> None:
        """Remove the file."""
        self._path.unlink(missing_ok=True)


def weights_digest(model: Any) -> str:
    """Hash of some thousand numbers of every weight: a model of the same shape but other weights has another."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        flat = tensor.detach().flatten()
        sample = flat[:: max(1, flat.numel() // SAMPLED)].cpu().contiguous()
        digest.update(name.encode())
        digest.update(sample.view(-1).float().numpy().tobytes())
    return digest.hexdigest()[:16]


def summary(plan: Any, report: dict[str, Any]) -> str:
    """What was found, for people."""
    lines = [f"{'site':30s} {'KL at both planes':>18s} {'chosen tau':>22s}"]
    both = {name: next(o["kl"] for o in options if o["tau"] == 0) for name, options in report["sensitivity"].items()}
    for row in plan.sites:
        alone = sum(kl for name, kl in both.items() if name.split(" ")[0] == row.name)
        chosen = "kept in 16 bits" if not row.apply else str(row.tau)
        lines.append(f"{row.name:30s} {alone:18.2e} {chosen:>22s}{'  balanced' if row.balance else ''}")
    for key in report["fragile"]:
        lines.append(
            f"fragile key: {key['site']} kv head {key['head']} channel {key['channel']}: {key['times']:g} times the "
            f"median channel, {key['constant']:.0%} of it the same for all keys"
        )
    held = report["held_out"]
    lines.append(f"KL of all sites: predicted {report['predicted_kl']:.2e} (sum of each alone), measured "
                 f"{report['measured_kl']:.2e}")  # fmt: skip
    lines.append(f"on {report['held_out_tokens']} tokens held out:")
    for title in ("preset", "uniform", "calibrated"):
        side = held[title]
        lines.append(
            f"  {title:10s} {side['bits_per_value']:.3f} bits, KL {side['kl']:.2e} +- {side['kl_half_interval']:.1e}, "
            f"agreement {side['agreement']:.2%} ({side['agreement_low']:.2%} to {side['agreement_high']:.2%})"
        )
    word = "better" if held["better"] else "no gain outside its interval"
    interval = f"{held['kl_difference']:+.2e} +- {held['kl_difference_half_interval']:.1e} (95 %)"
    lines.append(f"  calibrated - uniform: KL {interval}: {word}")
    lines.append(f"plan: {report['calibration']}")
    return "\n".join(lines)


def _stepping(task: Any, step: Callable[[str], None]) -> Any:
    from dataclasses import replace

    return replace(task, on_step=step)


def _holding(model: Any, plan: Any, windows: Any, quality: float) -> Any:
    """The plan with a controller that holds ``quality``, by a relation measured with this plan on ``windows``.

    Raises:
        PlanError: Both planes everywhere do not reach it.
        InputError: The guard would act first.
    """
    from dataclasses import replace
    from math import inf

    from lamp_compile import api
    from lamp_compile.quality import relation

    rows = [replace(row, guard=replace(row.guard, window=1, budget=inf)) for row in plan.sites]
    meter = api.compile(model, mode="eager", plan=replace(plan, sites=tuple(rows), control=None))
    fitted = relation.fit(list(relation.measure(model, meter, windows)))
    control = ControlPlan.of({"quality": quality, "relation": fitted}, "--quality")
    limit, budget = control.error_limit, min(row.guard.budget for row in plan.sites if row.apply)
    if limit is not None and limit >= budget:
        raise InputError(
            f"{quality:g} allows an estimated error of {limit:.3g}, and the guard acts at {budget:g}",
            where="--quality",
            fix="a higher quality, or --set guard_budget=1",
        )
    return replace(plan, control=control)


def _write(plan: Any, provenance: dict[str, Any], path: Path) -> Any:
    from dataclasses import replace

    made = replace(plan, provenance=provenance)
    try:
        made.save(path)
    except OSError as error:
        raise InputError(f"cannot write the plan: {error.strerror}", where=str(path), fix="another path") from None
    return made
