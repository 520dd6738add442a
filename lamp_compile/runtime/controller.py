"""The precision controller as a pure function: ``step(state, statistics) -> state``. Numbers in, numbers out, no torch:
a thread beside a torch model and a loop around an ONNX session drive the same function.

It works on log tau. A limit on the error moves each site by a share of log(aim / error); a goal moves all sites by the
same share of its own ratio; where both are given a site takes the smaller move. Around the aim lies a band in which
nothing moves, wider once a site has settled in it, and a move against the one before halves the share: so a noisy or
steep response does not swing. Evidence that cannot be judged, a raised floor, a non-finite output: tau is halved.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from lamp_compile.control_plan import ControlPlan
from lamp_compile.errors import OptionError

AIM = 0.9
"""Aim at this share of a limit."""
SETTLE = (0.75, 0.98)
"""A site settles between these shares of its limit."""
STAY = (0.55, 1.0)
"""And stays settled between these."""
GAIN, LEAST_GAIN = 0.5, 1 / 64
MOST_MOVE = math.log(2.0)
"""Of log tau, in one step."""
RECOVER = 1.15
"""Factor on a damped gain at each further move in one direction."""
BACK_OFF, CEILING = 0.5, 0.75
"""Factors on tau where the guard had to act, or the evidence cannot be judged: for now, and as its ceiling after."""
FORGET = 1.01
"""Factor by which a ceiling rises at each reading, so that it is tried again, but seldom."""
TINY = 1e-12
WRAP = 2**64


@dataclass(frozen=True)
class SiteSample:
    """What one site did since the last reading."""

    steps: int = 0
    error: float = 0.0
    """Estimated relative error of its output, root mean square over kv heads and sequences."""
    live: int = 0
    refined: int = 0
    raised: int = 0
    """Times the guard raised a floor for being over budget."""
    bad: int = 0
    """Steps with a non-finite output."""
    held: bool = False
    """Some floor is up: the error seen is that of more precision than tau asks for."""


@dataclass(frozen=True)
class Statistics:
    """One reading: a sample per site, in the order of ``State.sites``."""

    sites: tuple[SiteSample, ...]
    seconds: float | None = None
    """Of one decode step; None where it is not known."""


@dataclass(frozen=True)
class SiteState:
    """One site under control."""

    tau: float
    start: float
    safe: float
    """The last tau under which a reading kept the limit and the guard was quiet."""
    ceiling: float
    """Where the guard had to act before; tau does not climb past it for now."""
    gain: float = GAIN
    direction: int = 0
    settled: bool = False
    verdict: str = "waiting"
    """One of "waiting", "settled", "moving", "backed off", and "out of reach": at the end of its range, target not
    met."""


@dataclass(frozen=True)
class State:
    """Everything the controller knows."""

    target: ControlPlan
    sites: tuple[SiteState, ...]
    gain: float = GAIN
    direction: int = 0
    settled: bool = False
    """Of the goal, which all sites share."""
    readings: int = 0
    rejected: int = 0
    """Samples that could not be judged (NaN, infinity, negative counts)."""
    backed_off: int = 0
    bound: int = 0
    """Readings in which the error limit kept a site from following the goal."""


def check_guard(target: ControlPlan, budgets: Sequence[float]) -> None:
    """Raise OptionError where a guard, by its budget, would act before the target's error limit is reached."""
    limit = target.error_limit
    if limit is not None and limit >= min(budgets):
        raise OptionError(
            f"an error limit of {limit:.3g} contradicts the guard, which acts at {min(budgets):g}",
            where="control",
            fix="a smaller error_budget or higher quality, or a larger guard budget",
        )


def described(state: State, names: Sequence[str]) -> dict[str, Any]:
    """JSON-ready: target, whether calibrated, counts, and by site (``names`` in the order of ``state.sites``) tau and
    how it stands."""
    target = state.target
    return {
        "target": {name: value for name, value in vars(target).items() if value is not None},
        "error_limit": target.error_limit,
        "calibrated": target.quality is None or target.relation is not None,
        "readings": state.readings,
        "rejected": state.rejected,
        "backed_off": state.backed_off,
        "limit_bound": state.bound,
        "sites": {
            name: {"tau": site.tau, "safe": site.safe, "verdict": site.verdict}
            for name, site in zip(names, state.sites, strict=True)
        },
    }


def initial(target: ControlPlan, taus: Sequence[float]) -> State:
    """The state before the first reading.

    Args:
        target: What to hold.
        taus: Where each site starts.

    Raises:
        OptionError: A start lies outside the target's limits (0 refines everything: there is nothing to control).
        PlanError: The target is impossible.
    """
    target.validate("control")
    for tau in taus:
        if not target.tau_least <= tau <= target.tau_most:
            raise OptionError(
                f"tau starts at {tau:g}, outside {target.tau_least:g} to {target.tau_most:g}",
                where="control",
                fix="another tau in the plan, or tau_least and tau_most",
            )
    return State(target, tuple(SiteState(tau, tau, tau, target.tau_most) for tau in taus))


