"""Certificate and guard: the estimate follows the true error; the guard rises, holds, sinks, and misses nothing."""

import pytest
import torch

from lamp_compile.ir import Floor, Precision
from lamp_compile.runtime import certificate, guard, reference
from tests.runtime import brute_force
from tests.runtime.test_reference import run, some_levels, store

G, B = 2, 2


def step(state, stats, *, error=0.0, size=1.0, budget=0.1, floor=0.0, bad=None, dead=False, exact=False, **options):
    """One guard step whose certificate says ``error`` for every row (or for kv head 0 only, if a pair is given)."""
    settings = {"window": 4, "hold": 3, "hysteresis": 0.5, **options}
    out = torch.full((B, 2 * G, 1, 4), size / 2)  # norm = size
    rows = torch.zeros(B, 2 * G, 1, 3)
    per_head = error if isinstance(error, tuple) else (error,) * G
    for g, value in enumerate(per_head):
        rows[:, 2 * g : 2 * g + 2, :, 1] = (value * size) ** 2
    lse = torch.full((B, 2 * G, 1), -torch.inf if dead else 0.0)
    if bad is not None:
        out[0, bad] = torch.nan
    levels = torch.tensor([0, 1, 2, 3], dtype=torch.uint8).expand(B, G, 1, 4)
    return guard.step(
        out, lse, rows, levels, state, stats, torch.full((G,), floor), torch.full((G,), budget), exact=exact, **settings
    )


def fresh():
    return guard.new_state(B, G), guard.new_stats(B, G)


def test_over_budget_raises_that_head_only_and_counts_it() -> None:
    state, stats = fresh()
    state, stats = step(state, stats, error=(0.5, 0.01))
    assert state[:, 0, guard.FLOOR].tolist() == [1, 1]
    assert state[:, 1, guard.FLOOR].tolist() == [0, 0]
    assert state[0, 0, guard.HOLD] == 3
    assert stats[0, :, guard.RAISED].tolist() == [1, 0]
    assert stats[0, 0, [guard.STEPS, guard.LIVE, guard.REFINED, guard.EXACT]].tolist() == [1, 3, 2, 1]


def test_mean_over_the_window_decides() -> None:
    state, stats = fresh()
    state, stats = step(state, stats, error=0.15)  # alone 0.15^2 / 4 is below 0.1^2
    assert not state[..., guard.FLOOR].any()
    for _ in range(4):
        state, stats = step(state, stats, error=0.15)
    assert (state[..., guard.FLOOR] == 1).all()


def test_running_mean_is_over_that_many_steps() -> None:
    state, stats = fresh()
    wanted = 0.0
    for error in (0.04, 0.08, 0.02):
        state, stats = step(state, stats, error=error, window=8)
        wanted += (error**2 - wanted) / 8
    assert float(state[0, 0, guard.ERROR]) == pytest.approx(wanted, rel=1e-5)


def test_sinks_one_level_at_a_time() -> None:
    state, stats = fresh()
    state[..., guard.FLOOR] = float(Floor.EXACT)
    seen = []
    for _ in range(3):
        state, stats = step(state, stats, error=0.01)
        seen.append(int(state[0, 0, guard.FLOOR]))
    assert seen == [1, 0, 0]
    assert stats[0, 0, guard.LOWERED] == 2


def test_hold_then_hysteresis_then_down() -> None:
    state, stats = fresh()
    state, stats = step(state, stats, error=0.5)
    seen = []
    for _ in range(6):
        state, stats = step(state, stats, error=0.01)
        seen.append(int(state[0, 0, guard.FLOOR]))
    assert seen == [1, 1, 0, 0, 0, 0]
    assert stats[0, 0, guard.LOWERED] == 1


def test_between_hysteresis_and_budget_the_level_stays() -> None:
    state, stats = fresh()
    state, stats = step(state, stats, error=0.5)
    for _ in range(40):
        state, stats = step(state, stats, error=0.08)
    assert (state[..., guard.FLOOR] == 1).all()
    assert int(stats[0, 0, guard.RAISED]) == 1


