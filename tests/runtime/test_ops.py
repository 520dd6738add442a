"""The registered operators: schemas, fakes, gradients, compile."""

import pytest
import torch

from lamp_compile.errors import ModelError
from lamp_compile.runtime import guard, ops
from tests.tolerances import STORAGE


def planes(keys: int = 200, dim: int = 64, k_format: str = "nested8", v_format: str = "nested8", tile: int = 128):
    k, v = torch.randn(2, 2, keys, dim), torch.randn(2, 2, keys, dim)
    return (k, v), torch.ops.lamp.quantize(
        k, v, None, k_format=k_format, v_format=v_format, rotation="hadamard", tile=tile, site="s"
    )


SHAPE = dict(causal="bottom_right", window=0, scale=None, softcap=0.0, keys=200)
LOOK = dict(**SHAPE, k_format="nested8", rotation="hadamard", rule="energy", query_bits=8, subtile=32, site="s")
ATTEND = dict(**SHAPE, k_format="nested8", v_format="nested8", rotation="hadamard", query_bits=8, subtile=32, site="s")
SEEN = (None,) * 7


def sample(name: str):
    q = torch.randn(2, 4, 3, 64)
    (k, v), stored = planes()
    importance = torch.rand(2, 2, 3, 8)
    hot = (torch.tensor([0.1, 0.1]), torch.zeros(2), torch.ones(2), guard.new_state(2, 2), guard.new_stats(2, 2))
    levels = torch.randint(0, 3, (2, 2, 3, 8), dtype=torch.uint8)
    return {
        "attention.default": ((q, k, v), dict(causal="bottom_right")),
        "attention.cached": (
            (q, *stored, *hot, *SEEN),
            dict(**ATTEND, rule="energy", guard_window=4, guard_hold=4, hysteresis=0.5),
        ),
        "quantize.default": (
            (k, v, None),
            dict(k_format="nested8", v_format="int8", rotation="hadamard", tile=128, site="s"),
        ),
        "look_ahead.default": ((q, stored[0], stored[2], *SEEN), LOOK),
        "select.default": ((importance, hot[0], hot[1], hot[3], None), dict(exact=True, site="s")),
        "attend.default": ((q, *stored, levels, None, None, *SEEN), ATTEND),
        "guard.default": (
            (
                torch.randn(2, 4, 3, 64),
                torch.randn(2, 4, 3),
                torch.rand(2, 4, 3, 3),
                levels,
                hot[3],
                hot[4],
                hot[1],
                hot[2],
            ),
            dict(window=4, hold=4, hysteresis=0.5, exact=True, site="s"),
        ),
    }[name]


@pytest.mark.parametrize("name", [n if "." in n else n + ".default" for n in ops.SCHEMAS])
def test_opcheck(name: str) -> None:
    packet, overload = name.split(".")
    args, kwargs = sample(name)
    torch.library.opcheck(getattr(getattr(torch.ops.lamp, packet), overload), args, kwargs)


@pytest.mark.parametrize("fmt", ["nested8", "int8", "fp8", "bf16", "fp16"])
@pytest.mark.parametrize("tile", [0, 32, 64, 128])
def test_fake_shapes_of_quantize_are_the_real_ones(fmt: str, tile: int) -> None:
    (k, v), real = planes(k_format=fmt, v_format=fmt, tile=tile)
    with torch._subclasses.FakeTensorMode() as mode:
        fake = torch.ops.lamp.quantize(
            mode.from_tensor(k),
            mode.from_tensor(v),
            None,
            k_format=fmt,
            v_format=fmt,
            rotation="none",
            tile=tile,
            site="",
        )
    for one, other in zip(fake, real, strict=True):
        assert (one.shape, one.dtype, one.stride()) == (other.shape, other.dtype, other.stride())


@pytest.mark.usefixtures("reference_only")
def test_cached_is_the_four_stages_one_after_the_other() -> None:
    args, kwargs = sample("attention.cached")
    q, stored, (tau, floor, budget, state, stats) = args[0], args[1:7], args[7:12]
    out, new_state, new_stats = torch.ops.lamp.attention.cached(*args, **kwargs)
    importance = torch.ops.lamp.look_ahead(q, stored[0], stored[2], *SEEN, **LOOK)
    levels = torch.ops.lamp.select(importance, tau, floor, state, None, exact=False, site="s")
    assert set(levels.unique().tolist()) >= {1, 2}
    wanted, lse, certificate = torch.ops.lamp.attend(q, *stored, levels, None, None, *SEEN, **ATTEND)
    wanted_state, wanted_stats = torch.ops.lamp.guard(
        wanted,
        lse,
        certificate,
        levels,
        state,
        stats,
        floor,
        budget,
        window=4,
        hold=4,
        hysteresis=0.5,
        exact=False,
        site="s",
    )
    for one, other in ((out, wanted), (new_state, wanted_state), (new_stats, wanted_stats)):
        assert torch.equal(one, other)


def test_meeting_point_called_as_it_stands() -> None:
    q, k, v = torch.randn(1, 4, 9, 64), torch.randn(1, 2, 33, 64), torch.randn(1, 2, 33, 64)
    out = torch.ops.lamp.attention(q, k, v)
    wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    assert float((out - wanted).norm() / wanted.norm()) < STORAGE["nested8_high"].relative


def test_no_gradient_is_promised() -> None:
    q = torch.randn(1, 2, 3, 64, requires_grad=True)
    out = torch.ops.lamp.attention(q, q, q)
    with pytest.raises(ModelError, match="no backward"):
        out.sum().backward()
