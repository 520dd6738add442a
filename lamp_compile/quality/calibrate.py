"""A plan from measurement: what each site costs on a text, and the tau of each that makes the most of the bits read.

Four steps, each one forward per window and setting, nothing kept but sums:

1. *Keys.* Statistics of queries and keys on the text (``key_channels.py``): fragile channels are listed, and balancing
   is measured at the sites where it promises anything.
2. *Sensitivity.* KL of the predictions with one site under LAMP and all else exact, and its refined share, at some tau.
3. *Allocation.* The tau of each site (or kv head) that minimises the sum of KL at the bits that the preset reads, or
   the bits at a KL (``allocation.py``).
4. *Verification* on windows that took no part: the plan against the uniform tau at the same bits, with the interval of
   the difference. A difference inside its interval is no result, and then the uniform plan is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from lamp_compile import __version__
from lamp_compile.errors import InputError
from lamp_compile.frontends.huggingface import balance
from lamp_compile.frontends.huggingface.sites import ProbedSite
from lamp_compile.plan import Plan, SitePlan
from lamp_compile.quality import allocation, key_channels, sensitivity
from lamp_compile.quality import rows as specs
from lamp_compile.quality.allocation import KEPT, Option
from lamp_compile.quality.sensitivity import FLOAT_BITS, Bench, Outcome

TAUS = (0.0, 0.003, 0.01, 0.03, 0.1)
"""Where each site is measured; between them KL and bits are interpolated in log tau."""
LEAST_GAIN = 1.02
"""Predicted gain (``balance.gain``) from which on balancing a site is tried."""
WORTH = 0.98
"""Balancing is taken where it leaves at most this share of the site's KL: it costs a little everywhere else."""
EXCESS = 4.0
"""A site with fragile keys that still costs this many times the median site at both planes may be kept in 16 bits."""
TRIES = 4
"""Allocations until the bits measured are within the budget."""


@dataclass(frozen=True)
class Task:
    """What to calibrate.

    Attributes:
        bench: The windows to measure on; its engine takes every site that LAMP can.
        held_out: The same model and engine on windows that take no part in the choice.
        preset: The plan that the preset makes without a text: the bits to keep to, and what is to be beaten.
        sites: What the probe saw of each site.
        max_kl: Find the fewest bits with at most this mean KL instead; None keeps to the preset's bits.
        heads: Choose tau for each kv head.
        memory: Measurements made before, by name; new ones are put there.
        on_step: Called with a word after each measurement.
    """

    bench: Bench
    held_out: Bench
    preset: Plan
    sites: Mapping[str, ProbedSite]
    max_kl: float | None = None
    heads: bool = False
    memory: MutableMapping[str, list[float]] = field(default_factory=dict)
    on_step: Callable[[str], None] = lambda what: None


@dataclass(frozen=True)
class Calibrated:
    """The plan, and what was measured (also in its provenance, in short)."""

    plan: Plan
    report: dict[str, Any]


def steps(task: Task) -> int:
    """How often ``on_step`` will be called at most."""
    names = _names(task)
    units = sum(task.sites[name].kv_heads if task.heads else 1 for name in names)
    return task.bench.windows.shape[0] + 3 * len(names) + units * len(TAUS) + TRIES + 1


def calibrate(task: Task) -> Calibrated:
    """Measure, choose and verify.

    Raises:
        InputError: No site to calibrate, or no plan stays within ``max_kl``.
    """
    names = _names(task)
    if not names:
        raise InputError("the plan applies to no site", where="calibrate", fix="`lamp-compile explain` says why")
    found = key_channels.statistics(task.bench.model, task.bench.windows, task.on_step)
    config = task.bench.model.config.get_text_config(decoder=True)
    listed = {name: key_channels.fragile(task.sites[name], found[name], config) for name in names}
    base, balanced = _balanced(task, found)
    units = _units(task, base, {name for name in names if listed[name]})
    chosen, candidate, outcome = _choose(task, base, units)
    uniform = _with_kept(task, base) if task.max_kl is None else _uniform(base, units, outcome.bits)
    plan, word, held = _verified(task, uniform, candidate)
    report = {
        "calibration": word,
        "windows": task.bench.windows.shape[0], "context": task.bench.windows.shape[1],
        "tokens": task.bench.windows.numel() + task.held_out.windows.numel(),
        "held_out_tokens": task.held_out.windows.numel(), "lamp_compile": __version__,
        "max_kl": task.max_kl, "heads": task.heads, "balance": balanced,
        "fragile": [key.to_dict() for keys in listed.values() for key in keys],
        "sensitivity": {
            name: [{"tau": o.tau, "bits": o.bits, "kl": o.kl} for o in options if o.tau in (*TAUS, KEPT)]
            for name, options in units.items()
        },
        "predicted_kl": sum(option.kl for option in chosen.values()), "measured_kl": outcome.mean,
        "held_out": held,
    }  # fmt: skip
    return Calibrated(replace(plan, provenance={**task.preset.provenance, **report}).validate(), report)


