"""What the host does beside the launches themselves: a prompt passes it once a layer, an admission once a request."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from lamp_compile.errors import LampError
from lamp_compile.runtime import guard, kernels, layout
from lamp_compile.runtime.kv_cache import NestedCache
from lamp_compile.runtime.ledger import Ledger
from lamp_compile.runtime.slot_cache import SlotCache
from tests.runtime.test_slot_cache import SHAPE, attend, fill, rows, slots, spec

VIEWS = {"aten::reshape", "aten::view", "aten::slice", "aten::select", "aten::detach"}
"""No launches."""

needs_kernels = pytest.mark.skipif(kernels.why_not_device("cpu") is not None, reason="needs the CPU's kernels")


def operators(run: Callable[[], Any]) -> Counter[str]:
    """Operators that ``run`` dispatches, those inside others left out."""
    with profile(activities=[ProfilerActivity.CPU]) as watch:
        run()
    return Counter(event.name for event in watch.events() if event.cpu_parent is None and "::" in event.name)


@needs_kernels
def test_a_layer_of_a_cache_stores_rows_with_two_launches() -> None:
    cache = NestedCache(spec(), 256)
    cache.update(*rows(40, 0), 0)
    k, v = rows(40, 1)
    found = operators(lambda: cache.update(k, v, 0))
    assert set(found) - VIEWS == {"aten::add_", "lamp::append"}, "the length, and the rows"
    assert found["aten::add_"] == found["lamp::append"] == 1


@needs_kernels
def test_a_layer_of_slots_stores_rows_with_one_launch() -> None:
    cache = slots(layers=3)
    view = cache.view(cache.admit(100), upto=100)
    view.update(*rows(40, 0), 0)
    k, v = rows(40, 1)
    found = set(operators(lambda: view.update(k, v, 1)))
    assert not found - VIEWS - {"lamp::append"}, "between the first layer and the last"


def test_a_new_layer_is_zeroed_by_a_launch_for_each_dtype() -> None:
    cache = NestedCache(spec(), 256)
    k, v = rows(40, 0)
    found = operators(lambda: cache.update(k, v, 0))
    layer = cache.layers[0]
    tensors = [getattr(layer, name) for name in layer.per_sequence]
    assert found["aten::_foreach_zero_"] == len({tensor.dtype for tensor in tensors}) == 4
    assert not {"aten::zeros", "aten::to", "aten::_to_copy"} & set(found)


def test_layers_of_one_shape_are_laid_out_together() -> None:
    """And a layer of another shape when it is given rows."""
    made = spec(4)
    shapes = (SHAPE, SHAPE, replace(SHAPE, head_dim=32), SHAPE)
    layers = [replace(layer, shape=shape) for layer, shape in zip(made.layers, shapes, strict=True) if layer]
    cache = NestedCache(replace(made, layers=tuple(layers)), 256)
    k, v = rows(40, 0)
    found = operators(lambda: cache.update(k, v, 0))
    assert found["aten::_foreach_zero_"] == 4, "a launch for each dtype"
    assert [layer.is_initialized for layer in cache.layers] == [True, True, False, True]
    assert not any(tensor.any() for tensor in cache.layers[1].of_sequences())
    alone = NestedCache(spec(), 256)
    alone.update(k, v, 0)
    assert all(map(torch.equal, cache.layers[0].planes, alone.layers[0].planes))
    assert not operators(lambda: cache.update(k, v, 1))["aten::empty"]
    cache.update(k[..., :32], v, 2)
    assert layout.key_width(cache.layers[2].k_high) == 16


def test_layers_that_are_laid_out_when_memory_runs_short_hold_zeros(monkeypatch: pytest.MonkeyPatch) -> None:
    made = spec(3)
    cache = NestedCache(replace(made, layers=tuple(replace(x, shape=SHAPE) for x in made.layers if x)), 256)
    real, calls = torch.empty, iter(range(99))

    def short(*args: Any, **kwargs: Any) -> Tensor:
        if next(calls) == 19:
            raise torch.OutOfMemoryError("planted")
        return real(*args, **kwargs).fill_(7)

    monkeypatch.setattr(torch, "empty", short)
    k, v = rows(40, 0)
    with pytest.raises(torch.OutOfMemoryError, match="planted"):
        cache.update(k, v, 0)
    monkeypatch.undo()
    assert [layer.is_initialized for layer in cache.layers] == [True, True, False]
    assert not any(tensor.any() for layer in cache.layers for tensor in layer.of_sequences())
    cache.update(k, v, 2)


def test_admission_costs_the_same_for_the_first_request_and_the_hundredth() -> None:
    """What a slot counted before is added up: nothing piles up, and launches are few for all layers together."""
    cache = slots(layers=3)
    assert fill(cache, 20, 0) == 0
    attend(cache.view(0), torch.randn(1, 4, 1, 64))
    cache.free(0)

    def admit() -> None:
        cache.free(cache.admit(20))

    admit()
    first = operators(admit)
    for _ in range(100):
        admit()
    again = operators(admit)
    assert again == first
    assert sum(count for name, count in first.items() if name not in VIEWS) <= 24
    held = cache.spec.ledger
    assert len(held._retired) == 1
    assert not held._pending
    assert [held.totals()[layer.name][guard.STEPS] for layer in cache.layers] == [2, 0, 0], "one step, two kv heads"
    assert [held.totals()[layer.name][guard.STEPS] for layer in cache.layers] == [2, 0, 0], "read twice"


def test_what_caches_counted_is_read_together_when_they_are_gone() -> None:
    made = spec(2)
    for seed in range(3):
        cache = NestedCache(made, 64)
        for layer in range(2):
            cache.update(*rows(8, seed, batch=seed + 1), layer)
            attend_layer(cache, layer, torch.randn(seed + 1, 4, 1, 64))
        del cache
    found = operators(lambda: made.ledger.totals())
    assert found["aten::stack"] == 3, "one for each batch size"
    assert [made.ledger.totals()[f"layer {index}"][guard.STEPS] for index in range(2)] == [12, 12]


def test_a_reset_takes_as_many_launches_for_many_layers_as_for_one() -> None:
    found = []
    for layers in (1, 3):
        cache = NestedCache(spec(layers), 64)
        for index in range(layers):
            cache.update(*rows(8, index), index)
            attend_layer(cache, index, torch.randn(1, 4, 1, 64))
        cache.reset()  # adds nothing up yet
        found.append({name: count for name, count in operators(cache.reset).items() if name not in VIEWS})
        ledger = cache.spec.ledger
        assert [ledger.totals()[layer.name][guard.STEPS] for layer in cache.layers] == [2] * layers
        assert not any(tensor.any() for layer in cache.layers for tensor in layer.of_sequences())
    assert found[0] == found[1]
    assert found[0]["aten::_foreach_zero_"] == 4


def attend_layer(cache: NestedCache, index: int, q: Tensor) -> Tensor:
    how: dict[str, Any] = {"causal": "bottom_right", "window": 0, "scale": 0.125, "softcap": 0.0}
    layer: Any = cache.layers[index]
    out: Tensor = layer.attend(q, None, None, None, **how)
    return out


@needs_kernels
@pytest.mark.parametrize("kind", ["cache", "slots"])
@pytest.mark.parametrize("case", ["as laid out", "strided", "a subclass", "another dtype"])
def test_rows_that_go_to_the_kernel_at_once_are_those_of_the_operator(kind: str, case: str) -> None:
    def stored(direct: bool, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
        cache: Any = NestedCache(spec(), 256) if kind == "cache" else slots()
        target = cache if kind == "cache" else cache.view(cache.admit(100))
        target.update(*rows(3, 0), 0)
        layer = target.layers[0]
        if not direct:
            monkeypatch.setattr(type(layer), "_expects", lambda *args: False)
        k, v = rows(40, 1)
        if case == "strided":
            k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v))
        elif case == "a subclass":
            k, v = (torch.nn.Parameter(x, requires_grad=False) for x in (k, v))
        elif case == "another dtype":
            k, v = k.bfloat16(), v.bfloat16()
        assert layer._expects(k, v) == (direct and case in ("as laid out", "strided"))
        target.update(k, v, 0)
        return [plane.clone() for plane in layer.planes]

    with pytest.MonkeyPatch.context() as patch:
        one, two = stored(True, patch), stored(False, patch)
    assert all(map(torch.equal, one, two))


@pytest.mark.parametrize("change", ["heads", "channels", "values", "no rows", "values' rows"])
@pytest.mark.parametrize("kind", ["cache", "slots"])
def test_rows_of_another_size_are_refused(kind: str, change: str) -> None:
    cache: Any = NestedCache(spec(), 256) if kind == "cache" else slots()
    target = cache if kind == "cache" else cache.view(cache.admit(100))
    target.update(*rows(3, 0), 0)
    k, v = rows(40, 1)
    changed = {
        "heads": (k[:, :1], v[:, :1]), "channels": (k[..., :32], v), "values": (k, v[..., :32]),
        "no rows": (k[:, :, :0], v[:, :, :0]), "values' rows": (k, v[:, :, :20]),
    }  # fmt: skip
    before = [plane.clone() for plane in target.layers[0].planes]
    with pytest.raises(LampError, match=r"(?s)where: .*try: "):
        target.update(*changed[change], 0)
    assert all(map(torch.equal, before, target.layers[0].planes)), "nothing was written"


def test_views_share_all_but_the_slot() -> None:
    cache: SlotCache = slots(layers=2)
    view = cache.view(cache.admit(40))
    for own, shared in zip(view.layers, cache.layers, strict=True):
        assert type(own) is type(shared)
        assert vars(own).keys() == vars(shared).keys()
        differing = {name for name in vars(own) if getattr(own, name) is not getattr(shared, name)}
        assert differing == {"rows", "batch_size", "state", "stats"}


@needs_kernels
@pytest.mark.parametrize("kind", ["cache", "slots"])
def test_a_balance_of_another_size_is_refused_before_any_row(kind: str) -> None:
    """The kernel would read behind it, and is not asked to look."""
    made = spec()
    layer = made.layers[0]
    assert layer is not None
    made = replace(made, layers=(replace(layer, balance=torch.ones(2, 32)),))

    def lay_out() -> None:
        if kind == "cache":
            NestedCache(made, 64).update(*rows(3, 0), 0)
        else:
            SlotCache(made, [SHAPE], streams=2, tokens=256, max_length=128)

    with pytest.raises(LampError, match=r"balance \(2, 32\) for 2 kv heads of 64 channels"):
        lay_out()


def test_caches_that_are_reset_in_several_threads_are_all_counted() -> None:
    """One that is counted while another is being counted waits for it."""
    made, times = Ledger(), 20

    class Slow(dict[Any, Any]):
        """What is read from it is put back late."""

        def get(self, key: Any, default: Any = None) -> Any:
            found = super().get(key, default)
            time.sleep(1e-3)
            return found

        def pop(self, key: Any, default: Any = None) -> Any:
            found = super().pop(key, default)
            time.sleep(1e-3)
            return found

    made._retired = Slow()

    def work() -> None:
        for _ in range(times):
            made.retire([("site", torch.ones(1, 2, guard.STATS_FIELDS, dtype=torch.int64))])

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made.totals()["site"] == [3 * times * 2] * guard.STATS_FIELDS
