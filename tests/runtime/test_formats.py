"""Storage formats: exact integer semantics, unbiasedness, special values, layout of bytes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lamp_compile.errors import OptionError
from lamp_compile.runtime import formats, rotation
from lamp_compile.runtime.formats import nested8

NAMES = sorted(formats.all_formats())


def rows(seed: int, keys: int = 64, dim: int = 128) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    spread = torch.rand(keys, 1, generator=generator, dtype=torch.float64) * 4 + 1e-2
    return torch.randn(keys, dim, generator=generator, dtype=torch.float64) * spread


def brute_force_nested8(x: torch.Tensor) -> tuple[list[list[int]], list[list[int]], list[float]]:
    """The definition, one value at a time."""
    his, los, scales = [], [], []
    for row in x.tolist():
        s = float(torch.tensor(max(abs(v) for v in row) / 119).half())
        q = [0 if s == 0 else max(-119, min(119, round(v / s))) for v in row]
        hi = [(v + 8) // 16 for v in q]
        his.append(hi)
        los.append([v - 16 * h for v, h in zip(q, hi, strict=True)])
        scales.append(s)
    return his, los, scales


def nibbles(plane: torch.Tensor) -> list[list[int]]:
    """Unpack by arithmetic on Python integers: channel j above, channel j + D/2 below."""
    signed = lambda n: n - 16 if n > 7 else n  # noqa: E731
    return [[signed(b >> 4) for b in row] + [signed(b & 15) for b in row] for row in plane.tolist()]


@pytest.mark.parametrize("seed", range(3))
def test_nested8_is_its_definition(seed: int) -> None:
    x = rows(seed, keys=16, dim=64)
    high, residual, scale = nested8.quantize(x)
    his, los, scales = brute_force_nested8(x)
    assert nibbles(high) == his
    assert nibbles(residual) == los
    assert scale.tolist() == scales
    assert min(map(min, his)) >= -7
    assert max(map(max, his)) <= 7
    assert min(map(min, los)) >= -8
    assert max(map(max, los)) <= 7


def test_nested8_refinement_is_an_added_product() -> None:
    """q.K8 = q.(16 hi) + q.lo exactly: one copy serves both precisions."""
    x = rows(5, dim=64)
    high, residual, scale = nested8.quantize(x)
    both = nested8.dequantize(high, residual, scale)
    only_high = nested8.dequantize(high, None, scale)
    lo = torch.tensor(nibbles(residual), dtype=torch.float32)
    torch.testing.assert_close(both, only_high + (lo + 0.5) * scale.float()[:, None], rtol=1e-6, atol=1e-6)


def test_nested8_bytes_feed_integer_units_directly() -> None:
    """``b & 0xF0`` is 16 * hi of channel j as int8, ``b << 4`` of channel j + D/2."""
    high, _, _ = nested8.quantize(rows(1, keys=4, dim=64))
    upper = (high & 0xF0).view(torch.int8)
    lower = (high << 4).view(torch.int8)
    expected = torch.tensor(nibbles(high)) * 16
    assert torch.equal(torch.cat((upper, lower), -1).long(), expected)


def test_high_plane_is_unbiased_and_would_not_be_without_its_offset() -> None:
    x = rows(2, keys=4096, dim=128)
    high, _, scale = nested8.quantize(x)
    steps = (nested8.dequantize(high, None, scale).double() - x) / scale.double()[:, None]
    assert abs(steps.mean()) < 0.05
    assert abs((steps - nested8.HIGH_OFFSET).mean()) > 0.4


@pytest.mark.parametrize("name", NAMES)
def test_rounding_error_is_as_large_as_the_certificate_assumes(name: str) -> None:
    fmt = formats.get(name)
    x = rotation.rotate(rows(3, keys=2048), "hadamard")
    high, residual, scale = fmt.quantize(x)
    for refined in (True, False):
        error = fmt.dequantize(high, residual if refined else None, scale).double() - x
        if not refined and not fmt.residual_bits:
            error = fmt.dequantize(high, None, scale).double() - x
        assumed = fmt.noise(scale, x.square().mean(-1).float(), refined).double().mean()
        assert 0.7 < error.square().mean() / assumed < 1.4


@pytest.mark.parametrize("name", NAMES)
def test_round_trip_is_unbiased_over_signs_and_rows(name: str) -> None:
    """A mean error that does not average out would grow with the length of the context."""
    fmt = formats.get(name)
    x = rows(4, keys=8192, dim=64)
    error = fmt.dequantize(*fmt.quantize(x)).double() - x
    noise = error.square().mean().sqrt() / error.numel() ** 0.5
    assert abs(error.mean()) < 5 * noise


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nonfinite_rows_stay_visible_and_alone(name: str, bad: float) -> None:
    fmt = formats.get(name)
    x = rows(6, keys=4, dim=64).float()
    x[2, 7] = bad
    back = fmt.dequantize(*fmt.quantize(x))
    assert not back[2].isfinite().all()
    assert back[[0, 1, 3]].isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_zero_rows_are_zero(name: str) -> None:
    fmt = formats.get(name)
    assert torch.equal(fmt.dequantize(*fmt.quantize(torch.zeros(3, 64))), torch.zeros(3, 64))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dim", [64, 80, 96, 128, 192, 256])
def test_declared_sizes_are_real(name: str, dim: int) -> None:
    fmt = formats.get(name)
    high, residual, scale = fmt.quantize(rows(0, keys=8, dim=dim))
    assert (high.shape[-1], residual.shape[-1]) == fmt.plane_widths(dim)
    assert high.dtype == fmt.plane_dtype
    assert fmt.channels(high.shape[-1]) == dim
    stored = sum(t.numel() * t.element_size() * 8 for t in (high, residual, scale)) / (8 * dim)
    assert stored == pytest.approx(fmt.bits_per_value(dim))


def test_nested8_bits() -> None:
    fmt = formats.get("nested8")
    assert fmt.bits_per_value(128) == 8.125
    assert fmt.bits_per_value(128, 0.0) == 4.125
    assert fmt.bits_per_value(64) == 8.25


@given(st.floats(min_value=1e-30, max_value=1e30), st.integers(0, 2**31))
def test_any_finite_size_gives_a_close_or_a_visible_result(size: float, seed: int) -> None:
    """Too large for an fp16 scale must not look healthy; too small may vanish, but stays below half a step."""
    x = torch.randn(1, 64, generator=torch.Generator().manual_seed(seed)) * size
    high, residual, scale = nested8.quantize(x)
    back = nested8.dequantize(high, residual, scale)
    if scale.isinf().any():
        assert back.isnan().all()
    else:
        # A subnormal scale is coarse (2^-24), so its rounding may clip the largest value by 119 half steps of it.
        step = scale.float() * 0.51 + 119 * 2.0**-25
        assert ((back - x).abs() <= step[:, None]).all()


def test_unknown_format_names_the_choices() -> None:
    with pytest.raises(OptionError, match="nested8"):
        formats.get("int3")