def _verified(task: Task, uniform: Plan, candidate: Plan) -> tuple[Plan, str, dict[str, Any]]:
    """The plan that held-out text speaks for, why in words, and all numbers: the candidate where it is better than one
    tau for all; that, or even the preset as it is without a text, otherwise."""
    preset, before, after = (task.held_out.measure(plan) for plan in (task.preset, uniform, candidate))
    task.on_step("held out")
    over_uniform, over_preset = sensitivity.difference(before, after), sensitivity.difference(preset, before)
    better = sum(over_uniform) < 0
    held: dict[str, Any] = {
        "preset": preset.summary(), "uniform": before.summary(), "calibrated": after.summary(),
        "kl_difference": over_uniform[0], "kl_difference_half_interval": over_uniform[1], "better": better,
        "uniform_over_preset": over_preset[0], "uniform_over_preset_half_interval": over_preset[1],
    }  # fmt: skip
    if better:
        return candidate, "measured", held
    if task.max_kl is None and over_preset[0] - over_preset[1] > 0:
        return task.preset, "measured: no gain over the preset, which is kept", held
    return uniform, "measured: no gain over one tau for all, which is kept", held


def _names(task: Task) -> list[str]:
    return [row.name for row in task.bench.engine.plan.sites if row.apply]


def _remembered(task: Task, name: str, measure: Callable[[], tuple[float, float]]) -> tuple[float, float]:
    """KL and refined share; from memory where they were measured before."""
    if name not in task.memory:
        task.memory[name] = list(measure())
    task.on_step(name)
    kl, share = task.memory[name]
    return kl, share


def _measured(task: Task, base: Plan, row: SitePlan, key: str, **changes: Any) -> tuple[float, float]:
    def measure() -> tuple[float, float]:
        outcome = task.bench.measure(sensitivity.alone(base, row.name, **changes))
        return outcome.mean, outcome.share[row.name]

    return _remembered(task, f"{row.name} {key}", measure)


def _balanced(task: Task, found: Mapping[str, key_channels.KeyStatistics]) -> tuple[Plan, dict[str, Any]]:
    """The engine's plan with the balance that the text asks for, and what was measured where it was tried."""
    plan, config = task.bench.engine.plan, task.bench.model.config
    rows, notes = [], {}
    for row in plan.sites:
        if not row.apply:
            rows.append(row)
            continue
        rms = balance.pooled(key_channels.on_text(task.sites[row.name], found[row.name]), config)
        gain = balance.gain(*rms)
        if gain < LEAST_GAIN and row.balance is None:
            rows.append(row)
            continue
        factors = tuple(tuple(float(f"{x:.6g}") for x in head) for head in balance.factors(*rms).tolist())
        without, with_it = (_both_planes(task, plan, replace(row, balance=choice)) for choice in (None, factors))
        taken = with_it <= WORTH * without
        notes[row.name] = {"gain": gain, "kl_without": without, "kl_with": with_it, "taken": taken}
        reason = f"balanced: KL {with_it:.1e} instead of {without:.1e} alone at both planes" if taken else ""
        rows.append(replace(row, balance=factors if taken else None, reason=reason))
    return replace(plan, sites=tuple(rows)), notes


def _both_planes(task: Task, plan: Plan, row: SitePlan) -> float:
    """KL of a site alone with both planes of everything."""
    return _measured(task, plan, row, f"{_kind(row)} tau 0", balance=row.balance, tau=0.0, floor=1)[0]


