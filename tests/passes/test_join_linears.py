"""Linear layers of one input become one product over joined weights, and only where nobody can tell."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._guards import TracingContext

import lamp_compile
from lamp_compile.passes.capture import capture
from lamp_compile.passes.join_linears import join_linears
from lamp_compile.runtime.joined_weights import together
from tests.backends.modules import tokens
from tests.passes.joining import Block, Joining, joined, run
from tests.passes.test_patterns import close

pytestmark = pytest.mark.usefixtures("one_thread")


def joined_as_before(model: nn.Module, x: Tensor) -> Joining:
    """The backend that has joined the model's layers, which say what they did."""
    with torch.no_grad():
        wanted = model(x)
    out, backend = run(model, x)
    close(out, wanted)
    assert isinstance(backend, Joining)
    return backend


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dynamic", [False, True])
def test_projections_and_gates_become_one_product_each(bias: bool, dynamic: bool) -> None:
    model, x = Block(bias).eval(), tokens(10)
    with torch.no_grad():
        wanted = model(x)
    out, backend = run(model, x, dynamic=dynamic)
    close(out, wanted)
    assert backend.products == 4
    assert (backend.done[0].products, backend.done[0].layers) == (2, 5)
    assert not backend.done[0].apart
    assert joined(model.q, model.k, model.v)
    assert joined(model.gate, model.up)
    if bias:
        assert together([model.q.bias, model.k.bias, model.v.bias])
    with torch.no_grad():
        close(model(x), wanted)


@pytest.mark.parametrize("dynamic", [False, True])
def test_inductor(dynamic: bool) -> None:
    model, x = Block(bias=True).eval(), tokens(10)
    with torch.no_grad():
        wanted = model(x)
    backend = lamp_compile.backend(join_linears="always", fuel=0)
    out, _ = run(model, x, backend=backend, dynamic=dynamic)
    close(out, wanted)
    (report,) = backend.reports
    assert "2 products instead of 5" in report.text()
    assert not report.rewritten


def test_the_attention_passes_find_the_same_sites() -> None:
    model, x = Block().eval(), tokens(40)
    reports = []
    for asked in ("never", "always"):
        backend = lamp_compile.backend(lower="eager", join_linears=asked, floor=2, query_bits=0)
        out, _ = run(copy.deepcopy(model), x, backend=backend)
        with torch.no_grad():
            close(out, model(x))
        reports += backend.reports
    assert reports[0].rewritten == reports[1].rewritten != ()
    assert reports[0].sites == reports[1].sites


def test_a_second_graph_copies_nothing() -> None:
    model = Block().eval()
    _, first = run(model, tokens(10))
    places = [p.data_ptr() for p in model.parameters()]
    _, second = run(model, tokens(11))
    assert second.products == first.products == 4
    assert [p.data_ptr() for p in model.parameters()] == places


def test_cuda_graphs_read_the_joined_tensors_where_they_lie() -> None:
    fixed: list[list[int]] = []

    def inner(graph: torch.fx.GraphModule, examples: list[Any]) -> Any:
        metadata = TracingContext.get().fw_metadata
        assert metadata is not None
        fixed.append([index for index in metadata.static_input_indices if index >= len(examples) - 3])
        return graph

    def lowered(module: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        program = capture(module, inputs)
        done = join_linears(program, inputs)
        compiled = aot_autograd(fw_compiler=inner)(program.module, [*inputs, *done.inputs])
        return lambda *args: compiled(*args, *done.weights.tensors(args))

    model, x = Block(bias=True).eval(), tokens(10)
    out, _ = run(model, x, backend=lowered)
    with torch.no_grad():
        close(out, model(x))
    inputs = len(list(model.parameters())) + 1 + 3
    assert fixed == [[inputs - 3, inputs - 2, inputs - 1]], "without a copy at every replay"


def test_attention_with_a_mask_reads_slices() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(64, 64) for _ in range(3))

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            q, k, v = (p(x).unflatten(-1, (4, 16)).transpose(1, 2) for p in (self.q, self.k, self.v))
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)

    model, x, mask = Masked().eval(), tokens(10), torch.ones(10, 10, dtype=torch.bool).tril()
    with torch.no_grad():
        wanted = model(x, mask)
    out, backend = run(model, x, mask)
    close(out, wanted)
    assert backend.products == 1


class Linears(nn.Module):
    """Layers of one input, and what is done with them."""

    def __init__(self, use: Callable[..., Any], sizes: tuple[int, ...] = (16, 8, 8), bias: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, n, bias=bias) for n in sizes)
        self.use = use

    def forward(self, x: Tensor) -> Any:
        return self.use(x, *self.layers)


def added(x: Tensor, *layers: nn.Module) -> Tensor:
    a, *rest = (layer(x) for layer in layers)
    return torch.cat([a * 2, *(y + 1 for y in rest)], -1)


