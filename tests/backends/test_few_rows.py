"""One row through a linear layer on a CPU becomes a loop, and computes what the layer does."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lamp_compile.backends import _few_rows
from tests.tolerances import ARITHMETIC


@pytest.fixture
def spelled(monkeypatch) -> list[int]:
    """How many layers became loops, graph by graph."""
    counts: list[int] = []
    original = _few_rows.spell_out

    def counting(module):
        counts.append(original(module))
        return counts[-1]

    monkeypatch.setattr(_few_rows, "spell_out", counting)
    torch._dynamo.reset()
    return counts


def compiled(function):
    return torch.compile(function, backend="lamp", fullgraph=True)


def close(got: Tensor, wanted: Tensor) -> None:
    assert got.dtype == wanted.dtype
    assert got.shape == wanted.shape
    error = (got.double() - wanted.double()).norm() / wanted.double().norm()
    assert error <= ARITHMETIC[wanted.dtype].relative


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 48), (1, 1, 48), (48,)])
def test_one_row(dtype, bias, shape, spelled):
    layer = nn.Linear(48, 33, bias=bias).to(dtype).eval()
    x = torch.randn(shape).to(dtype)
    with torch.no_grad():
        close(compiled(lambda x: layer(x) * 2)(x), layer(x) * 2)
    assert spelled == [1]


def test_more_rows_stay_a_product(spelled):
    layer = nn.Linear(48, 33).eval()
    with torch.no_grad():
        compiled(layer)(torch.randn(2, 48))
    assert spelled == [0]


def test_rows_that_change_in_place_between_layers(spelled):
    first, second = torch.randn(8, 16), torch.randn(8, 16)

    def both(x):
        a = F.linear(x, first)
        x.add_(1)
        y = x[:, :4]
        y.zero_()
        return a, F.linear(x, second)

    x = torch.randn(1, 16)
    wanted = both(x.clone())
    for got, want in zip(compiled(both)(x.clone()), wanted, strict=True):
        close(got, want)
    assert spelled == [2]


def test_autocast_decides_the_dtype(spelled):
    layer = nn.Linear(48, 33).eval()

    def run(x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return layer(x)

    x = torch.randn(1, 48)
    with torch.no_grad():
        close(compiled(run)(x), run(x))


def test_weights_of_another_dtype_are_left_alone(spelled):
    weight = torch.randn(8, 16, dtype=torch.float64)
    compiled(lambda x: F.linear(x, weight))(torch.randn(1, 16, dtype=torch.float64))
    assert spelled == [0]