def _units(task: Task, base: Plan, fragile: set[str]) -> dict[str, list[Option]]:
    """The options of every site, or of every kv head, from measurement."""
    rows = [row for row in base.sites if row.apply]
    both = {row.name: _both_planes(task, base, row) for row in rows}
    median = sorted(both.values())[len(both) // 2]
    total = sum(_values(task.sites[row.name]) for row in rows)
    units: dict[str, list[Option]] = {}
    for row in rows:
        site = task.sites[row.name]
        heads = range(site.kv_heads) if task.heads else (None,)
        for head in heads:
            weight = _values(site) / total / len(heads)
            options = [_option(task, base, row, head, tau, both[row.name], weight) for tau in TAUS]
            name = row.name if head is None else f"{row.name} {head}"
            units[name] = allocation.between(options)
        may_keep = row.name in fragile and both[row.name] > EXCESS * median
        if not task.heads and (may_keep or _keeps(task)):
            units[row.name].append(Option(KEPT, FLOAT_BITS * _values(site) / total, 0.0))
    return units


def _option(task: Task, base: Plan, row: SitePlan, head: int | None, tau: float, both: float, weight: float) -> Option:
    """What a site (or one kv head of it: its part beyond both planes) costs at one tau."""
    site = task.sites[row.name]
    if head is None:
        changes = {"tau": tau, "floor": 1 if tau == 0 else 0}
        kl, share = _measured(task, base, row, f"{_kind(row)} tau {tau:g}", **changes)
    else:
        changes = sensitivity.one_head(row, head, site.kv_heads, tau)
        kl, share = _measured(task, base, row, f"{_kind(row)} head {head} tau {tau:g}", **changes)
        share = max(0.0, 1 - (1 - share) * site.kv_heads)  # the other heads read everything
        kl = max(0.0, kl - both) + both / site.kv_heads
    return Option(tau, weight * specs.bits_read(row, site.head_dim, site.value_dim, share), kl)


def _choose(task: Task, base: Plan, units: Mapping[str, list[Option]]) -> tuple[dict[str, Option], Plan, Outcome]:
    """Options, the plan they make, and what it measures; its bits are within the budget."""
    if task.max_kl is not None:
        found = allocation.cheapest(units, task.max_kl)
        if found is None:
            least = sum(min(option.kl for option in options) for options in units.values())
            raise InputError(
                f"a mean KL of {task.max_kl:.1e} is out of reach: both planes everywhere cost {least:.1e}",
                where="--max-kl", fix="a larger limit, or the preset conservative, which may keep sites in 16 bits",
            )  # fmt: skip
        plan = _applied(task, base, found)
        return found, plan, task.bench.measure(plan)
    budget = task.bench.measure(_with_kept(task, base)).bits
    aim = budget
    for _ in range(TRIES):
        chosen = allocation.allocate(units, aim)
        plan = _applied(task, base, chosen)
        outcome = task.bench.measure(plan)
        task.on_step("allocation")
        if outcome.bits <= budget * 1.001:
            break
        aim -= outcome.bits - budget
    return chosen, plan, outcome


def _applied(task: Task, base: Plan, chosen: Mapping[str, Option]) -> Plan:
    """The plan with the options chosen."""

    def changed(row: SitePlan) -> SitePlan:
        if not row.apply:
            return row
        if task.heads:
            found = [chosen[f"{row.name} {head}"].tau for head in range(task.sites[row.name].kv_heads)]
            return replace(row, tau=found[0] if len(set(found)) == 1 else tuple(found), floor=0)
        tau = chosen[row.name].tau
        if tau == KEPT:
            return replace(row, apply=False, reason="kept: most sensitive on the text it was calibrated with")
        return replace(row, tau=tau, floor=0)

    return replace(base, sites=tuple(map(changed, base.sites)), preset=task.preset.preset)


def _with_kept(task: Task, base: Plan) -> Plan:
    """The base plan at the preset's own tau and with the sites that the preset keeps."""
    wanted = {row.name: row for row in task.preset.sites}
    rows = (
        replace(row, tau=wanted[row.name].tau, floor=wanted[row.name].floor)
        if wanted[row.name].apply
        else wanted[row.name]
        for row in base.sites
    )
    return replace(base, sites=tuple(rows), preset=task.preset.preset)


def _uniform(base: Plan, units: Mapping[str, list[Option]], bits: float) -> Plan:
    """The base plan with one tau for all sites, that which reads about as many bits."""
    taus = sorted({option.tau for options in units.values() for option in options if option.tau >= 0})
    sums = {tau: sum(o.bits for options in units.values() for o in options if o.tau == tau) for tau in taus}
    tau = min(taus, key=lambda t: abs(sums[t] - bits))
    return replace(base, sites=tuple(replace(r, tau=tau, floor=0) if r.apply else r for r in base.sites))


def _keeps(task: Task) -> bool:
    """Whether the preset keeps sites in 16 bits: then the text says which."""
    applied = set(_names(task))
    return any(not row.apply and row.name in applied for row in task.preset.sites)


def _values(site: ProbedSite) -> int:
    return site.kv_heads * (site.head_dim + site.value_dim)


def _kind(row: SitePlan) -> str:
    """What of a row, besides tau, a remembered number depends on."""
    return f"{row.rule} {row.k_format} {row.v_format}{' balanced' if row.balance else ''}"


def window_halves(windows: Tensor) -> tuple[Tensor, Tensor]:
    """Every other window to choose on, the rest to verify on.

    Raises:
        InputError: Fewer than two windows.
    """
    if windows.shape[0] < 2:
        raise InputError("one window to choose and to verify on", where="calibrate", fix="a larger --max-tokens")
    return windows[0::2], windows[1::2]