def test_constant_error_does_not_oscillate() -> None:
    for error in (0.02, 0.06, 0.099, 0.101, 0.3):
        state, stats = fresh()
        for _ in range(200):
            state, stats = step(state, stats, error=error)
        assert int(stats[0, 0, guard.LOWERED]) == 0


def test_nonfinite_output_escalates_at_once_and_sticks() -> None:
    state, stats = fresh()
    state, stats = step(state, stats, bad=1)
    assert state[0, 0, guard.FLOOR] == Floor.EXACT
    assert guard.flag_names(int(state[0, 0, guard.FLAGS])) == [guard.flag_names(1)[0], guard.flag_names(2)[0]]
    assert not state[0, 1].any()
    assert not state[1].any()
    for _ in range(50):
        state, stats = step(state, stats)
    assert int(state[0, 0, guard.FLAGS]) & guard.NONFINITE
    assert state[0, 0, guard.FLOOR] == 0
    assert stats[0, 0, guard.BAD] == 1
    assert stats[0, 0, guard.RAISED] == 0, "each rise is counted under its own reason"


def test_exact_missing_is_flagged_only_where_it_is_missing() -> None:
    for exact in (True, False):
        state, _ = step(*fresh(), floor=2.0, exact=exact)
        assert bool(int(state[0, 0, guard.FLAGS]) & guard.EXACT_MISSING) is not exact


def test_rows_that_saw_no_key_change_nothing() -> None:
    state, stats = fresh()
    state[..., guard.ERROR] = 0.004
    state[..., guard.HOLD] = 2
    new, counted = step(state, stats, error=9.0, dead=True)
    assert torch.equal(new, state)
    assert not counted[..., guard.STEPS].any()


def test_infinite_budget_switches_it_off() -> None:
    state, stats = fresh()
    for _ in range(5):
        state, stats = step(state, stats, error=50.0, budget=float("inf"))
    assert not state[..., guard.FLOOR].any()


def test_state_without_slots_pools_the_batch() -> None:
    state, stats = guard.new_state(1, G), guard.new_stats(1, G)
    state, stats = step(state, stats, error=0.5, bad=3)
    assert state.shape == (1, G, guard.STATE_FIELDS)
    assert state[0, 0, guard.FLOOR] == 1
    assert state[0, 1, guard.FLOOR] == 2
    assert stats[0, 0, guard.LIVE] == 3 * B


@pytest.mark.parametrize("level", [Precision.HIGH, Precision.BOTH])
@pytest.mark.parametrize("sharpness", [0.1, 1.0, 2.0])
def test_certificate_follows_the_true_error(level: Precision, sharpness: float) -> None:
    """On random data: few rows above three times the estimate, and the estimate is not vacuous."""
    case = brute_force.make(dim=64, keys=500, queries=64, batch=2, dtype=torch.float32)
    case.q.mul_(sharpness)
    exact, _ = reference.exact_attention(case.q, case.k, case.v, case.visible, case.scores.scale)
    levels = torch.full((2, 2, 64, 16), int(level), dtype=torch.uint8)
    out, _, rows = run(case, levels, store(case, tile=128))
    true = (out.double() - exact).norm(dim=-1)
    ratio = certificate.estimate(out, rows).double() / true
    assert (ratio > 1 / 3).double().mean() > 0.99
    assert 0.5 < ratio.median() < 10


def test_certificate_is_not_zero_when_all_is_refined_and_zero_when_exact() -> None:
    case = brute_force.make(keys=64, query_bits=0)
    both = torch.full((2, 2, 3, 2), Precision.BOTH, dtype=torch.uint8)
    assert (run(case, both)[2] > 0).all()
    assert not run(case, torch.full_like(both, Precision.EXACT), exact=True)[2].any()


def test_certificate_counts_the_rounding_of_the_query() -> None:
    shares = []
    for bits in (0, 16, 8):
        case = brute_force.make(keys=64, queries=2, query_bits=bits)
        levels = torch.full_like(some_levels(case), int(Precision.BOTH))
        _, _, found = run(case, levels, names=("bf16", "bf16"))
        shares.append(float(found[..., 0].mean()))
    assert shares[0] < shares[1] < shares[2] / 10
