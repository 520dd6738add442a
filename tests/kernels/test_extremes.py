"""Where whole numbers, exponents and strides are at their limits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from lamp_compile.runtime import fused_ops as _fused  # noqa: F401 (registers torch.ops.lamp)
from lamp_compile.runtime import guard, kernels, reference
from lamp_compile.runtime.fused_ops import inference_only
from tests.kernels import calls
from tests.tolerances import ARITHMETIC, KERNELS


def compare(call: calls.Call, device: calls.Where) -> Iterator[tuple[calls.Outcome, calls.Outcome]]:
    """(kernels, reference with the same decisions), over planes of either layout."""
    wanted = calls.by_reference(call, calls.levels_of(call))
    for laid in calls.layouts(call, device):
        yield calls.by_kernels(laid, device), wanted


@pytest.mark.parametrize("floor", [0.0, 1.0])
@pytest.mark.parametrize(("dim", "rotation"), [(128, "hadamard"), (192, "hadamard"), (256, "hadamard"), (256, "none")])
def test_products_of_one_sign_stay_exact(dim, rotation, floor, device):
    """An outlier in channel 0 is spread over all rotated channels with one sign: the largest products there are."""
    call = calls.make(dim=dim, keys=64, batch=1, tau=calls.COLD, floor=floor, rotation=rotation)
    torch.manual_seed(1)
    along = torch.ones(dim) if rotation == "none" else 8 * torch.eye(dim)[0]
    q, k = along + 0.02 * torch.randn(call.q.shape), along + 0.02 * torch.randn(1, 2, 64, dim)
    stored = reference.quantize(k, call.v, None, "nested8", "nested8", rotation, 32)
    planes = (stored.k_high, stored.k_residual, stored.k_scale, *call.planes[3:])
    for got, wanted in compare(replace(call, q=q, k=k, planes=planes), device):
        assert float((got.lse - wanted.lse).abs().max()) < KERNELS["lse"].bound
        assert calls.whole(got.out, wanted.out) < KERNELS["output"].bound


def test_squares_of_weights_stay_finite(device):
    """Relative to a first sub-tile far under the rest weights are large, and their squares more so."""
    call = calls.make(dim=64, keys=8192, batch=1, heads=8, kv_heads=1, floor=1.0, sharpness=0.05)
    bias = torch.zeros(1, 1, 1, 8192)
    bias[..., :32] = -41.3  # 59.6 powers of two, and a thousand keys of a column behind them
    seen = tuple(bias if index == 1 else x for index, x in enumerate(call.seen))
    for got, wanted in compare(replace(call, seen=seen), device):
        assert calls.whole(got.out, wanted.out) < KERNELS["refined"].bound
        assert not got.state[..., guard.FLAGS].any()
        assert not got.state[..., guard.FLOOR].any()


def test_odd_strides_of_settings_are_settings(device):
    """tau, floor and budget ``[B, G]`` and a balance ``[B, G, D]`` that are views."""
    tau = torch.tensor([[0.02, 0.2], [0.1, 0.05]])
    balance = torch.rand(2, 2, 64, generator=torch.Generator().manual_seed(0)) + 0.5
    call = calls.make(tau=tau, balance=balance, floor=torch.zeros(2, 2), budget=torch.ones(2, 2))
    turned = [x.t().contiguous().t() for x in call.hot[:3]]
    views = replace(
        call, hot=(*turned, *call.hot[3:]), balance=balance.transpose(1, 2).contiguous().transpose(1, 2)
    )  # fmt: skip
    assert not views.hot[0].is_contiguous()
    one, other = calls.by_kernels(call, device), calls.by_kernels(views, device)
    assert torch.equal(one.out, other.out)
    assert torch.equal(one.stats, other.stats)


def test_an_empty_range_behind_the_last_key_reads_nothing(device):
    """A sequence that is padding up to its last key, and queries beyond the keys under a window."""
    for call in calls.layouts(calls.make(keys=64, start=torch.tensor([64, 10])), device):
        got = calls.by_kernels(call, device)
        assert got.lse[0].eq(-torch.inf).all()
        assert got.out[0].eq(0).all()
    for call in calls.layouts(calls.make(keys=32, tokens=40, causal="top_left", window=3), device):
        far = calls.by_kernels(call, device)
        assert far.lse[:, :, 36:].eq(-torch.inf).all()


def test_asked_for_gradients_it_raises(monkeypatch):
    q = torch.ones(1, 2, 1, 4, requires_grad=True)
    out = inference_only(torch.ones(1, 2, 1, 4), q)
    with pytest.raises(Exception, match="no backward pass"):
        out.sum().backward()
    with torch.no_grad():
        assert not inference_only(torch.ones(1), q).requires_grad
    assert kernels.FORMAT == "nested8"


@pytest.mark.parametrize("tau", [calls.COLD, None, 0.0], ids=["cold", "mixed", "refined"])
def test_a_mask_of_nothing_changes_nothing(tau, device):
    """Rows that could see different keys are certified as the others are: what refinement takes back is less than 0."""
    call = calls.make(tau=tau, sharpness=2.0)
    mask = torch.ones(2, 4, 1, 150, dtype=torch.bool)
    got = calls.by_kernels(replace(call, seen=(mask, *call.seen[1:])), device)
    for name, wanted in calls.by_kernels(call, device).tensors().items():
        torch.testing.assert_close(getattr(got, name), wanted, rtol=ARITHMETIC[torch.float32].relative, atol=1e-6)
