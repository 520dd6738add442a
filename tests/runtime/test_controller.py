"""The controller's pure function: bounded whatever comes, converges on simulated plants, does not swing."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lamp_compile.control_plan import ControlPlan
from lamp_compile.errors import OptionError, PlanError
from lamp_compile.runtime import controller
from lamp_compile.runtime.controller import SiteSample, Statistics

NUMBERS = st.one_of(
    st.floats(allow_nan=True, allow_infinity=True), st.sampled_from([0.0, -1.0, math.inf, math.nan, 1e308])
)
COUNTS = st.integers(min_value=-(2**63), max_value=2**63 - 1)
SAMPLES = st.builds(
    SiteSample, steps=COUNTS, error=NUMBERS, live=COUNTS, refined=COUNTS, raised=COUNTS, bad=COUNTS, held=st.booleans()
)
TARGETS = st.sampled_from(
    [
        ControlPlan(quality=0.99),
        ControlPlan(error_budget=0.05),
        ControlPlan(speed=30.0),
        ControlPlan(refined=0.1),
        ControlPlan(error_budget=0.05, speed=30.0),
        ControlPlan(quality=0.9, refined=0.02),
    ]
)


def readings(sites: int):
    seconds = st.one_of(st.none(), NUMBERS)
    return st.lists(
        st.builds(Statistics, st.tuples(*[SAMPLES] * sites), seconds), min_size=1, max_size=30
    )  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(target=TARGETS, given_=readings(2))
def test_bounded_and_finite_whatever_is_read(target: ControlPlan, given_: list[Statistics]) -> None:
    state = controller.initial(target, (0.01, 0.2))
    for reading in given_:
        before = state
        state = controller.step(state, reading)
        assert state.target is target
        for old, new in zip(before.sites, state.sites, strict=True):
            assert target.tau_least <= new.tau <= target.tau_most
            assert target.tau_least <= new.safe <= target.tau_most
            assert abs(math.log(new.tau / old.tau)) <= controller.MOST_MOVE * (1 + 1e-9)
            assert 0 < new.gain <= controller.GAIN
    assert state.readings == len(given_)


@settings(max_examples=40, deadline=None)
@given(target=TARGETS, reading=readings(2))
def test_pure(target: ControlPlan, reading: list[Statistics]) -> None:
    state = controller.initial(target, (0.01, 0.02))
    kept = replace(state)
    assert controller.step(state, reading[0]) == controller.step(state, reading[0])
    assert state == kept


def plant(slope: float, knee: float, least: float):
    """Error as a function of tau: a floor that both planes leave, and a power of tau."""
    return lambda tau: math.hypot(least, (tau / knee) ** slope * 0.1)


def run(state, error_of, steps, noise=0.0, seed=0):
    draws = random.Random(seed)
    path = []
    for _ in range(steps):
        samples = tuple(SiteSample(10, error_of(s.tau) * math.exp(draws.gauss(0, noise))) for s in state.sites)
        state = controller.step(state, Statistics(samples))
        path.append(state.sites[0].tau)
    return state, path


@settings(max_examples=60, deadline=None)
@given(slope=st.floats(0.2, 6.0), knee=st.floats(0.003, 0.1), start=st.floats(2e-4, 0.2), budget=st.floats(0.02, 0.3))
def test_converges_and_then_stands_still(slope: float, knee: float, start: float, budget: float) -> None:
    error_of = plant(slope, knee, 0.001)
    target = ControlPlan(error_budget=budget)
    state, _ = run(controller.initial(target, (start,)), error_of, 150)
    tau = state.sites[0].tau
    state, path = run(state, error_of, 30)
    assert path == [tau] * 30, "it goes on moving"
    if target.tau_least < tau < target.tau_most:
        assert controller.STAY[0] * budget <= error_of(tau) <= budget
    elif tau == target.tau_least:
        assert error_of(tau) > budget * controller.STAY[0]
    else:
        assert error_of(tau) <= budget


@settings(max_examples=30, deadline=None)
@given(slope=st.floats(0.3, 3.0), seed=st.integers(0, 99))
def test_noise_does_not_make_it_swing(slope: float, seed: int) -> None:
    """10 % noise on each reading: once there, tau stays within a factor of two and seldom turns."""
    target = ControlPlan(error_budget=0.1)
    state, _ = run(controller.initial(target, (0.01,)), plant(slope, 0.02, 0.001), 100, 0.1, seed)
    _, path = run(state, plant(slope, 0.02, 0.001), 200, 0.1, seed + 1)
    moves = [b / a for a, b in itertools.pairwise(path) if a != b]
    turns = sum((a > 1) != (b > 1) for a, b in itertools.pairwise(moves))
    assert max(path) / min(path) < 2
    assert turns < 20


def test_follows_a_sudden_shift_of_the_text() -> None:
    target = ControlPlan(error_budget=0.05)
    state, _ = run(controller.initial(target, (0.01,)), plant(1.0, 0.02, 0.001), 60)
    state, path = run(state, plant(1.0, 0.002, 0.001), 60)
    assert plant(1.0, 0.002, 0.001)(path[-1]) <= 0.05
    state, path = run(state, plant(1.0, 0.02, 0.001), 60)
    assert plant(1.0, 0.02, 0.001)(path[-1]) >= controller.STAY[0] * 0.05, "precision is given back"


def test_out_of_reach_is_said() -> None:
    state, path = run(controller.initial(ControlPlan(error_budget=0.01), (0.01,)), plant(1.0, 0.02, 0.05), 60)
    assert path[-1] == state.target.tau_least
    assert state.sites[0].verdict == "out of reach"


def test_the_guard_acting_backs_off_and_is_not_tried_again_at_once() -> None:
    """While a floor is up the error is that of more precision: it must not invite a larger tau."""
    state = controller.initial(ControlPlan(error_budget=0.2), (0.1,))
    state = controller.step(state, Statistics((SiteSample(10, 0.15, raised=1),)))
    assert state.sites[0].tau == pytest.approx(0.05)
    assert state.sites[0].safe <= 0.05
    assert state.backed_off == 1
    for _ in range(20):
        state = controller.step(state, Statistics((SiteSample(10, 0.001, held=True),)))
    assert state.sites[0].tau == pytest.approx(0.05)
    for _ in range(10):
        state = controller.step(state, Statistics((SiteSample(10, 0.001),)))
    assert state.sites[0].tau < 0.1, "past where the guard had to act"


@pytest.mark.parametrize(
    "sample",
    [
        SiteSample(9, math.nan),
        SiteSample(9, math.inf),
        SiteSample(9, -1.0),
        SiteSample(-1, 0.1),
        SiteSample(9, 0.0, 1, 2),
    ],
)
def test_evidence_that_cannot_be_judged_counts_against_tau(sample: SiteSample) -> None:
    state = controller.step(controller.initial(ControlPlan(error_budget=0.1), (0.01,)), Statistics((sample,)))
    assert state.sites[0].tau == pytest.approx(0.005)
    assert (state.rejected, state.backed_off) == (1, 1)


def test_no_steps_no_move() -> None:
    state = controller.initial(ControlPlan(error_budget=0.1), (0.01,))
    assert controller.step(state, Statistics((SiteSample(0, 5.0),))).sites == state.sites


def test_refined_share_is_held_by_all_sites_together() -> None:
    state = controller.initial(ControlPlan(refined=0.1), (0.01, 0.04))
    for _ in range(80):
        shares = [min(1.0, 0.001 / s.tau) for s in state.sites]
        samples = tuple(SiteSample(10, 0.05, 1000, int(1000 * share)) for share in shares)
        state = controller.step(state, Statistics(samples))
    assert sum(s.refined for s in samples) / 2000 == pytest.approx(0.1, rel=0.2)
    assert state.sites[1].tau / state.sites[0].tau == pytest.approx(4.0), "what layers differ in is kept"


def test_speed_is_reached_and_no_more_precision_is_given_up_than_needed() -> None:
    def seconds(state):
        return 0.02 + 0.02 * min(1.0, 0.005 / state.sites[0].tau)

    state = controller.initial(ControlPlan(speed=40.0), (0.005,))
    for _ in range(80):
        state = controller.step(state, Statistics((SiteSample(10, 0.05),), seconds(state)))
    assert 40.0 <= 1 / seconds(state) <= 45.0
    for _ in range(80):  # a faster machine: back to the plan's tau, not below
        state = controller.step(state, Statistics((SiteSample(10, 0.05),), seconds(state) / 10))
    assert state.sites[0].tau == pytest.approx(0.005, rel=0.2)


def test_the_error_limit_has_the_last_word() -> None:
    state = controller.initial(ControlPlan(speed=1e6, error_budget=0.05), (0.001,))
    for _ in range(100):
        samples = (SiteSample(10, plant(1.0, 0.02, 0.001)(state.sites[0].tau)),)
        state = controller.step(state, Statistics(samples, 1.0))
    assert plant(1.0, 0.02, 0.001)(state.sites[0].tau) <= 0.05
    assert state.bound > 10, "it says that the limit binds"


def test_counters_wrap_and_are_set_back() -> None:
    top = 2**63 - 1
    assert controller.advance(top, -(2**63) + 4) == (5, False)
    assert controller.advance(10, 25) == (15, False)
    assert controller.advance(1000, 3) == (3, True)
    assert controller.advance(0, 0) == (0, False)


def test_quality_becomes_an_error_budget_that_shrinks_with_it() -> None:
    limits = [ControlPlan(quality=q).error_limit for q in (0.9, 0.95, 0.99)]
    assert limits[0] > limits[1] > limits[2] > 0
    assert ControlPlan(quality=0.99, relation=(0.0, 0.0, 1.0)).error_limit == pytest.approx(0.01)
    assert ControlPlan(speed=3.0).error_limit is None


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, "nothing to hold"),
        ({"quality": 1.0}, "beyond what both planes"),
        ({"quality": 0.991}, "quality 0.991 is beyond"),
        ({"quality": 0}, "quality is 0"),
        ({"quality": 1.5}, "quality is 1.5"),
        ({"error_budget": 0.0}, "error_budget is 0.0"),
        ({"error_budget": math.inf}, "error_budget is inf"),
        ({"speed": 0}, "speed is 0"),
        ({"speed": math.nan}, "speed is nan"),
        ({"quality": 0.99, "error_budget": 0.1}, "contradict"),
        ({"speed": 3.0, "refined": 0.1}, "contradict"),
        ({"speed": 3.0, "tau_least": 0.5}, "tau_least 0.5 is not below"),
        ({"quality": 0.99, "relation": (1.0,)}, "three numbers"),
        ({"quality": True}, "quality is True"),
    ],
)
def test_impossible_targets(options: dict[str, object], says: str) -> None:
    with pytest.raises(PlanError, match=says):
        ControlPlan.of(options)


def test_memory_is_refused_with_what_to_do() -> None:
    with pytest.raises(OptionError, match="moves no byte") as caught:
        ControlPlan.of({"memory": 1e9})
    assert "tokens_for" in caught.value.fix
    with pytest.raises(OptionError, match="'qualty'"):
        ControlPlan.of({"qualty": 0.99})


def test_starts_outside_the_limits() -> None:
    with pytest.raises(OptionError, match="tau starts at 0"):
        controller.initial(ControlPlan(quality=0.99), (0.0,))
