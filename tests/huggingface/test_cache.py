"""The cache itself: bytes, addresses, and the state of each sequence through every operation."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import lamp_compile
from lamp_compile.errors import CacheError
from lamp_compile.plan import SitePlan
from lamp_compile.runtime import layout
from lamp_compile.runtime.cache_layers import LayerSpec
from lamp_compile.runtime.controls import SiteControls
from lamp_compile.runtime.growable_layer import rounded_capacity
from lamp_compile.runtime.kv_cache import CacheSpec, NestedCache
from tests.huggingface import reference

STATE = ("k_high", "k_residual", "k_scale", "v_high", "v_residual", "v_scale", "state", "stats")


def spec(kv_heads: int = 2, **fields: Any) -> CacheSpec:
    """Of a model of one layer."""
    plan = SitePlan("site", **fields)
    return CacheSpec((LayerSpec(plan, SiteControls.of(plan, kv_heads)),), "fingerprint", "one layer")


def filled(tokens: int = 50, batch: int = 3, dim: int = 64, **fields: Any) -> NestedCache:
    """A cache of one layer with random rows, whose every state tensor differs between sequences."""
    cache = NestedCache(spec(**fields))
    k, v = (torch.randn(batch, 2, tokens, dim) for _ in range(2))
    cache.update(k, v, 0)
    layer = cache.layers[0]
    layer.state.copy_(torch.arange(layer.state.numel()).reshape(layer.state.shape))
    layer.stats.copy_(torch.arange(layer.stats.numel()).reshape(layer.stats.shape))
    return cache


def contents(cache: NestedCache) -> dict[str, Tensor]:
    """A copy of everything per sequence."""
    return {name: getattr(cache.layers[0], name).clone() for name in STATE}


def addresses(cache: NestedCache) -> list[int]:
    """Of everything a captured graph holds on to."""
    layer = cache.layers[0]
    return [getattr(layer, name).data_ptr() for name in STATE] + [layer.cumulative_length.data_ptr()]


def same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> bool:
    return all(torch.equal(found[name], wanted[name]) for name in STATE)


def test_reorder_moves_every_state_in_place() -> None:
    cache, order = filled(), torch.tensor([2, 0, 0])
    before, where = contents(cache), addresses(cache)
    cache.reorder_cache(order)
    assert same(contents(cache), {name: t[order] for name, t in before.items()})
    assert addresses(cache) == where


@pytest.mark.parametrize("order", [[1], [0, 1, 2, 0], [0, 1, 3], [0, -1, 2], [0.0, 1.0, 2.0]], ids=str)
def test_an_order_that_is_none_is_refused_and_moves_nothing(order: list[Any]) -> None:
    cache = filled()
    before = contents(cache)
    with pytest.raises(CacheError, match=r"(?s)of a cache that holds 3.*where: reorder_cache.*batch_select_indices"):
        cache.reorder_cache(torch.tensor(order))
    assert same(contents(cache), before)


def test_select_and_repeat_move_every_state() -> None:
    cache, kept = filled(), torch.tensor([2, 1])
    before = contents(cache)
    cache.batch_select_indices(kept)
    assert same(contents(cache), {name: t[kept] for name, t in before.items()})
    cache.batch_repeat_interleave(2)
    assert same(contents(cache), {name: t[torch.tensor([2, 2, 1, 1])] for name, t in before.items()})
    assert cache.batch_size == 4
    cache.update(torch.randn(4, 2, 1, 64), torch.randn(4, 2, 1, 64), 0)
    assert int(cache.get_seq_length()) == 51


def test_growth_keeps_every_state() -> None:
    cache = filled()
    before = contents(cache)
    cache.ensure_capacity(129)
    after, layer = contents(cache), cache.layers[0]
    assert (cache.capacity, layer.k_high.shape[2], layer.v_scale.shape[2]) == (256, 8, 256)
    assert all(torch.equal(after[name][:, :, : t.shape[2]], t) for name, t in before.items())
    assert not any(after[name][:, :, before[name].shape[2] :].any() for name in STATE)
    assert int(cache.get_seq_length()) == 50


def test_reset_forgets_in_place() -> None:
    cache = filled()
    where = addresses(cache)
    cache.reset()
    assert not any(t.any() for t in contents(cache).values())
    assert (int(cache.get_seq_length()), addresses(cache)) == (0, where)
    cache.update(torch.randn(5, 2, 3, 64), torch.randn(5, 2, 3, 64), 0)
    assert cache.batch_size == 5, "an empty cache takes any batch"


@pytest.mark.parametrize(("tokens", "left"), [(-7, 43), (0, 50), (20, 20), (90, 50), (-80, 0), (torch.tensor(-7), 43)])
def test_crop_counts_back_or_keeps(tokens: Any, left: int) -> None:
    cache = filled()
    where, before = addresses(cache), contents(cache)
    cache.crop(tokens)
    assert (int(cache.get_seq_length()), addresses(cache)) == (left, where)
    assert same(contents(cache), before)


def test_rows_after_a_crop_overwrite_what_was_cropped() -> None:
    torch.manual_seed(1)
    k, v = torch.randn(1, 2, 60, 64), torch.randn(1, 2, 60, 64)
    cache, straight = NestedCache(spec()), NestedCache(spec())
    cache.update(k[:, :, :40], v[:, :, :40], 0)
    cache.update(torch.full((1, 2, 9, 64), torch.nan), torch.full((1, 2, 9, 64), torch.nan), 0)
    cache.crop(-9)
    cache.update(k[:, :, 40:], v[:, :, 40:], 0)
    straight.update(k, v, 0)
    assert same(contents(cache), contents(straight))


@pytest.mark.parametrize(("dim", "most"), [(64, 8.25), (128, 8.125), (256, 8.0625)])
def test_bits_per_value(dim: int, most: float) -> None:
    cache = filled(tokens=128, dim=dim)
    assert cache.bits_per_value == most
    assert cache.nbytes == sum(bytes_ for name, bytes_ in cache.memory().items() if name != "guard")
    assert cache.layers[0].keys is None
    assert cache.layers[0].values is None


@pytest.mark.parametrize("format_name", ["nested8", "int8", "fp8", "bf16", "fp16"])
def test_every_format_is_stored_and_read_back(format_name: str) -> None:
    cache = NestedCache(spec(k_format=format_name, v_format=format_name))
    k, v = torch.randn(2, 2, 130, 64), torch.randn(2, 2, 130, 64)
    handles = cache.update(k[:, :, :129], v[:, :, :129], 0)
    handles = cache.update(k[:, :, 129:], v[:, :, 129:], 0)
    for handle, wanted in zip(handles, (k, v), strict=True):
        assert handle.shape == (2, 2, 256, 64)
        assert reference.relative(handle.dequantize()[:, :, :130], wanted) < 0.03
        assert torch.equal(handle[:, :, :5], handle.dequantize()[:, :, :5])
        assert torch.equal(torch.cat([handle, handle], dim=2)[:, :, 256:], handle.dequantize())


def test_balance_is_undone_when_read_back() -> None:
    plan = SitePlan("site")
    balance = torch.rand(2, 64) + 0.5
    cache = NestedCache(CacheSpec((LayerSpec(plan, SiteControls.of(plan, 2), balance),), "", ""))
    k, v = torch.randn(1, 2, 9, 64), torch.randn(1, 2, 9, 64)
    handle, _ = cache.update(k, v, 0)
    assert reference.relative(handle.dequantize()[:, :, :9], k) < 0.02


def test_capacities_are_few_and_whole_tiles() -> None:
    found = {rounded_capacity(keys) for keys in range(1, 8193)}
    assert len(found) == 20
    assert all(capacity % 128 == 0 for capacity in found)
    assert all(keys <= rounded_capacity(keys) <= max(keys * 1.25, keys + 127) for keys in range(1, 8193))


def test_deep_copy_is_independent_and_obeys_the_same_settings(fast: Any, ids: Tensor) -> None:
    prefix = fast.lamp.cache()
    reference.logits(fast, ids, past_key_values=prefix)
    branch = copy.deepcopy(prefix)
    before = contents(prefix)
    reference.logits(fast, ids[:, :3], past_key_values=branch)
    assert (int(prefix.get_seq_length()), int(branch.get_seq_length())) == (40, 43)
    assert same(contents(prefix), before)
    assert branch.layers[0].controls.tau is fast.lamp.controls["model.layers.0.self_attn"].tau


def test_changing_the_level_moves_no_byte(fast: Any, ids: Tensor) -> None:
    cache = fast.lamp.cache()
    reference.logits(fast, ids, past_key_values=cache)
    before, where = contents(cache), addresses(cache)
    refined = []
    for settings in ({"tau": 1e9}, {"floor": 1}):
        fast.lamp.controls.set(**settings)
        cache.layers[0].stats.zero_()
        reference.logits(fast, ids[:, :1], past_key_values=cache)
        refined.append(cache.guard_report()[0]["refined_share"])
        cache.crop(-1)
    assert refined == [0.0, 1.0]
    after = contents(cache)
    assert addresses(cache) == where
    assert torch.equal(after["k_scale"][:, :, :40], before["k_scale"][:, :, :40])
    keys, old = (layout.key_rows(x["k_high"]) for x in (after, before))
    assert torch.equal(keys[:, :, :40], old[:, :, :40])
    values, old = (layout.value_rows(x["v_residual"]) for x in (after, before))
    assert torch.equal(values[:, :, :40], old[:, :, :40])


class _Largest(TorchDispatchMode):
    """Records the largest float tensor that any operator, ours being one operator each, returns."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.dtype != torch.float16:
                self.elements = max(self.elements, leaf.numel())
        return result