def writing_between(x: Tensor, a: nn.Module, *rest: nn.Module) -> Tensor:
    x = x * 1
    first = a(x).sin()
    x.add_(1)
    return torch.cat([first, *(layer(x).sin() for layer in rest)], -1)


def flattening(x: Tensor, *layers: nn.Module) -> Tensor:
    return torch.cat([layer(x).view(-1).sin() for layer in layers])


def striding(x: Tensor, *layers: nn.Module) -> Tensor:
    return torch.cat([layer(x).as_strided((4,), (1,)).sin() for layer in layers])


def returning(x: Tensor, *layers: nn.Module) -> list[Tensor]:
    return [layer(x).transpose(0, 1) for layer in layers]


def in_half(x: Tensor, *layers: nn.Module) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return added(x, *layers)


APART = {
    writing_between: (2, ""),
    flattening: (3, "view cannot take slices"),
    striding: (3, "as_strided goes by their layout"),
    returning: (3, "their results leave the graph"),
    in_half: (3, ""),
}


@pytest.mark.parametrize("use", APART, ids=lambda use: use.__name__)
def test_what_somebody_could_tell_is_left_alone(use: Callable[..., Any]) -> None:
    model, x = Linears(use).eval(), torch.randn(2, 3, 16)
    places = [p.data_ptr() for p in model.layers[0].parameters()]
    with torch.no_grad():
        wanted = model(x.clone())
    out, backend = run(model, x)
    for got, expected in zip(*([out], [wanted]) if isinstance(out, Tensor) else (out, wanted), strict=True):
        close(got, expected)
        assert got.stride() == expected.stride()
    products, reason = APART[use]
    assert backend.products == products
    if products == 3:
        assert [p.data_ptr() for p in model.layers[0].parameters()] == places
    assert list(backend.done[0].apart) == ([reason] if reason else [])


def test_views_that_can_be_taken_are_taken_and_writing_into_a_result_stays_in_it() -> None:
    def use(x: Tensor, *layers: nn.Module) -> Tensor:
        a, b, c = (layer(x) for layer in layers)
        a = a.view(-1, 16).view(2, 3, 4, 4).transpose(1, 2)
        b.mul_(2)
        return a.sum() + b.unflatten(-1, (2, 4)).sin().sum() + c[..., ::2].sum()

    model, x = Linears(use).eval(), torch.randn(2, 3, 16)
    backend = joined_as_before(model, x)
    assert backend.products == 1


def test_layers_used_again_share_one_joined_weight() -> None:
    model, x = Linears(lambda x, *layers: added(added(x, *layers)[..., :16].sin(), *layers)).eval(), torch.randn(2, 16)
    backend = joined_as_before(model, x)
    assert backend.products == 2
    assert sum("joined" in node.name for node in backend.graphs[0].nodes if node.op == "placeholder") == 1


def test_a_parameter_lies_in_one_place_only() -> None:
    def use(x: Tensor, a: nn.Module, b: nn.Module, c: nn.Module) -> Tensor:
        y = added(x, a, b)[..., :16].sin()
        return added(y, c, a)

    model, x = Linears(use, sizes=(16, 8, 16)).eval(), torch.randn(2, 16)
    backend = joined_as_before(model, x)
    assert backend.products == 3
    assert dict(backend.done[0].apart) == {"their weights lie in another group": 1}


def test_a_tied_weight_is_read_where_it_lies() -> None:
    def use(x: Tensor, *layers: Any) -> Tensor:
        return F.embedding(torch.tensor([1, 2]), layers[0].weight) + added(x, *layers)[..., :16]

    model, x = Linears(use).eval(), torch.randn(2, 16)
    backend = joined_as_before(model, x)
    assert backend.products == 1


def test_weights_that_the_graph_writes_stay_apart() -> None:
    def use(x: Tensor, *layers: Any) -> Tensor:
        layers[1].weight.mul_(2)
        return added(x, *layers)

    model, x = Linears(use).eval(), torch.randn(2, 16)
    twin = copy.deepcopy(model)
    out, backend = run(model, x)
    with torch.no_grad():
        close(out, twin(x))
    assert backend.products == 2


def test_only_one_dtype_device_and_kind_goes_together() -> None:
    model, x = Linears(added, sizes=(16, 8, 8, 8)).eval(), torch.randn(2, 16)
    model.layers[0].bias = nn.Parameter(torch.randn(16))
    model.layers[1].weight = nn.Parameter(torch.randn(32, 16)[:8])
    backend = joined_as_before(model, x)
    assert backend.products == 3
    assert dict(backend.done[0].apart) == {"their weights are parts of larger tensors": 1}


def test_no_memory_leaves_a_group_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> None:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr("lamp_compile.runtime.joined_weights.bring_together", full)
    model, x = Block().eval(), tokens(10)
    out, backend = run(model, x, backend=Joining())
    with torch.no_grad():
        close(out, model(x))
    assert backend.products == 7
    assert dict(backend.done[0].apart) == {"no memory to move their weights": 5}
