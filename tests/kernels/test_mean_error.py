"""Errors that add coherently: none may be left, because they would not shrink as the context grows.

Measured along the direction in which a missing -1/2 would push: in the rotated space all channels at once, in steps of
both planes. Values: the mean error of the output. Keys: how far the log-sum-exp follows the sum of the query.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from itertools import product

import pytest
import torch
from torch import Tensor

from lamp_compile.runtime import reference, rotation
from lamp_compile.runtime.arguments import Scores, Visibility
from lamp_compile.runtime.formats import nested8
from tests.kernels import calls
from tests.tolerances import CPU_KERNELS, KERNELS

LENGTHS = (256, 1024, 4096)
LONG = (16384, 65536)
DIFFUSE, USUAL = 0.05, 1.0


def fast(device: calls.Where) -> bool:
    """No interpreter."""
    return device.type == "cuda" or isinstance(device, calls.Native)


@cache
def case(keys: int, sharpness: float, kind: str, lanes: bool = False) -> calls.Call:
    """Nothing refined, 64 rows; long ones by rows in few steps, for the interpreter's sake."""
    subtile = 32 if keys <= 1024 or lanes else 128
    return calls.make(
        keys=keys, heads=32, kv_heads=2, sharpness=sharpness, rotation=kind, tau=calls.COLD, tile=subtile,
        subtile=subtile, lanes=lanes,
    )  # fmt: skip


def layouts(device: calls.Where) -> tuple[bool, ...]:
    """Whether planes lie by lanes, where both are read."""
    return (False, True) if isinstance(device, calls.Native) else (False,)


@cache
def cold_by_reference(keys: int) -> Tensor:
    call = case(keys, DIFFUSE, "none")
    return calls.by_reference(call, calls.levels_of(call)).out


def drift(call: calls.Call, out: Tensor, lse: Tensor) -> tuple[float, float]:
    """(of values, of keys), in steps; 1/2 is what a missing correction gives."""
    kind = call.options["rotation"]
    visible, scores = Visibility(call.keys), Scores(call.q.shape[-1] ** -0.5)
    exact, exact_lse = reference.exact_attention(call.q, call.k, call.v, visible, scores.scale)
    of_values = float(rotation.rotate(out.double() - exact, kind).mean()) / float(call.planes[5].double().mean())
    # A shift of every key by half a step moves the log-sum-exp by scale * step / 2 * (sum of the query).
    unit = rotation.rotate(call.q.double(), kind).sum(-1) * scores.scale * float(call.planes[2].double().mean())
    shift = lse.double() - exact_lse
    shift = shift - shift.mean()
    return of_values, float((shift * unit).sum() / unit.square().sum())


@pytest.mark.parametrize(("sharpness", "kind"), [(DIFFUSE, "none"), (USUAL, "hadamard")])
def test_no_mean_error_at_any_length(sharpness, kind, device):
    lengths = LENGTHS + (LONG if fast(device) else ())
    for keys, lanes in product(lengths, layouts(device)):
        call = case(keys, sharpness, kind, lanes)
        got = calls.by_kernels(call, device)
        assert got.stats[..., 2].eq(0).all()
        of_values, of_keys = drift(call, got.out, got.lse)
        assert abs(of_values) < KERNELS["drift"].bound, keys
        if sharpness == USUAL:
            assert abs(of_keys) < KERNELS["drift"].bound, keys


@pytest.mark.parametrize("lanes", [False, True], ids=["rows", "lanes"])
def test_the_error_shrinks_as_the_context_grows(lanes, native):
    """Against attention over the same planes: what rounding takes from one weight it gives to another."""
    errors = []
    for keys in (1024, LONG[-1]):
        got = calls.by_kernels(case(keys, DIFFUSE, "none", lanes), native)
        errors.append(calls.whole(got.out, cold_by_reference(keys)))
        assert errors[-1] <= CPU_KERNELS["output"].bound, keys
    assert errors[1] < CPU_KERNELS["growth"].bound * errors[0]


@pytest.mark.parametrize("sharpness", [USUAL, 3.0])
def test_no_mean_error_where_everything_is_refined(sharpness, device):
    """Weights below half a step of the residual plane's row are lost there; their sum must not be felt."""
    for lanes in layouts(device):
        call = case(256, sharpness, "hadamard", lanes)
        call = replace(call, hot=(torch.zeros(2), *call.hot[1:]))
        got = calls.by_kernels(call, device)
        assert torch.equal(got.stats[..., 1], got.stats[..., 2])
        assert all(abs(x) < KERNELS["refined drift"].bound for x in drift(call, got.out, got.lse))


def test_the_measure_sees_a_missing_correction(monkeypatch):
    """The same measure, of a reference that reads the high plane as 16 hi."""
    call = case(1024, USUAL, "hadamard")
    levels = calls.levels_of(call)
    good = calls.by_reference(call, levels)
    assert all(abs(x) < KERNELS["drift"].bound for x in drift(call, good.out, good.lse))
    monkeypatch.setattr(nested8, "HIGH_OFFSET", 0.0)
    planted = calls.by_reference(call, levels)
    assert all(x > KERNELS["planted"].bound for x in drift(call, planted.out, planted.lse))


def test_the_kernels_are_far_from_a_missing_correction(device, monkeypatch):
    """A kernel without the correction would be as near to that reference as this one is to the right one."""
    call = case(1024, DIFFUSE, "none")
    got, levels = calls.by_kernels(call, device), calls.levels_of(call)
    right = calls.whole(got.out, calls.by_reference(call, levels).out)
    monkeypatch.setattr(nested8, "HIGH_OFFSET", 0.0)
    assert calls.whole(got.out, calls.by_reference(call, levels).out) > 5 * right
