"""Measure what a compiled model's predictions lose, row by row, against the uncompiled model in float32."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lamp_compile.errors import InputError, OptionError
from lamp_compile.plan import Plan
from lamp_compile.quality import rows as specs
from lamp_compile.quality.engine import Engine, Run, SiteTiles
from lamp_compile.quality.metrics import Comparison, Scores
from lamp_compile.quality.rows import RowSpec
from lamp_compile.quality.twin import outlier_twin

MakeEngine = Callable[[nn.Module, str], Engine]
CONTROL_TRIES = 8
FLOAT_BITS = 16
"""Bits per value of layers that LAMP leaves alone: models run in 16 bits, though they are measured here in 32."""
REFERENCE_BYTES = {"cuda": 16 << 30, "cpu": 1 << 30}
"""Reference logits are kept up to this size and computed again beyond it."""


@dataclass(frozen=True)
class Row:
    """One measured row. See ``metrics.Scores`` for the first fields."""

    name: str
    kl: float
    agreement: float
    agreement_low: float
    agreement_high: float
    perplexity_ratio: float
    max_dlogp: float
    positions: int
    bits_per_value: float
    """Bits read per stored value in a step, scales included."""
    refined_share: float
    """Share of live sub-tiles whose residual plane was read; 0 for formats that have none."""
    kv_bytes: int
    """Bytes of the KV cache of one window."""
    tau: float | None
    """tau of the first site."""
    seconds: float
    twin: float = 0.0
    pairs: str = ""

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; ``twin`` and ``pairs`` only on twin rows."""
        data = asdict(self)
        if not self.twin:
            del data["twin"], data["pairs"]
        return data


class Evaluation:
    """Rows over the same windows of one model; engines and reference logits are made once.

    Args:
        model: The uncompiled model, in evaluation mode. It is measured in float32; one in another dtype is refused.
        windows: int64 ``[n, T]``, see ``windows.spread``.
        make_engine: ``(model, balance)`` -> engine: compiles a model (this one, or a twin of it) for the real runtime
            with balance ``"auto"``, ``"always"`` or ``"never"``.
        pairs_count: RoPE pairs per kv head that a twin scales.
        on_window: Called with the row's name after each window.
    """

    def __init__(
        self,
        model: nn.Module,
        windows: Tensor,
        make_engine: MakeEngine,
        *,
        pairs_count: int = 3,
        on_window: Callable[[str], None] | None = None,
    ) -> None:
        if any(p.dtype != torch.float32 for p in model.parameters()):
            raise InputError(
                "quality is measured in float32", where="model", fix="load the model with dtype=torch.float32"
            )
        if windows.dim() != 2 or windows.numel() == 0:
            raise InputError(f"windows {tuple(windows.shape)}", where="windows", fix="token ids [n, T]")
        self.model, self._make_engine, self._pairs_count = model, make_engine, pairs_count
        self.device = next(model.parameters()).device
        self.windows = windows.to(self.device)
        self.rows: dict[tuple[str, float, str], Row] = {}
        self._engines: dict[tuple[float, str, str], Engine] = {}
        self._reference: list[Tensor] = []
        self._on_window = on_window

    def engine(self, twin: float = 0.0, pairs: str = "any", balance: str = "auto") -> Engine:
        """The engine of the model or of one of its twins; compiled on first use."""
        key = (twin, pairs if twin else "any", balance)
        if key not in self._engines:
            model = outlier_twin(self.model, twin, pairs=pairs, count=self._pairs_count) if twin else self.model
            self._engines[key] = self._make_engine(model, balance)
        return self._engines[key]

    def measure(self, spec: RowSpec) -> Row:
        """Measure one row.

        Raises:
            OptionError: A control before the row it is held against.
        """
        engine = self.engine(spec.twin, spec.pairs, spec.balance)
        if not spec.control:
            row = self.measure_with(engine, spec)
        else:
            row = self._measure_control(spec, engine)
        self.rows[spec.key] = row
        return row

    def measure_with(self, engine: Engine, spec: RowSpec) -> Row:
        """Measure one row that is no control on an engine of the caller's; it is not kept in ``rows``."""
        return self._measure(spec, engine, specs.changed(engine.plan, spec.changes))

    def measure_all(self, wanted: Iterable[RowSpec], on_row: Callable[[Row], None] | None = None) -> list[Row]:
        """Measure rows in order, handing each to ``on_row`` as it is done."""
        done = []
        for spec in wanted:
            done.append(self.measure(spec))
            if on_row is not None:
                on_row(done[-1])
        return done

    def reference(self, index: int) -> Tensor:
        """float32 logits ``[1, T, V]`` of the uncompiled model on one window."""
        if index < len(self._reference):
            return self._reference[index]
        with torch.no_grad():
            logits: Tensor = self.model(input_ids=self.windows[index : index + 1], use_cache=False).logits
        kept = sum(t.nbytes for t in self._reference) + logits.nbytes
        if index == len(self._reference) and kept <= REFERENCE_BYTES.get(self.device.type, 1 << 30):
            self._reference.append(logits)
        return logits

    def _measure_control(self, spec: RowSpec, engine: Engine) -> Row:
        held_against = self.rows.get((spec.match, spec.twin, spec.pairs))
        if held_against is None:
            raise OptionError(
                f"control {spec.name!r} comes before {spec.match!r}", where="rows", fix="measure that row first"
            )
        share = held_against.refined_share
        groups = max((t.groups for t in engine.run(self.windows[:1, :2], engine.plan).tiles.values()), default=1)
        tau = specs.first_tau(spec.control, share, engine.plan, self.windows.shape[1], groups)
        for _ in range(CONTROL_TRIES):
            changes = {**spec.changes, "rule": spec.control, "tau": tau}
            row = self._measure(spec, engine, specs.changed(engine.plan, changes))
            if row.refined_share >= share:
                return row
            tau = specs.next_tau(spec.control, tau, share, row.refined_share)
        raise InputError(
            f"control {spec.name!r} refined {row.refined_share:.4f}, less than {share:.4f}",
            where="rows",
            fix="report this text and model",
        )

    def _measure(self, spec: RowSpec, engine: Engine, plan: Plan) -> Row:
        began = time.perf_counter()
        comparison, counted = Comparison(), _Counted()
        for index in range(self.windows.shape[0]):
            ids = self.windows[index : index + 1]
            with torch.no_grad():
                run = engine.run(ids, plan)
                comparison.add(self.reference(index), run.logits, ids)
            counted.add(run)
            if self._on_window is not None:
                self._on_window(spec.name)
        return _row(spec, comparison.result(), counted, plan, time.perf_counter() - began)


