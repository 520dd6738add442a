"""``lamp::linear_int8`` against float64 over the weights as they are stored, eager and spelled out by the compiler."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule

from lamp_compile import backends
from lamp_compile.errors import InputError, ModelError
from lamp_compile.linear_plan import LinearPlan
from lamp_compile.runtime import linear
from lamp_compile.runtime.linear import Int8Linear, quantize_weight
from tests.tolerances import ARITHMETIC, LINEAR

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
WAYS = [("int8", 32), ("int8", 0), ("int8_dynamic", 0)]


def layer(
    dtype: torch.dtype = torch.float32, bias: bool = True, inputs: int = 96, outputs: int = 50, **fields: Any
) -> tuple[nn.Linear, Int8Linear]:
    original = nn.Linear(inputs, outputs, bias=bias).to(dtype).requires_grad_(False)
    return original, Int8Linear(original, LinearPlan("layer", **fields))


def stored(module: Int8Linear) -> Tensor:
    """The weights as float64 ``[N, K]``."""
    groups = module.weight_scale.shape[1]
    floats = module.weight_int8.double().unflatten(1, (groups, -1)) * module.weight_scale.double()[..., None]
    return floats.flatten(1)


def wanted(module: Int8Linear, x: Tensor) -> Tensor:
    """The definition in float64: rounded weights, and for ``int8_dynamic`` each row rounded by its own scale."""
    rows = x.double()
    if module.row.format == "int8_dynamic":
        scale = rows.abs().amax(-1, keepdim=True) / 127
        rows = (x.float() / scale.float()).round().double() * scale
    out = rows @ stored(module).T
    return out if module.bias is None else out + module.bias.double()


def relative(got: Tensor, right: Tensor) -> float:
    return float((got.double() - right).norm() / right.norm())


def spelled_out(module: Int8Linear, x: Tensor) -> Any:
    """The layer as the compiled decode step runs it: a graph with the operator, through the Inductor backend."""
    graph = Graph()
    inputs = [t for t in (x, module.weight_int8, module.weight_scale, module.bias) if t is not None]
    nodes = [graph.placeholder(f"input{i}") for i in range(len(inputs))]
    for node, tensor in zip(nodes, inputs, strict=True):
        node.meta["val"] = tensor
    dynamic = module.row.format == "int8_dynamic"
    given = (*nodes, None)[:4]
    graph.output((graph.call_function(torch.ops.lamp.linear_int8.default, given, {"dynamic": dynamic, "site": ""}),))
    made = GraphModule(nn.Module(), graph)
    run = backends.get("inductor").lower(made, inputs, None, {})
    assert not any("linear_int8" in str(node.target) for node in made.graph.nodes)
    return lambda rows: run(rows, *inputs[1:])[0]


@pytest.mark.parametrize(("format", "group"), WAYS)
@pytest.mark.parametrize("rows", [1, 3, 128])
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_float64_over_the_same_weights(dtype: torch.dtype, rows: int, format: str, group: int) -> None:
    for bias in (True, False):
        _, module = layer(dtype, bias, format=format, group=group)
        x = torch.randn(rows, 96).to(dtype)
        got = module(x)
        assert got.dtype == dtype
        tolerance = ARITHMETIC[torch.float32 if dtype == torch.float64 and format != "int8" else dtype].relative
        if dtype == torch.float64:
            tolerance = ARITHMETIC[torch.float32].relative  # scales and rounded rows are float32
        assert relative(got, wanted(module, x)) < tolerance


@pytest.mark.parametrize(("format", "group"), WAYS)
@pytest.mark.parametrize(("rows", "dtype"), [(1, torch.float32), (3, torch.bfloat16), (16, torch.float32)])
def test_spelled_out_is_the_same_function(rows: int, dtype: torch.dtype, format: str, group: int) -> None:
    _, module = layer(dtype, rows != 3, format=format, group=group)
    x = torch.randn(rows, 1, 96).to(dtype)
    got = spelled_out(module, x)(x)
    assert got.shape == (rows, 1, 50)
    assert got.dtype == dtype
    assert relative(got, wanted(module, x)) < ARITHMETIC[dtype].relative


@pytest.mark.parametrize(("format", "group"), WAYS)
def test_near_the_original_without_bias_of_the_mean(format: str, group: int) -> None:
    original = nn.Linear(1024, 256, bias=False).requires_grad_(False)
    original.weight.normal_()
    module = Int8Linear(original, LinearPlan("layer", format=format, group=group))
    x = torch.randn(512, 1024)
    right = x.double() @ original.weight.double().T
    error = module(x).double() - right
    assert float(error.norm() / right.norm()) < LINEAR[format].relative
    spread = float(error.std()) / error.numel() ** 0.5
    assert abs(float(error.mean())) < 6 * spread


@pytest.mark.parametrize(("inputs", "outputs"), [(1, 1), (7, 3), (33, 65), (513, 2)])
def test_odd_sizes(inputs: int, outputs: int) -> None:
    for format, _ in WAYS:
        _, module = layer(inputs=inputs, outputs=outputs, format=format, group=0)
        for rows in (1, 40):
            x = torch.randn(rows, inputs)
            got, right = module(x), wanted(module, x)
            assert torch.allclose(got.double(), right, rtol=1e-4, atol=ARITHMETIC[torch.float32].relative)


@pytest.mark.parametrize("shape", [(0, 96), (2, 0, 96), (96,), (2, 3, 1, 96)])
def test_any_leading_shape(shape: tuple[int, ...]) -> None:
    for format, group in WAYS:
        _, module = layer(format=format, group=group)
        assert module(torch.randn(shape)).shape == (*shape[:-1], 50)


@pytest.mark.parametrize("rows", [3, 64])
@pytest.mark.parametrize(("format", "group"), WAYS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_a_row_depends_on_no_other(value: float, format: str, group: int, rows: int) -> None:
    """NaN, infinity or a huge number in one row: the others are the same to the bit."""
    _, module = layer(format=format, group=group)
    x = torch.randn(rows, 96)
    before = module(x)
    x[1, 5] = value
    after = module(x)
    others = [row for row in range(rows) if row != 1]
    assert torch.equal(before[others], after[others])
    assert not torch.equal(before[1], after[1])
    assert value == 1e30 or not after[1].isfinite().all()


def test_rows_do_not_depend_on_each_other_when_spelled_out() -> None:
    _, module = layer(format="int8_dynamic", group=0)
    x = torch.randn(4, 96)
    run = spelled_out(module, x)
    before = run(x).clone()
    x[2] *= 1e6
    after = run(x)
    assert torch.equal(before[[0, 1, 3]], after[[0, 1, 3]])


def test_what_is_no_number_in_the_weights_stays_seen() -> None:
    weight = torch.randn(4, 64)
    weight[1, 3], weight[2, 40] = float("nan"), float("inf")
    rounded, scale = quantize_weight(weight, 32)
    out = torch.ops.lamp.linear_int8(torch.ones(1, 64), rounded, scale, None, dynamic=False, site="")
    assert out.isfinite().tolist() == [[True, False, False, True]]


def test_zeros_stay_zeros() -> None:
    rounded, scale = quantize_weight(torch.zeros(3, 64), 32)
    for dynamic, given in ((False, scale), (True, scale[:, :1].contiguous())):
        out = torch.ops.lamp.linear_int8(torch.zeros(2, 64), rounded, given, None, dynamic=dynamic, site="")
        assert torch.equal(out, torch.zeros(2, 3))


def test_extremes_do_not_saturate() -> None:
    """Pairs of the largest products: what CPUs that add them in 16 bits get wrong is not used there."""
    weight = torch.full((16, 64), 127, dtype=torch.int8)
    weight[1::2] = -127
    x = torch.full((linear.INTEGER_ROWS, 64), 127.0)
    out = torch.ops.lamp.linear_int8(x, weight, torch.ones(16, 1), None, dynamic=True, site="")
    assert torch.equal(out, x @ weight.float().T)


def test_changed_weights_are_packed_anew() -> None:
    _, module = layer(format="int8_dynamic", group=0)
    x = torch.randn(linear.INTEGER_ROWS, 96)
    first = module(x)
    assert torch.equal(module(x), first)
    module.weight_int8.neg_()
    assert relative(module(x), wanted(module, x)) < ARITHMETIC[torch.float32].relative
    held = len(linear._layouts)
    del module
    assert len(linear._layouts) < held or not linear.integer_products_exact()


def test_a_wrong_scale_is_noticed() -> None:
    """The tolerance of this file tells one group's scale that is 1 % off."""
    _, module = layer(format="int8", group=32)
    x = torch.randn(64, 96)
    right = wanted(module, x)
    module.weight_scale[:, 0] *= 1.01
    assert relative(module(x), right) > ARITHMETIC[torch.float32].relative


