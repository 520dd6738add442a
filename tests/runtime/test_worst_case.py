"""The worst-case form of the certificate is never violated: searched for at random, by shrinking and by climbing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lamp_compile.errors import OptionError
from lamp_compile.ir import Precision
from lamp_compile.runtime import certificate, reference, worst_case
from lamp_compile.runtime.arguments import Scores, Visibility
from lamp_compile.runtime.formats import get
from lamp_compile.runtime.worst_case import Stored

SUBTILE = 32
CLIMBS = 120
POPULATION = 48


def _case(q, k, v, levels, *, scores, visible, name="nested8", balance=None):
    """True error and bound of every row ``[B, H, S]``."""
    planes = reference.quantize(k, v, balance, name, name, scores.rotation, 32)
    out, _, sums = reference.attend(q, planes, levels, None, balance, visible, scores, name, name, SUBTILE)
    exact, _ = reference.exact_attention(q, k, v, visible, scores.scale, scores.softcap)
    error = (out.double() - exact).norm(dim=-1)
    found = worst_case.bound(q, Stored(planes, levels, balance, name, name, SUBTILE), visible, scores, out)
    return error, found, certificate.estimate(out, sums)


def _levels(batch, heads, queries, tiles, generator):
    drawn = torch.rand(batch, heads, queries, tiles, generator=generator) < 0.5
    return torch.where(drawn, int(Precision.HIGH), int(Precision.BOTH)).to(torch.uint8)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    seed=st.integers(0, 2**31),
    dim=st.sampled_from([16, 64, 96]),
    keys=st.integers(1, 80),
    sizes=st.tuples(*[st.floats(-7, 3)] * 3),
    outliers=st.floats(0, 2.5),
    name=st.sampled_from(["nested8", "int8"]),
    rotated=st.booleans(),
    query_bits=st.sampled_from([0, 8]),
    softcap=st.sampled_from([0.0, 5.0]),
    sinks=st.booleans(),
    balanced=st.booleans(),
    double=st.booleans(),
)
def test_no_violation_is_found_at_random(
    seed, dim, keys, sizes, outliers, name, rotated, query_bits, softcap, sinks, balanced, double
):
    made = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=made, dtype=torch.float64 if double else torch.float32)

    q, k, v = (
        10.0**size * draw(2, heads, n, dim) for size, heads, n in zip(sizes, (4, 2, 2), (3, keys, keys), strict=True)
    )
    k[..., 1] *= 10.0**outliers
    k[:, :, : keys // 3] *= 1e-3
    tiles = -(-keys // 32)
    visible = Visibility(keys, sinks=draw(4) if sinks else None, causal="bottom_right" if keys >= 3 else "")
    scores = Scores(dim**-0.5, softcap, "hadamard" if rotated else "none", query_bits)
    balance = (1 + draw(2, dim).abs()) if balanced else None
    levels = _levels(2, 2, 3, tiles, made)
    error, found, _ = _case(q, k, v, levels, scores=scores, visible=visible, name=name, balance=balance)
    assert torch.isfinite(found).all()
    assert (error <= found).all(), float((error / found).max())


@pytest.mark.parametrize("level", [Precision.HIGH, Precision.BOTH])
@pytest.mark.parametrize("rotation", ["none", "hadamard"])
def test_climbing_towards_a_violation_finds_none(level, rotation):
    """Small changes of q, k and v that make error / bound larger are kept, in many populations at once."""
    made = torch.Generator().manual_seed(1)
    dim, keys = 16, 6
    scores, visible = Scores(dim**-0.5, 0.0, rotation, 8), Visibility(keys)
    levels = torch.full((POPULATION, 1, 1, 1), int(level), dtype=torch.uint8)

    def draw():
        return [torch.randn(POPULATION, 1, n, dim, generator=made) for n in (1, keys, keys)]

    def ratio(tensors):
        error, found, _ = _case(*tensors, levels, scores=scores, visible=visible)
        return (error / found)[:, 0, 0]

    best = draw()
    height = start = ratio(best)
    for step in range(CLIMBS):
        size = 10.0 ** -(step % 4)
        tried = [x + size * d * (torch.rand(x.shape, generator=made) < 0.3) for x, d in zip(best, draw(), strict=True)]
        there = ratio(tried)
        better = there > height
        best = [torch.where(better[:, None, None, None], t, b) for t, b in zip(tried, best, strict=True)]
        height = torch.where(better, there, height)
    assert (height <= 1).all()
    assert height.median() > 1.5 * start.median(), "the search itself must find worse inputs"
    assert height.max() > 0.1, "a bound that nothing comes near says nothing"


def test_the_formats_worst_case_is_reached_but_not_passed():
    made = torch.Generator().manual_seed(2)
    for name in ("nested8", "int8"):
        fmt = get(name)
        x = torch.randn(4000, 16, generator=made, dtype=torch.float64) * 10.0 ** torch.linspace(-9, 4, 4000)[:, None]
        high, residual, scale = fmt.quantize(x)
        for refined in (False, True):
            back = fmt.dequantize(high, residual if refined and fmt.residual_bits else None, scale.double())
            used = (back - x).abs().amax(-1) / fmt.worst(scale.double(), refined)
            assert used.max() <= 1
            assert used[scale > 1e-4].max() > 0.95, "no looser than it must be"


def test_it_covers_what_the_estimate_misses():
    """Every value rounds the same way: errors add up, and sums of squares cannot see it."""
    keys, dim = 128, 16
    k = torch.zeros(1, 1, keys, dim)
    v = torch.full((1, 1, keys, dim), 0.49 / 119)
    v[..., 0] = 1.0
    levels = torch.full((1, 1, 1, keys // 32), int(Precision.BOTH), dtype=torch.uint8)
    scores = Scores(1.0, 0.0, "none", 0)
    error, found, estimate = _case(torch.zeros(1, 1, 1, dim), k, v, levels, scores=scores, visible=Visibility(keys))
    assert error > 5 * estimate
    assert error <= found < 3 * error


def test_rows_without_a_key_and_arguments_without_a_worst_case():
    q, k, v = torch.randn(3, 1, 2, 40, 16)
    scores, visible = Scores(0.25, 0.0, "hadamard", 8), Visibility(0)
    levels = torch.zeros(1, 2, 40, 2, dtype=torch.uint8)
    error, found, _ = _case(q, k, v, levels, scores=scores, visible=visible)
    assert (found == 0).all()
    assert (error == 0).all()
    planes = reference.quantize(k, v, None, "bf16", "bf16", "none", 32)
    with pytest.raises(OptionError, match="no worst case"):
        worst_case.bound(q, Stored(planes, levels, None, "bf16", "bf16"), visible, scores)
    planes = reference.quantize(k, v, None, "nested8", "nested8", "none", 32)
    for wrong, bits in ((torch.full_like(levels, int(Precision.EXACT)), 8), (levels, 16)):
        with pytest.raises(OptionError, match=r"worst case|original"):
            worst_case.bound(q, Stored(planes, wrong), visible, Scores(0.25, query_bits=bits))