class _Counted:
    """Tiles of all windows, per site."""

    def __init__(self) -> None:
        self.sites: dict[str, SiteTiles] = {}
        self.kv_bytes = self.float_values = 0

    def add(self, run: Run) -> None:
        self.kv_bytes, self.float_values = run.kv_bytes, run.float_values
        for name, site in run.tiles.items():
            if name in self.sites:
                self.sites[name].counts.add_(site.counts)
            else:
                self.sites[name] = replace(site, counts=site.counts.clone())


def _row(spec: RowSpec, scores: Scores, counted: _Counted, plan: Plan, seconds: float) -> Row:
    applied = [site.tau for site in plan.sites if site.apply]
    tau = applied[0] if applied and isinstance(applied[0], int | float) else None
    weight = float(counted.float_values)
    bits = weight * FLOAT_BITS
    live = refined = 0
    for name, site in counted.sites.items():
        seen, hot = (int(n) for n in site.counts.tolist())
        planned = plan.site(name)
        values = site.kv_heads * (site.key_dim + site.value_dim)
        bits += values * specs.bits_read(planned, site.key_dim, site.value_dim, hot / max(1, seen))
        weight += values
        live, refined = live + seen, refined + hot
    return Row(
        name=spec.name,
        **asdict(scores),
        bits_per_value=bits / max(1.0, weight),
        refined_share=refined / max(1, live),
        kv_bytes=counted.kv_bytes,
        tau=None if tau is None or tau >= specs.NEVER else tau,
        seconds=seconds,
        twin=spec.twin,
        pairs=spec.pairs if spec.twin else "",
    )


def table(rows: Sequence[Row]) -> str:
    """The rows as aligned text."""
    lines = [HEADER]
    lines.extend(line(row) for row in rows)
    return "\n".join(lines)


HEADER = (
    f"{'KV precision':32s} {'bits':>6s} {'refined':>8s} {'KL':>8s} {'agreement (95 %)':>24s} "
    f"{'ppl ratio':>10s} {'KV MB':>8s} {'s':>6s}"
)


def line(row: Row) -> str:
    """One row of ``table``."""
    name = row.name + (f" twin {row.twin:g} {row.pairs}" if row.twin else "")
    interval = f"{row.agreement:7.2%} ({row.agreement_low:.2%}-{row.agreement_high:.2%})"
    return (
        f"{name:32s} {row.bits_per_value:6.2f} {row.refined_share:8.2%} {row.kl:8.1e} {interval:>24s} "
        f"{row.perplexity_ratio:10.5f} {row.kv_bytes / 1e6:8.2f} {row.seconds:6.1f}"
    )