def test_decoding_allocates_no_float_keys_or_values(model: Any, fast: Any, ids: Tensor) -> None:
    kv = 2 * 2 * 1024 * 16
    largest = []
    for which, cache in ((fast, fast.lamp.cache(1024)), (model, reference.dequantised_cache(fast.lamp.spec, 1024))):
        reference.logits(which, ids, past_key_values=cache)
        with _Largest() as seen:
            reference.logits(which, ids[:, :1], past_key_values=cache)
        largest.append(seen.elements)
    assert largest[0] < kv / 4
    assert largest[1] >= kv, "the check must see the copies that reading back makes"


def test_model_that_touches_keys_gets_floats(fast: Any) -> None:
    handle, _ = fast.lamp.cache().layers[0].update(torch.randn(1, 2, 4, 16), torch.randn(1, 2, 4, 16))
    assert handle.expand(2, 2, 128, 16).shape == (2, 2, 128, 16)
    assert handle.transpose(2, 3).shape == (1, 2, 16, 128)
    assert (handle.dtype, handle.device) == (torch.float32, torch.device("cpu"))
    assert isinstance(torch.nn.functional.linear(handle, torch.eye(16)), Tensor)
    with pytest.raises(AttributeError):
        handle.mean()


def test_made_in_inference_mode_used_outside(model: Any, ids: Tensor) -> None:
    with torch.inference_mode():
        fast = lamp_compile.compile(model, mode="eager")
        cache = fast(ids).past_key_values
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([0, 2]))
        cache.ensure_capacity(200)
    fast.lamp.controls.set(tau=0.0)
    got = reference.logits(fast, ids[:, :3], past_key_values=cache)
    cache.crop(-3)
    cache.reset()
    wanted = reference.logits(fast, torch.cat((ids, ids[:, :3]), dim=1))[:, -3:]
    assert reference.relative(got, wanted) < 0.05


def test_package_exports_the_cache() -> None:
    assert lamp_compile.NestedCache is NestedCache
