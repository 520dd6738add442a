"""Allocation of precision: against brute force, and what a budget may never do."""

from __future__ import annotations

import itertools

import pytest
import torch

from lamp_compile.quality.allocation import KEPT, Option, allocate, between, cheapest, hull


def _units(seed, count=3, each=5):
    made = torch.Generator().manual_seed(seed)
    units = {}
    for index in range(count):
        bits = torch.rand(each, generator=made).sort().values.tolist()
        kl = torch.rand(each, generator=made).sort(descending=True).values.tolist()
        units[str(index)] = [Option(10.0**-n, b, k) for n, (b, k) in enumerate(zip(bits, kl, strict=True))]
    return units


def _sums(options):
    return sum(o.bits for o in options), sum(o.kl for o in options)


@pytest.mark.parametrize("seed", range(8))
def test_no_other_choice_has_less_kl_at_the_same_bits(seed):
    units = _units(seed)
    everything = [_sums(chosen) for chosen in itertools.product(*units.values())]
    for budget in torch.linspace(0.5, 3.0, 9).tolist():
        bits, kl = _sums(allocate(units, budget).values())
        least = sum(min(o.bits for o in options) for options in units.values())
        assert bits <= max(budget, least)
        best = min((k for b, k in everything if b <= max(budget, least) + 1e-12), default=kl)
        gap = max(a.kl - b.kl for o in units.values() for b, a in itertools.pairwise(hull(o)[::-1]))
        assert best - 1e-9 <= kl <= best + gap, "at most one step of one unit from the best"


@pytest.mark.parametrize("seed", range(8))
def test_fewest_bits_at_a_kl(seed):
    units = _units(seed)
    everything = [_sums(chosen) for chosen in itertools.product(*units.values())]
    for limit in torch.linspace(0.4, 3.0, 9).tolist():
        found = cheapest(units, limit)
        possible = [b for b, k in everything if k <= limit]
        assert (found is None) == (not possible)
        if found is not None:
            bits, kl = _sums(found.values())
            assert kl <= limit + 1e-9
            gap = max(a.bits - b.bits for o in units.values() for b, a in itertools.pairwise(hull(o)))
            assert bits <= min(possible) + gap


def test_the_hull_leaves_out_what_a_mixture_beats():
    options = [Option(0.1, 1.0, 10.0), Option(0.03, 2.0, 9.0), Option(0.01, 3.0, 1.0), Option(0.0, 4.0, 1.5)]
    assert [o.tau for o in hull(options)] == [0.1, 0.01]
    sensitive, dull = [Option(0.1, 1, 8.0), Option(0.0, 2, 1.0)], [Option(0.1, 1, 0.2), Option(0.0, 2, 0.1)]
    chosen = allocate({"sensitive": sensitive, "dull": dull}, 3.0)
    assert (chosen["sensitive"].tau, chosen["dull"].tau) == (0.0, 0.1)


def test_what_lies_between_is_between():
    options = [Option(0.0, 8.0, 1e-5), Option(0.01, 5.0, 2e-5), Option(0.1, 4.2, 9e-4), Option(KEPT, 16.0, 0.0)]
    made = between(options, 3)
    assert set(options) <= set(made)
    assert len(made) == 4 + 3
    inner = [o for o in made if 0.01 < o.tau < 0.1]
    assert all(4.2 < o.bits < 5.0 and 2e-5 < o.kl < 9e-4 for o in inner)
    assert [o.tau for o in inner] == sorted(o.tau for o in inner)
