"""Growth that runs out of memory leaves the cache as it was."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

from lamp_compile.errors import CacheError
from lamp_compile.plan import SitePlan
from lamp_compile.runtime.allocation import allocate
from lamp_compile.runtime.cache_layers import FloatLayer, LayerSpec, NestedLayer
from lamp_compile.runtime.controls import SiteControls
from lamp_compile.runtime.kv_cache import CacheSpec, NestedCache

FAILURES = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory"),
    MemoryError(),
]


def cache_of(layers: int = 3, tokens: int = 100) -> NestedCache:
    """Layers 0 to ``layers - 2`` keep planes, the last floats."""
    plan = SitePlan("site")
    made = LayerSpec(plan, SiteControls.of(plan, 2))
    cache = NestedCache(CacheSpec((*[made] * (layers - 1), None), "", "a model"))
    for index in range(layers):
        cache.update(torch.randn(2, 2, tokens, 16), torch.randn(2, 2, tokens, 16), index)
    return cache


def tensors(cache: NestedCache) -> list[Tensor]:
    """Everything per sequence."""
    return [getattr(layer, name) for layer in cache.layers for name in layer.per_sequence]


class _Allocator:
    """Real allocations, until the one that fails; remembers what it gave out."""

    def __init__(self, patch: pytest.MonkeyPatch, fails_at: int, error: Exception) -> None:
        self.given: list[weakref.ref[Tensor]] = []
        self.count = 0
        for kind in (NestedLayer, FloatLayer):
            patch.setattr(kind, "_allocate", self._planted(kind._allocate, fails_at, error))

    def _planted(self, real: Any, fails_at: int, error: Exception) -> Any:
        def planted(layer: Any, *sizes: int) -> dict[str, Tensor]:
            made: dict[str, Tensor] = real(layer, *sizes)
            self.given += [weakref.ref(tensor) for tensor in made.values()]
            self.count += 1
            if self.count > fails_at:
                raise type(error)(*error.args)  # a new one: an error that is kept keeps its frames
            return made

        return planted


@pytest.mark.parametrize("error", FAILURES, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("fails_at", [0, 1, 2])
def test_no_layer_grows_unless_all_do(monkeypatch: pytest.MonkeyPatch, fails_at: int, error: Exception) -> None:
    cache = cache_of()
    before, where = [t.clone() for t in tensors(cache)], [t.data_ptr() for t in tensors(cache)]
    with monkeypatch.context() as patch:
        allocator = _Allocator(patch, fails_at, error)
        with pytest.raises(CacheError, match=r"(?s)growing from 128 to 256 tokens: out of memory.*where: .*try: ") as e:
            cache.ensure_capacity(200)
        assert allocator.count == fails_at + 1
        gc.collect()
        assert not any(reference() is not None for reference in allocator.given), "the error keeps no tensor alive"
        assert e.value.__context__ is None
    assert [t.data_ptr() for t in tensors(cache)] == where
    assert all(torch.equal(a, b) for a, b in zip(tensors(cache), before, strict=True))
    assert cache.capacity == 128
    assert {layer.max_cache_len for layer in cache.layers} == {128}
    assert int(cache.get_seq_length()) == 100
    cache.ensure_capacity(200)
    assert {layer.max_cache_len for layer in cache.layers} == {256}
    assert torch.equal(cache.layers[0].k_high[:, :, : before[0].shape[2]], before[0])


def test_a_forward_that_needs_growth_can_be_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = cache_of()
    k, v = torch.randn(2, 2, 40, 16), torch.randn(2, 2, 40, 16)
    before = [t.clone() for t in tensors(cache)]
    with monkeypatch.context() as patch:
        _Allocator(patch, 1, FAILURES[0])
        for call in (lambda: cache.update(k, v, 0), lambda: cache.ensure_capacity(140)):
            with pytest.raises(CacheError, match="out of memory"):
                call()
    assert all(torch.equal(a, b) for a, b in zip(tensors(cache), before, strict=True))
    for index in range(3):
        cache.update(k, v, index)
    assert {(layer.max_cache_len, int(layer.cumulative_length)) for layer in cache.layers} == {(256, 140)}


def test_a_layer_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = cache_of().layers[0]
    where = layer.k_high.data_ptr()
    with monkeypatch.context() as patch:
        _Allocator(patch, 0, FAILURES[0])
        with pytest.raises(CacheError, match="growing from 128 to 256"):
            layer.update(torch.randn(2, 2, 40, 16), torch.randn(2, 2, 40, 16))
    assert (layer.k_high.data_ptr(), layer.max_cache_len, int(layer.cumulative_length)) == (where, 128, 100)


def test_other_errors_pass_through() -> None:
    def broken() -> None:
        raise RuntimeError("expected scalar type Half")

    with pytest.raises(RuntimeError, match="scalar type Half") as caught:
        allocate(broken, "growing", where="a cache", fix="less")
    assert not isinstance(caught.value, CacheError)
