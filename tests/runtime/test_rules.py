"""The selection rules against brute force over single numbers, and the look-ahead that feeds them."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lamp_compile.errors import OptionError
from lamp_compile.runtime import lookahead, reference
from tests.runtime import brute_force
from tests.runtime.test_reference import SUBTILE, TILE, store

REAL_RULES = sorted(name for name, rule in lookahead.all_rules().items() if not rule.control)


def row_of(case: brute_force.Case, b: int, h: int, i: int) -> tuple[list[float], list[float], list[bool]]:
    """Look-ahead weights z, scores y and liveness of one query over the whole capacity."""
    planes = store(case)
    keys = reference._dequantize_keys(planes.k_high, None, planes.k_scale, "nested8", torch.float64)
    query = reference.prepare_query(case.q.double(), None, case.scores)[b, h, i]
    y = brute_force.scores_of(case, b, h, i, keys[b, h // (case.q.shape[1] // case.k.shape[1])], query)
    live = [j < case.visible.keys and brute_force.is_live(case, b, h, i, j) for j in range(len(y))]
    logits = [v for v, alive in zip(y, live, strict=True) if alive]
    total = sum(math.exp(v) for v in logits)
    if case.visible.sinks is not None:
        total += math.exp(float(case.visible.sinks[h]))
    z = [math.exp(v) / total if alive and total else 0.0 for v, alive in zip(y, live, strict=True)]
    return z, y, live


def refined(rule: str, tau: float, z: list[float], y: list[float], live: list[bool]) -> set[int]:
    """Sub-tiles that the rule, as it is written in its source, would refine for this row."""
    tiles = [range(t, t + SUBTILE) for t in range(0, len(z), SUBTILE)]
    if rule == "energy":
        return {n for n, t in enumerate(tiles) if sum(z[j] ** 2 for j in t) > tau**2}
    if rule == "lamp_strict":
        return {n for n, t in enumerate(tiles) if any(2 * z[j] * (1 - z[j]) * abs(y[j]) > tau for j in t)}
    if rule == "lamp_relaxed":
        top = max((abs(y[j]) * math.exp(y[j]) for j in range(len(y)) if live[j]), default=0.0)
        return {n for n, t in enumerate(tiles) if any(live[j] and abs(y[j]) * math.exp(y[j]) > tau * top for j in t)}
    assert rule == "mass"  # the fewest sub-tiles, heaviest first, that hold more than 1 - tau
    order = sorted(range(len(tiles)), key=lambda n: -sum(z[j] for j in tiles[n]))
    taken, held = set(), 0.0
    for n in order:
        mass = sum(z[j] for j in tiles[n])
        if held >= 1 - tau or mass == 0:
            break
        taken.add(n)
        held += mass
    return taken


def importance_of(case: brute_force.Case, rule: str) -> torch.Tensor:
    planes = store(case)
    return reference.look_ahead(
        case.q, planes.k_high, planes.k_scale, None, case.visible, case.scores, "nested8", rule, SUBTILE
    )


@settings(max_examples=25, deadline=None)
@given(
    rule=st.sampled_from(REAL_RULES),
    tau=st.floats(0.001, 0.9),
    seed=st.integers(0, 10**6),
    sinks=st.booleans(),
    peaked=st.booleans(),
)
def test_rule_is_its_definition_for_any_query_of_the_group(
    rule: str, tau: float, seed: int, sinks: bool, peaked: bool
) -> None:
    case = brute_force.make(
        seed, keys=150, queries=2, causal="bottom_right", start=torch.tensor([0, 40]),
        sinks=torch.randn(4, dtype=torch.float64) if sinks else None,
    )  # fmt: skip
    if peaked:
        case.q.mul_(4)
    importance = importance_of(case, rule)
    levels = reference.select(importance, torch.full((2,), tau), torch.zeros(2), None, None, False)
    for b in range(2):
        for g in range(2):
            for i in range(2):
                wanted: set[int] = set()
                for h in (2 * g, 2 * g + 1):
                    wanted |= refined(rule, tau, *row_of(case, b, h, i))
                got = {n for n, level in enumerate(levels[b, g, i].tolist()) if level == 2}
                close = {n for n, v in enumerate(importance[b, g, i].tolist()) if abs(v - tau) < 1e-5}
                assert got - close == wanted - close


@pytest.mark.parametrize("rule", REAL_RULES)
def test_smaller_tau_refines_more_and_zero_refines_all_that_matters(rule: str) -> None:
    case = brute_force.make(keys=300, queries=1, heads=4)
    importance = importance_of(case, rule)
    shares = []
    for tau in (0.9, 0.3, 0.1, 0.01, 0.0):
        levels = reference.select(importance, torch.full((2,), tau), torch.zeros(2), None, None, False)
        shares.append(float((levels == 2).sum() / (levels > 0).sum()))
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    assert shares[0] < 1.0


@pytest.mark.parametrize("rule", sorted(lookahead.all_rules()))
def test_tiles_without_a_live_key_are_dead(rule: str) -> None:
    case = brute_force.make(keys=200, queries=1, lengths=torch.tensor([200, 40]), start=torch.tensor([64, 0]))
    dead = importance_of(case, rule) == reference.DEAD
    tiles = reference.layout.tiles_for(200, TILE) * TILE // SUBTILE
    assert dead[0, 0, 0].tolist() == [t < 2 or t >= 7 for t in range(tiles)]
    assert dead[1, 0, 0].tolist() == [t >= 2 for t in range(tiles)]


def test_nothing_live_at_all_is_dead_and_not_nan() -> None:
    case = brute_force.make(keys=40, mask=torch.zeros(1, 1, 1, 40, dtype=torch.bool))
    for rule in lookahead.all_rules():
        assert (importance_of(case, rule) == reference.DEAD).all()


@pytest.mark.parametrize("rule", REAL_RULES)
def test_keys_hidden_by_an_additive_mask_count_as_little_as_masked_ones(rule: str) -> None:
    hidden = torch.zeros(1, 1, 1, 256, dtype=torch.bool)
    hidden[..., 64:128] = True
    additive = torch.zeros(1, 1, 1, 256).masked_fill(hidden, torch.finfo(torch.float32).min)
    masked = brute_force.make(keys=256, queries=1, mask=~hidden)
    added = brute_force.make(keys=256, queries=1, bias=additive)
    for case in (masked, added):
        case.k[:, :, 64:128].mul_(20)  # the hidden keys would win
    wanted, got = importance_of(masked, rule), importance_of(added, rule)
    seen = wanted != reference.DEAD
    assert torch.allclose(got[seen], wanted[seen])
    assert (got[~seen] == 0).all()


def test_static_control_keeps_the_sink_and_the_newest() -> None:
    case = brute_force.make(keys=256, queries=1, causal="bottom_right", start=torch.tensor([40]))
    importance = importance_of(case, "static_tiles")
    levels = reference.select(importance, torch.full((2,), 1 / 3), torch.zeros(2), None, None, False)
    assert levels[0, 0, 0].tolist() == [0, 2, 1, 1, 1, 1, 2, 2]


def test_random_control_has_the_rate_it_is_asked_for() -> None:
    case = brute_force.make(keys=2048, queries=20, heads=2, kv_heads=2)
    importance = importance_of(case, "random_tiles")
    assert float((importance > 0.9).float().mean()) == pytest.approx(0.1, abs=0.02)


def test_unknown_rule_does_not_offer_the_controls() -> None:
    with pytest.raises(OptionError, match="energy") as caught:
        lookahead.get("entropy")
    assert "random" not in str(caught.value)