def step(state: State, statistics: Statistics) -> State:
    """One reading taken in: the new state, with every site's new tau.

    Raises:
        OptionError: As many samples as sites are needed.
    """
    if len(statistics.sites) != len(state.sites):
        raise OptionError(
            f"{len(statistics.sites)} samples for {len(state.sites)} sites", where="controller.step", fix="one each"
        )
    limit = state.target.error_limit
    sound = [_sound(sample) for sample in statistics.sites]
    goal, goal_gain, goal_direction, goal_settled = _goal(state, statistics, sound)
    made, bound, backed_off = [], 0, 0
    for site, sample, judged in zip(state.sites, statistics.sites, sound, strict=True):
        new = _advance(site, sample, judged, goal, limit, state.target)
        judging = sample.steps > 0 and judged
        bound += int(limit is not None and (goal or 0.0) > 0 and judging and new.tau <= site.tau)
        backed_off += int(new is not site and new.verdict == "backed off")
        made.append(new)
    return replace(
        state, sites=tuple(made), gain=goal_gain, direction=goal_direction, settled=goal_settled,
        readings=state.readings + 1, rejected=state.rejected + sound.count(False),
        backed_off=state.backed_off + backed_off, bound=state.bound + int(bound > 0),
    )  # fmt: skip


def advance(before: int, now: int) -> tuple[int, bool]:
    """How far a 64-bit counter went, and whether it had been set back to 0 in between. A wrap is no step back."""
    grown = (now - before) % WRAP
    if grown < WRAP >> 2:
        return grown, False
    return max(0, now), True


def _sound(sample: SiteSample) -> bool:
    counts = (sample.steps, sample.live, sample.refined, sample.raised, sample.bad)
    return math.isfinite(sample.error) and sample.error >= 0 and min(counts) >= 0 and sample.refined <= sample.live


def _advance(
    site: SiteState, sample: SiteSample, judged: bool, goal: float | None, limit: float | None, target: ControlPlan
) -> SiteState:
    if judged and not sample.steps:
        return site
    if not judged or sample.raised or sample.bad:
        tau = _within(site.tau * BACK_OFF, target)
        ceiling = _within(site.tau * CEILING, target)
        return replace(
            site, tau=tau, safe=min(site.safe, tau), ceiling=ceiling, direction=-1, settled=False, verdict="backed off"
        )
    kept = limit is None or sample.error <= limit
    room, settled = _room(site, sample.error, limit)
    wanted = min(room, math.inf if goal is None else goal)
    own = limit is not None and wanted == room
    if sample.held:
        wanted = min(wanted, 0.0)
    gain, direction = _damped(site.gain, site.direction, wanted) if own else (site.gain, site.direction)
    ceiling = site.ceiling if sample.held else min(target.tau_most, site.ceiling * FORGET)
    move = _clamp(wanted * gain if own else wanted, MOST_MOVE)
    tau = _within(min(site.tau * math.exp(move), max(site.tau, ceiling)), target)
    if target.speed is not None and not own and move < 0:  # time to spare buys back what was given up, no more
        tau = max(tau, min(site.tau, site.start))
    reached = kept and (tau == site.tau or goal is None) if wanted <= 0 or goal is None else False
    verdict = "moving" if tau != site.tau else "settled" if reached or not wanted else "out of reach"
    return replace(
        site, tau=tau, safe=site.tau if kept and not sample.held else site.safe, ceiling=ceiling, gain=gain,
        direction=direction, settled=settled, verdict=verdict,
    )  # fmt: skip


def _room(site: SiteState, error: float, limit: float | None) -> tuple[float, bool]:
    """How far log tau may go up (or must come down, below 0) by the error limit, and whether the error is settled."""
    if limit is None:
        return math.inf, False
    share = error / limit
    low, high = STAY if site.settled else SETTLE
    if low <= share <= high:
        return 0.0, True
    return math.log(AIM / max(share, TINY)), False


def _goal(state: State, statistics: Statistics, sound: Sequence[bool]) -> tuple[float | None, float, int, bool]:
    """The move of log tau that the goal asks of all sites, already damped; None without a goal."""
    target, same = state.target, (state.gain, state.direction, state.settled)
    if target.speed is None and target.refined is None:
        return None, *same
    if target.speed is not None:
        seconds = statistics.seconds
        if seconds is None or not math.isfinite(seconds) or seconds <= 0:
            return 0.0, *same
        share = 1.0 / (seconds * target.speed * (2.0 - AIM))  # speed reached over speed aimed at, a little above
        low, high = (1 / (2.0 - AIM), 1.5) if state.settled else (0.97, 1.25)
    else:
        used = [sample for sample, judged in zip(statistics.sites, sound, strict=True) if judged]
        live, refined = sum(s.live for s in used), sum(s.refined for s in used)
        if not live or not refined:
            return (0.0 if not live else _clamp(-state.gain, MOST_MOVE)), *same
        share = (target.refined or TINY) * live / refined  # the share aimed at over the one seen
        low, high = (0.75, 1.35) if state.settled else (0.9, 1.1)
    if low <= share <= high:
        return 0.0, state.gain, state.direction, True
    ratio = -math.log(max(share, TINY))  # too slow, too much refined: up
    if target.speed is not None and ratio < 0 and all(site.tau <= site.start for site in state.sites):
        return 0.0, state.gain, state.direction, True  # faster than asked for, with no less precision than the plan's
    gain, direction = _damped(state.gain, state.direction, ratio)
    return _clamp(gain * ratio, MOST_MOVE), gain, direction, False


def _damped(gain: float, direction: int, move: float) -> tuple[float, int]:
    """Half the gain where a move turns back on the one before; a little more again where it goes on."""
    now = (move > 0) - (move < 0)
    if now == 0:
        return gain, direction
    gain = max(LEAST_GAIN, gain / 2) if now * direction < 0 else min(GAIN, gain * RECOVER)
    return gain, now


def _clamp(value: float, most: float) -> float:
    return max(-most, min(most, value))


def _within(tau: float, target: ControlPlan) -> float:
    return max(target.tau_least, min(target.tau_most, tau))
