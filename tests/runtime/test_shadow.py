"""The exact path of a shadow step over one layer: very long rows, masks, rows that see nothing, NaN."""

from __future__ import annotations

import math

import pytest
import torch

from lamp_compile.plan import SitePlan
from lamp_compile.runtime import guard, reference
from lamp_compile.runtime.arguments import Visibility
from lamp_compile.runtime.cache_layers import LayerSpec, NestedLayer
from lamp_compile.runtime.controls import SiteControls
from lamp_compile.runtime.insured_layer import InsuredLayer
from lamp_compile.runtime.shadow import Measure, ShadowTally, measuring
from tests.tolerances import ARITHMETIC, STORAGE

HOW = {"causal": "bottom_right", "window": 0, "scale": 0.25, "softcap": 0.0}


def layer_of(
    keys: int, kind: type[NestedLayer] = NestedLayer, **fields
) -> tuple[NestedLayer, torch.Tensor, torch.Tensor]:
    plan = SitePlan("site", exact_tier="host" if kind is InsuredLayer else "none", **fields)
    layer = kind(LayerSpec(plan, SiteControls.of(plan, 1)), keys)
    k, v = torch.randn(2, 1, 1, keys, 16)
    layer.update(k, v)
    return layer, k, v


def shadowed(layer: NestedLayer, q: torch.Tensor, mask: torch.Tensor | None = None):
    measure, tally = Measure(), ShadowTally()
    with measuring(measure):
        out = layer.attend(q, mask, None, None, **{**HOW, "causal": "" if mask is not None else HOW["causal"]})
    loud = measure.finish(tally)
    return out, tally.sites["site"], loud


@pytest.mark.parametrize("kind", [NestedLayer, InsuredLayer])
def test_very_long_rows(kind: type[NestedLayer]) -> None:
    """33,000 keys: the exact path is exact over what it has, and the error that it finds is the true one."""
    layer, k, v = layer_of(33_000, kind)
    q = torch.randn(1, 2, 1, 16)
    plain = layer.attend(q, None, None, None, **HOW)
    wanted, _ = reference.exact_attention(q, k, v, Visibility(33_000), HOW["scale"])
    out, site, loud = shadowed(layer, q)
    true = float((plain.double() - wanted).square().sum(-1).div(wanted.square().sum(-1)).mean().sqrt())
    error = float((out.double() - wanted).norm() / wanted.norm())
    if kind is InsuredLayer:
        assert error < ARITHMETIC[torch.float32].relative
        assert (site.square / site.rows) ** 0.5 == pytest.approx(true, rel=1e-3)
    else:
        assert 0 < error < STORAGE["nested8"].relative * 2
    assert site.rows == 2
    assert not loud


def test_rows_that_see_nothing_are_left_out() -> None:
    layer, *_ = layer_of(64)
    mask = torch.ones(1, 1, 3, layer.max_cache_len, dtype=torch.bool)
    mask[:, :, 1] = False
    out, site, _ = shadowed(layer, torch.randn(1, 2, 3, 16), mask)
    assert site.rows == 4
    assert not out[:, :, 1].any()
    assert math.isfinite(site.square)


def test_a_lost_row_is_loud() -> None:
    layer, *_ = layer_of(64, InsuredLayer)
    layer.v_scale[:, :, 3] = torch.nan
    _, site, loud = shadowed(layer, torch.randn(1, 2, 1, 16))
    assert loud == ["site"]
    assert (site.nonfinite, site.over_budget) == (2, 2)
    assert math.isfinite(site.largest + site.square), "one lost row does not spoil what is reported after it"


def test_the_state_is_the_callers_to_put_back() -> None:
    layer, *_ = layer_of(64)
    shadowed(layer, torch.randn(1, 2, 1, 16))
    assert layer.stats[0, 0, guard.STEPS] == 1
