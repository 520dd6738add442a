"""The precision controller drives a session's tau between steps."""

from __future__ import annotations

import json

import numpy as np
import pytest

from lamp_compile.errors import OptionError, PlanError
from lamp_compile.runtime.ort.session import OrtSession
from tests.ort.toy import Toy

TOY = Toy()
SITES = [TOY.site(i) for i in range(TOY.layers)]
STEPS = 200
PROMPT = 250


def decode(session: OrtSession, steps: int = STEPS) -> float:
    """Step over random tokens; the refined share of the last quarter."""
    words = np.random.default_rng(3).integers(0, TOY.vocab, PROMPT + steps)
    session.start(1, PROMPT + steps)
    session.prefill([words[:PROMPT]])
    before = np.zeros(2)
    for index in range(steps):
        if index == steps * 3 // 4:
            before = counts(session)
        session.step([[int(words[PROMPT + index])]])
    live, refined = counts(session) - before
    return float(refined / live)


def counts(session: OrtSession) -> np.ndarray:
    found = session.statistics().values()
    return np.array([sum(int(s.live.sum()) for s in found), sum(int(s.refined.sum()) for s in found)])


def test_a_goal_moves_tau_towards_it(session: OrtSession) -> None:
    session.controls.set(tau=0.03)
    free = decode(session)
    assert free < 0.1
    with session.control(refined=0.4) as more:
        reached = decode(session)
        status = more.status()
        assert status["readings"] >= STEPS // 32 - 1
        assert all(site["tau"] < 0.03 for site in status["sites"].values())
        assert all(float(session.controls[name].tau.max()) < 0.03 for name in SITES)
        json.dumps(status)
    assert reached > 0.15
    assert all(session.controls[name].tau.tolist() == pytest.approx([0.03] * TOY.kv_heads) for name in SITES)


def test_a_limit_on_the_error_is_held(session: OrtSession) -> None:
    session.controls.set(tau=0.03)
    decode(session)
    error = max(float(found.error.max()) for found in session.statistics().values())
    control = session.control(error_budget=0.8 * error)
    decode(session)
    assert max(float(found.error.max()) for found in session.statistics().values()) < 0.9 * error
    assert max(float(session.controls[name].tau.max()) for name in SITES) < 0.03
    control.stop()
    held = session.controls[SITES[0]].tau.copy()
    decode(session, 80)
    assert (session.controls[SITES[0]].tau == held).all()  # stopped: nothing moves


def test_one_at_a_time_and_nothing_contradictory(session: OrtSession) -> None:
    with session.control(refined=0.3), pytest.raises(OptionError, match="at work"):
        session.control(refined=0.2)
    with pytest.raises(OptionError, match="contradicts the guard"):
        session.control(error_budget=0.25)
    with pytest.raises(PlanError, match="contradict"):
        session.control(refined=0.3, speed=10)
    with pytest.raises(OptionError, match="unknown"):
        session.control(precision=3)
    with pytest.raises(OptionError, match="memory"):
        session.control(memory=1e9)
    session.controls.set(tau=0.0)
    with pytest.raises(OptionError, match="tau starts"):
        session.control(refined=0.3)
