from __future__ import annotations

import math

import pytest

from lamp_compile.errors import InputError
from lamp_compile.quality.bisect import bisect

SITES = [f"layer.{i}" for i in range(32)]


@pytest.mark.parametrize("fault", range(32))
def test_every_planted_fault_is_found_in_few_measurements(fault):
    found = bisect(SITES, lambda fuel: 1e-5 * fuel + (1e-2 if fuel > fault else 0.0), limit=1e-3)
    assert found.culprit == f"layer.{fault}"
    assert found.fuel == fault + 1
    assert found.before <= 1e-3 < found.after
    assert len(found.steps) <= 2 + 5


def test_a_healthy_model_has_no_culprit():
    found = bisect(SITES, lambda fuel: 1e-5 * fuel, limit=1e-3)
    assert found.culprit is None
    assert len(found.steps) == 2


def test_nan_counts_as_over_the_limit():
    found = bisect(SITES, lambda fuel: math.nan if fuel > 7 else 0.0, limit=1e-3)
    assert found.culprit == "layer.7"


def test_noise_over_the_limit_and_no_sites_are_refused():
    with pytest.raises(InputError, match="nothing rewritten"):
        bisect(SITES, lambda fuel: 1.0, limit=0.1)
    with pytest.raises(InputError, match="no sites"):
        bisect([], lambda fuel: 1.0, limit=0.1)
