"""Planes by lanes in caches: which layers keep them so, and that whatever a cache does it does the same with them."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from lamp_compile.plan import SitePlan
from lamp_compile.runtime import kernels, layout
from lamp_compile.runtime.cache_layers import LayerSpec, NestedLayer
from lamp_compile.runtime.controls import SiteControls
from lamp_compile.runtime.kernels import cpu
from lamp_compile.runtime.kv_cache import CacheSpec, NestedCache
from lamp_compile.runtime.plane_handle import PlaneHandle
from lamp_compile.runtime.slot_cache import LayerShape, SlotCache
from tests.tolerances import ARITHMETIC

DATA = (0, 1, 3, 4)
"""Planes that lie one way or the other; the other two are scales."""
G, H, D = 2, 4, 64


def lying(lanes: bool) -> AbstractContextManager[Any]:
    """Within it, caches keep planes by lanes, or by rows, whatever this CPU is."""
    return mock.patch.object(kernels.cpu, "by_lanes", return_value=lanes)


def spec(layers: int = 1, **fields: Any) -> CacheSpec:
    plan = SitePlan("site", **{"tile": 32, "tau": 0.05, **fields})
    return CacheSpec((LayerSpec(plan, SiteControls.of(plan, G)),) * layers, "", "a model")


def rows(count: int, seed: int, batch: int = 2, dim: int = D) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    k, v = (torch.randn(batch, G, count, dim, generator=generator) for _ in range(2))
    return k, v


def attend(cache: Any, batch: int) -> Tensor:
    q = torch.randn(batch, H, 1, D, generator=torch.Generator().manual_seed(7))
    out: Tensor = cache.layers[0].attend(q, None, None, None, causal="bottom_right", window=0, scale=0.125, softcap=0.0)
    return out


class Followed:
    """A cache, and after each operation what it holds and what attention over it gives."""

    def __init__(self, lanes: bool) -> None:
        with lying(lanes):
            self.cache = NestedCache(spec(), 128)
            self.found: list[Tensor] = []
            self._run()
        assert layout.by_lanes(self.cache.layers[0].v_residual) == lanes

    def _look(self, batch: int = 2) -> None:
        layer: NestedLayer = self.cache.layers[0]
        held = int(layer.cumulative_length)
        self.found += [PlaneHandle(layer, values, torch.float32)[:, :, :held] for values in (False, True)]
        self.found += [layer.k_scale[:, :, :held].clone(), attend(self.cache, batch), layer.stats.clone()]

    def _run(self) -> None:
        cache = self.cache
        cache.update(*rows(70, 0), 0)
        self._look()
        cache.crop(-9)
        cache.update(*rows(1, 1), 0)
        self._look()
        cache.reorder_cache(torch.tensor([1, 1]))
        cache.update(*rows(5, 2), 0)
        self._look()
        cache.update(*rows(150, 3), 0)
        assert cache.capacity == 256
        self._look()
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([3, 0, 1]))
        cache.update(*rows(2, 4, batch=3), 0)
        self._look(3)
        cache.reset()
        cache.update(*rows(33, 5, batch=3), 0)
        self._look(3)


@pytest.mark.parametrize("by_kernel", [False, True], ids=["reference", "kernels"])
def test_a_cache_does_the_same_with_them(by_kernel: bool, request: pytest.FixtureRequest) -> None:
    if not by_kernel:
        request.getfixturevalue("reference_only")
    elif cpu.why_not() is not None:
        pytest.skip(str(cpu.why_not()))
    by_rows, lanes = (Followed(x).found for x in (False, True))
    assert len(by_rows) == 30
    for one, other in zip(by_rows, lanes, strict=True):
        assert one.abs().sum() > 0
        if by_kernel and one.is_floating_point():
            assert (one - other).norm() <= ARITHMETIC[torch.float32].relative * one.norm()
        else:
            assert torch.equal(one, other)


@pytest.mark.usefixtures("reference_only")
def test_pages_of_slots_do_the_same_with_them() -> None:
    found = []
    for lanes in (False, True):
        with lying(lanes):
            shape = LayerShape(G, D, D, torch.float32, torch.device("cpu"))
            cache = SlotCache(spec(), [shape], streams=2, tokens=256, max_length=128)
        assert layout.by_lanes(cache.layers[0].k_high) == lanes
        for slot, count in enumerate((40, 70)):
            assert cache.admit(count) == slot
            cache.view(slot).update(*rows(count, slot, batch=1), 0)
        cache.free(0)
        cache.admit(90)
        cache.view(0).update(*rows(90, 3, batch=1), 0)
        cache.update(*rows(1, 4), 0)
        found.append((attend(cache, 2), *map(layout.as_rows, cache.layers[0].planes)))
    assert all(map(torch.equal, *found))


REASONS: dict[str, tuple[bool, dict[str, Any], int, torch.dtype]] = {
    "a CPU that does not want them": (False, {}, D, torch.float32),
    "tiles of 128 keys": (True, {"tile": 128}, D, torch.float32),
    "keys of another format": (True, {"k_format": "int8"}, D, torch.float32),
    "values of another format": (True, {"v_format": "bf16"}, D, torch.float32),
    "narrow values": (True, {}, 16, torch.float32),
    # What no kernel reads.
    "wide heads": (True, {"rotation": "none"}, 288, torch.float32),
    "float64": (True, {}, D, torch.float64),
    "another rule": (True, {"rule": "mass"}, D, torch.float32),
    "queries of 16 bits": (True, {"query_bits": 16}, D, torch.float32),
}


@pytest.mark.parametrize("name", REASONS)
def test_where_planes_stay_by_rows(name: str) -> None:
    lanes, fields, dim, dtype = REASONS[name]
    cache = NestedCache(spec(**fields))
    with lying(lanes):
        cache.update(*(x.to(dtype) for x in rows(3, 0, dim=dim)), 0)
    planes = cache.layers[0].planes
    assert [planes[index].dim() for index in DATA] == [5] * 4
