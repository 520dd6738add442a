"""Linear layers of one input become one product over joined weights, and only where nobody can tell."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

import lamp_compile
from lamp_compile import driver
from lamp_compile.errors import OptionError
from lamp_compile.options import Options
from lamp_compile.passes.capture import capture
from lamp_compile.passes.join_linears import LINEAR, Joined, join_linears
from tests.backends.modules import stack, tokens
from tests.passes.test_patterns import close
from tests.tolerances import ARITHMETIC

pytestmark = pytest.mark.usefixtures("one_thread")


class Joining:
    """A backend that joins, runs the graph node by node, and remembers."""

    def __init__(self) -> None:
        self.graphs: list[torch.fx.Graph] = []
        self.done: list[Joined] = []
        self.counted: list[tuple[str, ...]] = []

    def __call__(self, module: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        self.counted.append(join_linears(capture(module, inputs), inputs, count=True).notes)
        program = capture(module, inputs)
        done = join_linears(program, inputs)
        self.graphs.append(program.graph)
        self.done.append(done)
        return lambda *args: program.module(*args, *done.weights.tensors(args))

    @property
    def products(self) -> int:
        return sum(node.target in LINEAR for node in self.graphs[-1].nodes)


class Block(nn.Module):
    """Grouped-query attention without a cache, and a gated MLP."""

    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(64, n, bias=bias) for n in (64, 32, 32))
        self.o, self.down = nn.Linear(64, 64, bias=False), nn.Linear(96, 64, bias=False)
        self.gate, self.up = nn.Linear(64, 96, bias=False), nn.Linear(64, 96, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (-1, 16)).transpose(1, 2) for p in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.o(y.transpose(1, 2).flatten(2))
        return x + self.down(F.silu(self.gate(x)) * self.up(x))


def run(model: nn.Module | Callable[..., Any], *args: Any, backend: Any = None, **kwargs: Any) -> tuple[Any, Any]:
    """(what it gives when its linear layers are joined, the backend); counting ahead must have said the same."""
    torch._dynamo.reset()
    made = backend or Joining()
    with torch.no_grad():
        out = torch.compile(model, backend=made, fullgraph=True, **kwargs)(*args)
    if backend is None:
        assert made.counted == [done.notes for done in made.done]
    return out, made


def storages(*parameters: nn.Parameter) -> set[int]:
    return {parameter.untyped_storage().data_ptr() for parameter in parameters}


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
    assert len(storages(model.q.weight, model.k.weight, model.v.weight)) == 1
    assert model.q.weight.untyped_storage().nbytes() == 128 * 64 * 4, "and nothing else in it"
    if bias:
        assert len(storages(model.q.bias, model.k.bias, model.v.bias)) == 1
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
    flattening: (3, "view needs them contiguous"),
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
    with torch.no_grad():
        wanted = model(x)
    out, backend = run(model, x)
    close(out, wanted)
    assert backend.products == 1


def test_layers_used_again_share_one_joined_weight() -> None:
    model, x = Linears(lambda x, *layers: added(added(x, *layers)[..., :16].sin(), *layers)).eval(), torch.randn(2, 16)
    with torch.no_grad():
        wanted = model(x)
    out, backend = run(model, x)
    close(out, wanted)
    assert backend.products == 2
    assert sum("joined" in node.name for node in backend.graphs[0].nodes if node.op == "placeholder") == 1


def test_a_parameter_lies_in_one_place_only() -> None:
    def use(x: Tensor, a: nn.Module, b: nn.Module, c: nn.Module) -> Tensor:
        y = added(x, a, b)[..., :16].sin()
        return added(y, c, a)

    model, x = Linears(use, sizes=(16, 8, 16)).eval(), torch.randn(2, 16)
    with torch.no_grad():
        wanted = model(x)
    out, backend = run(model, x)
    close(out, wanted)
    assert backend.products == 3
    assert dict(backend.done[0].apart) == {"their weights lie in another group": 1}


def test_a_tied_weight_is_read_where_it_lies() -> None:
    def use(x: Tensor, *layers: Any) -> Tensor:
        return F.embedding(torch.tensor([1, 2]), layers[0].weight) + added(x, *layers)[..., :16]

    model, x = Linears(use).eval(), torch.randn(2, 16)
    with torch.no_grad():
        wanted = model(x)
    out, backend = run(model, x)
    close(out, wanted)
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
    with torch.no_grad():
        wanted = model(x)
    out, backend = run(model, x)
    close(out, wanted)
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


def given_new_data(model: Any) -> None:
    model.k.weight.data = torch.randn(32, 64)


def replaced(model: Any) -> None:
    model.k.weight = nn.Parameter(torch.randn(32, 64))


def written(model: Any) -> None:
    with torch.no_grad():
        model.k.weight.copy_(torch.randn(32, 64))


def loaded(model: Any) -> None:
    model.load_state_dict({name: torch.randn_like(p) for name, p in model.state_dict().items()})


def loaded_by_assignment(model: Any) -> None:
    model.load_state_dict({name: torch.randn_like(p) for name, p in model.state_dict().items()}, assign=True)


@pytest.mark.parametrize("change", [given_new_data, replaced, written, loaded, loaded_by_assignment])
def test_never_stale_and_nothing_recompiles(change: Callable[[Any], None]) -> None:
    model, x = Block().eval(), tokens(10)
    backend = Joining()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    torch._dynamo.reset()
    with torch.no_grad():
        before = compiled(x)
        change(model)
        close(compiled(x), model(x))
        assert (compiled(x) - before).norm() > 0.1 * before.norm()
    assert len(backend.graphs) == 1
    assert len(storages(model.q.weight, model.k.weight, model.v.weight)) == 1


def test_a_copy_runs_its_own_weights_through_the_same_graph() -> None:
    model, x, backend = Block().eval(), tokens(10), Joining()
    torch._dynamo.reset()
    compiled: Any = torch.compile(Block.forward, backend=backend, fullgraph=True)
    with torch.no_grad():
        wanted = compiled(model, x)
        twin = copy.deepcopy(model)
        for parameter in twin.parameters():
            parameter.mul_(1.5)
        close(compiled(twin, x), twin(x))
        assert torch.equal(compiled(model, x), wanted)
    assert len(backend.graphs) == 1


def test_another_dtype_joins_anew() -> None:
    model, x = Block().eval(), tokens(10)
    compiled: Any = torch.compile(model, backend=(backend := Joining()), fullgraph=True)
    torch._dynamo.reset()
    with torch.no_grad():
        compiled(x)
        model.to(torch.bfloat16)
        close(compiled(x.bfloat16()), model(x.bfloat16()), ARITHMETIC[torch.bfloat16].relative)
    assert [done.products for done in backend.done] == [2, 2]
    assert model.q.weight.untyped_storage().nbytes() == 128 * 64 * 2


def test_a_deleted_model_leaves_no_weights_behind() -> None:
    model = Block().eval()
    _, backend = run(model, tokens(10))
    memory = StorageWeakRef(model.q.weight.untyped_storage())
    assert not memory.expired()
    for parameter in model.parameters():
        parameter.data = torch.empty(0)
    gc.collect()
    assert memory.expired()
    assert backend.done


def test_when_it_is_asked_for() -> None:
    model, x = Block().eval(), tokens(10)
    places = [p.data_ptr() for p in model.parameters()]
    for options in ({}, {"join_linears": "never"}, {"join_linears": "auto"}):
        backend = lamp_compile.backend(lower="eager", fuel=0, **options)
        run(model, x, backend=backend)
        assert not [note for note in backend.reports[0].notes if "linear layers" in note]
    report = lamp_compile.explain(model, (x,), join_linears="always")
    assert "2 products instead of 5" in report.text()
    assert [p.data_ptr() for p in model.parameters()] == places, "nothing has moved yet"
    fast = lamp_compile.compile(model, mode="eager", join_linears="always")
    with torch.no_grad():
        fast(x)
    assert "2 products instead of 5" in fast.lamp.report().text()
    assert [p.data_ptr() for p in model.parameters()] != places


@pytest.mark.parametrize("wrong", ["yes", True, None])
def test_impossible_values_are_refused_at_once(wrong: Any) -> None:
    with pytest.raises(OptionError, match="auto, never, always"):
        lamp_compile.backend(join_linears=wrong)
    with pytest.raises(OptionError, match="auto, never, always"):
        lamp_compile.compile(stack(), join_linears=wrong)
    with pytest.raises(OptionError, match="auto, never, always"):
        lamp_compile.explain(stack(), (tokens(4),), join_linears=wrong)


ASKED = {
    "auto compiles": ({}, [("cuda", False)]),
    "auto, node by node": ({"lower": "eager"}, []),
    "auto in explain": ({"lower": "eager", "dry": True}, [("cuda", True)]),
    "never": ({"join_linears": "never"}, []),
    "always": ({"join_linears": "always"}, [(None, False)]),
    "always, node by node": ({"lower": "eager", "join_linears": "always"}, [(None, False)]),
}


@pytest.mark.parametrize("name", ASKED)
def test_what_is_joined_by_option(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str | None, bool]] = []

    def join(program: Any, inputs: list[Any], device: str | None, count: bool) -> Joined:
        asked.append((device, count))
        return Joined(inputs)

    monkeypatch.setattr(driver, "join_linears", join)
    options, wanted = ASKED[name]
    for kind in ("dynamo", "graph_module"):
        driver.join(SimpleNamespace(kind=kind), [], Options(**options))
    assert asked == wanted
