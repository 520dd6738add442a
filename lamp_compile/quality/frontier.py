"""Bits against KL against speed: a table over presets, tau and formats that says what a choice costs and brings."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from lamp_compile.plan import PRESETS, Plan
from lamp_compile.quality import continuation
from lamp_compile.quality import rows as specs
from lamp_compile.quality.sensitivity import Bench

TAUS = (0.1, 0.03, 0.01, 0.003, 0.0)
"""Of the sweep, where none are asked for."""


@dataclass(frozen=True)
class Setting:
    """One row: the arguments of ``lamp_compile.compile``."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Point:
    """One row of the frontier.

    Attributes:
        name: Of the setting; ``"uncompiled"`` is the model without LAMP, in the dtype it is stored in.
        bits: Bits read per stored value in a step.
        refined: Refined share of the live sub-tiles, mean over the sites that LAMP runs.
        kl: Mean KL(float32 model || setting) in nats.
        kl_half_interval: Half its 95 % interval.
        agreement: Share of positions with the same most likely token, and its 95 % interval.
        agreement_low: Lower end.
        agreement_high: Upper end.
        positions: Of the text.
        tokens_per_s: New tokens per second of ``generate`` behind a prompt, prefill included; None where not timed.
        speed: That over the uncompiled model's.
        kv_bytes: Bytes of its keys and values at the end.
        kernels: False where the reference runs instead of kernels, which makes the time one of the reference.
    """

    name: str
    bits: float
    refined: float
    kl: float
    kl_half_interval: float
    agreement: float
    agreement_low: float
    agreement_high: float
    positions: int
    tokens_per_s: float | None = None
    speed: float | None = None
    kv_bytes: int | None = None
    kernels: bool = True

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        return asdict(self)


def settings(taus: Sequence[float] = TAUS, plan: Plan | None = None) -> list[Setting]:
    """Presets, a sweep of tau, other formats, and the plan where one is given."""
    made = [Setting(f"preset {name}", {"preset": name}) for name in PRESETS]
    made += [Setting(f"tau {tau:g}", {"tau": tau}) for tau in taus]
    made += [Setting(f"format {name}", {**_plain(name), "balance": "never"}) for name in ("bf16", "fp8")]
    if plan is not None:
        made.append(Setting("plan", {"plan": plan}))
    return made


def quality_point(name: str, bench: Bench, plan: Plan) -> Point:
    """The quality part of a row."""
    outcome = bench.measure(plan)
    found = outcome.summary()
    shares = list(outcome.share.values())
    return Point(
        name, outcome.bits, sum(shares) / max(1, len(shares)), found["kl"], found["kl_half_interval"],
        found["agreement"], found["agreement_low"], found["agreement_high"], outcome.positions,
    )  # fmt: skip


def timed(model: Any, prompt: Tensor, tokens: int, repeats: int = 3) -> tuple[float, int]:
    """New tokens per second of ``generate`` behind a prompt ``[1, S]``, the best of some runs, and bytes of KV."""
    runs = [continuation.write(model, prompt, tokens) for _ in range(repeats)]
    return max(run.tokens_per_s for run in runs), runs[0].kv_bytes


def table(points: Sequence[Point]) -> str:
    """The rows as aligned text."""
    head = (
        f"{'setting':22s} {'bits':>6s} {'refined':>8s} {'KL':>8s} {'(95 %)':>9s} {'agreement (95 %)':>26s} "
        f"{'tokens/s':>9s} {'speed':>6s} {'KV MB':>8s}"
    )
    return "\n".join([head, *map(_line, points)])


def _line(point: Point) -> str:
    interval = f"{point.agreement:.2%} ({point.agreement_low:.2%} to {point.agreement_high:.2%})"
    speed = "-" if point.tokens_per_s is None else f"{point.tokens_per_s:.1f}"
    ratio = "-" if point.speed is None else f"{point.speed:.2f}"
    stored = "-" if point.kv_bytes is None else f"{point.kv_bytes / 1e6:.2f}"
    return (
        f"{point.name:22s} {point.bits:6.2f} {point.refined:8.2%} {point.kl:8.1e} +-{point.kl_half_interval:7.1e} "
        f"{interval:>26s} {speed:>9s} {ratio:>6s} {stored:>8s}{'' if point.kernels else '  (no kernel)'}"
    )


def _plain(name: str) -> dict[str, Any]:
    """Storage in a plain format, as options of ``compile``."""
    return {"k_format": name, "v_format": name, **{key: v for key, v in specs.PLAIN.items() if key != "balance"}}


def measure(
    wanted: Sequence[Setting],
    compiled: Callable[[Setting], Any],
    bench: Callable[[Any], Bench],
    on_step: Callable[[str], None],
) -> list[Point]:
    """Quality of every setting. ``compiled`` makes its model in eager mode; ``bench`` the windows for it."""
    points = []
    for setting in wanted:
        fast = compiled(setting)
        points.append(quality_point(setting.name, bench(fast), fast.lamp.plan))
        on_step(setting.name)
    return points
