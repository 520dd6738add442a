"""Joined weights stay the model's own: they change, are copied, move and go; and what is joined when."""

from __future__ import annotations

import copy
import gc
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

import lamp_compile
from lamp_compile import driver
from lamp_compile.errors import OptionError
from lamp_compile.options import Options
from lamp_compile.passes.join_linears import Joined
from tests.backends.modules import stack, tokens
from tests.passes.joining import Block, Joining, joined, run
from tests.passes.test_patterns import close
from tests.tolerances import ARITHMETIC

pytestmark = pytest.mark.usefixtures("one_thread")


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
    assert joined(model.q, model.k, model.v)


def test_in_inference_mode() -> None:
    model, x, backend = Block().eval(), tokens(10), Joining()
    torch._dynamo.reset()
    compiled: Any = torch.compile(model, backend=backend, fullgraph=True)
    with torch.inference_mode():
        close(compiled(x), model(x))
        given_new_data(model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            close(compiled(x), model(x))
    assert backend.done[0].products == 2
    assert not model.q.weight.is_inference()
    assert model(x).requires_grad


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
    assert joined(model.q, model.k, model.v)


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
        return Joined()

    monkeypatch.setattr(driver, "join_linears", join)
    options, wanted = ASKED[name]
    for kind in ("dynamo", "graph_module"):
        driver.join(SimpleNamespace(kind=kind), [], Options(**options))
    assert asked == wanted