@pytest.mark.parametrize("format", ["int8", "int8_dynamic"])
def test_dynamo_makes_one_graph(format: str) -> None:
    torch._dynamo.reset()
    _, module = layer(format=format, group=0)
    run = torch.compile(module, backend="eager", fullgraph=True, dynamic=True)
    for rows in (2, 5, 40):
        x = torch.randn(rows, 96)
        assert torch.equal(run(x), module(x))


def test_parameters_are_the_originals() -> None:
    original, module = layer(format="int8")
    assert module.weight is original.weight
    assert module.bias is original.bias
    assert list(module.state_dict()) == ["weight", "bias"]
    assert module.extra_bytes == 96 * 50 + 4 * 3 * 50


def test_no_backward() -> None:
    _, module = layer(format="int8")
    out = module(torch.randn(2, 96, requires_grad=True))
    with pytest.raises(ModelError, match="backward"):
        out.sum().backward()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"x": torch.randn(2, 95)}, "x is"),
        ({"x": torch.ones(2, 96, dtype=torch.int64)}, "x is torch.int64"),
        ({"weight": torch.randn(50, 96)}, "weight is torch.float32"),
        ({"scale": torch.ones(50)}, "scale is"),
        ({"scale": torch.ones(50, 7)}, "scale is"),
        ({"bias": torch.ones(49)}, "bias is"),
        ({"x": torch.empty(2, 96, device="meta")}, "is on cpu"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Tensor], says: str) -> None:
    rounded, scale = quantize_weight(torch.randn(50, 96), 32)
    given: dict[str, Any] = {"x": torch.randn(2, 96), "weight": rounded, "scale": scale, "bias": None, **change}
    with pytest.raises(InputError, match=says):
        linear._linear_int8(**given, dynamic=False, site="here")


@pytest.mark.parametrize("weight", [torch.randn(4), torch.ones(4, 4, dtype=torch.int8), torch.randn(0, 4)])
def test_bad_weights_are_refused(weight: Tensor) -> None:
    with pytest.raises(InputError, match="weights"):
        quantize_weight(weight, 0)
    with pytest.raises(InputError, match="do not divide"):
        quantize_weight(torch.randn(4, 10), 3)
