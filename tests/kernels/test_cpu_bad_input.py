"""What the CPU kernels take as addresses is checked first: nothing is written or read where it does not belong."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lamp_compile.errors import InputError
from lamp_compile.runtime import fused_ops as _fused  # noqa: F401 (registers torch.ops.lamp.append)
from lamp_compile.runtime import guard
from lamp_compile.runtime.kernels import cpu
from tests.kernels import calls

pytestmark = pytest.mark.skipif(cpu.why_not() is not None, reason=f"{cpu.why_not()}")
STORE = dict(k_format="nested8", v_format="nested8", rotation="hadamard", site="site")


def attend(call: calls.Call) -> torch.Tensor:
    options = {name: value for name, value in call.options.items() if name != "launch"}
    made: torch.Tensor = torch.ops.lamp.fused_attention(
        call.q, *call.planes, *call.hot, call.balance, *call.seen, **options
    )
    return made


def with_seen(call: calls.Call, name: str, value: torch.Tensor) -> calls.Call:
    seen = list(call.seen)
    seen[calls.NAMES.index(name)] = value
    return replace(call, seen=tuple(seen))


BAD = {
    "lengths of two for three": lambda c: with_seen(c, "lengths", torch.tensor([3, 4])),
    "lengths of 16 bits": lambda c: with_seen(c, "lengths", torch.tensor([3, 4, 5], dtype=torch.int16)),
    "sinks of three for four heads": lambda c: with_seen(c, "sinks", torch.zeros(3)),
    "a table of floats": lambda c: with_seen(c, "table", torch.zeros(3, 4)),
    "tau of two sequences": lambda c: replace(c, hot=(torch.zeros(2, 2), *c.hot[1:])),
    "half a balance": lambda c: replace(c, balance=torch.ones(2, 32)),
    "statistics of 32 bits": lambda c: replace(c, hot=(*c.hot[:4], c.hot[4].int())),
    "planes of another dtype": lambda c: replace(c, planes=(c.planes[0].short(), *c.planes[1:])),
    "a scale too short": lambda c: replace(
        c, planes=(*c.planes[:2], c.planes[2][..., :-1].contiguous(), *c.planes[3:])
    ),
    "a residual of other tiles": lambda c: replace(
        c, planes=(c.planes[0], c.planes[1][:, :, :1].contiguous(), *c.planes[2:])
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_attention_refuses(name):
    with pytest.raises(InputError):
        attend(BAD[name](calls.make(batch=3)))


@pytest.mark.parametrize(
    ("batch", "heads", "dim"), [(2, 2, 64), (1, 3, 64), (1, 2, 80)], ids=["batch", "heads", "channels"]
)
def test_append_refuses_rows_of_other_planes(batch, heads, dim):
    call = calls.make(batch=1)
    before = [plane.clone() for plane in call.planes]
    k, v = torch.randn(batch, heads, 1, dim), torch.randn(batch, heads, 1, dim)
    with pytest.raises(InputError):
        torch.ops.lamp.append(k, v, *call.planes, None, torch.zeros(1, dtype=torch.int64), None, **STORE)
    assert all(torch.equal(a, b) for a, b in zip(call.planes, before, strict=True))


def test_lengths_of_any_shape_are_one_for_each():
    """Two axes, and every second of a longer row."""
    wanted = attend(calls.make(batch=3, lengths=torch.tensor([40, 90, 7])))
    strided = torch.tensor([40, 0, 90, 0, 7, 0])[::2]
    for lengths in (torch.tensor([[40, 90, 7]]), torch.tensor([[40], [90], [7]]), strided, strided.int()):
        assert torch.equal(attend(calls.make(batch=3, lengths=lengths)), wanted)


def test_one_sink_is_for_all_heads():
    one, four = (attend(calls.make(sinks=torch.full((n,), 0.7))) for n in (1, 4))
    assert torch.equal(one, four)


def test_a_default_dtype_changes_no_state():
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)
        assert guard.new_state(2, 3).dtype == torch.float32
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("sharpness", [150.0, 600.0])
def test_scores_in_the_thousands_stay_finite(sharpness):
    """Refinement moves them further than a float's exponent reaches."""
    call = calls.make(2, sharpness=sharpness, tau=1e-4, keys=300, budget=torch.inf)
    arguments = call.arguments(torch.device("cpu"))
    result = cpu.attend(*arguments, details=True)
    assert result.out.isfinite().all()
    assert result.certificate.isfinite().all()
    assert not arguments[2][3][..., guard.FLAGS].any()
