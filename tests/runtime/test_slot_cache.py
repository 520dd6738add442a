"""Slots and pages by themselves: what a sequence gets does not depend on who else is there, was there, or comes."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from lamp_compile.errors import CacheError, LampError, OptionError
from lamp_compile.plan import SitePlan
from lamp_compile.runtime import guard
from lamp_compile.runtime.cache_layers import LayerSpec, NestedLayer
from lamp_compile.runtime.controls import SiteControls
from lamp_compile.runtime.kv_cache import CacheSpec, NestedCache
from lamp_compile.runtime.slot_cache import LayerShape, SlotCache
from tests.tolerances import ARITHMETIC

G, H, D = 2, 4, 64
SHAPE = LayerShape(G, D, D, torch.float32, torch.device("cpu"))
PLANES = ("k_high", "k_residual", "k_scale", "v_high", "v_residual", "v_scale")


def spec(layers: int = 1, **fields: Any) -> CacheSpec:
    plans = [SitePlan(f"layer {index}", **{"tile": 32, **fields}) for index in range(layers)]
    return CacheSpec(tuple(LayerSpec(plan, SiteControls.of(plan, G)) for plan in plans), "fingerprint", "a model")


def slots(streams: int = 3, tokens: int = 512, max_length: int = 256, layers: int = 1, **fields: Any) -> SlotCache:
    made = spec(layers, **fields)
    return SlotCache(made, [SHAPE] * layers, streams=streams, tokens=tokens, max_length=max_length)


def rows(count: int, seed: int, batch: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    k, v = (torch.randn(batch, G, count, D, generator=generator) for _ in range(2))
    return k, v


def attend(cache: Any, q: Tensor, **settings: Any) -> Tensor:
    return cache.layers[0].attend(
        q, None, None, None, **{"causal": "bottom_right", "window": 0, "scale": 0.125, "softcap": 0.0, **settings}
    )


def fill(cache: SlotCache, count: int, seed: int) -> int:
    """A new sequence of so many random rows."""
    slot = cache.admit(count)
    cache.view(slot).update(*rows(count, seed), 0)
    return slot


def contents(cache: SlotCache) -> list[Tensor]:
    """A copy of everything."""
    layers = [getattr(layer, name).clone() for layer in cache.layers for name in (*PLANES, "state", "stats")]
    return [*layers, cache.rows.block_table.clone(), cache.lengths.clone(), cache.rows.running.clone()]


def addresses(cache: SlotCache) -> list[int]:
    tensors = [getattr(layer, name) for layer in cache.layers for name in (*PLANES, "state", "stats")]
    return [t.data_ptr() for t in (*tensors, cache.rows.block_table, cache.lengths, cache.rows.live)]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) for a, b in zip(one, other, strict=True))


def pages_of(cache: SlotCache, slot: int) -> list[int]:
    return [page for page in cache.rows.block_table[slot].tolist() if page >= 0]


def says(error: type[LampError], what: str) -> Any:
    return pytest.raises(error, match=rf"(?s){re.escape(what)}.*where: .*try: ")


@pytest.mark.parametrize("window", [0, 8])
@pytest.mark.parametrize(("tile", "k_format"), [(32, "nested8"), (128, "nested8"), (64, "int8"), (32, "bf16")])
def test_each_slot_is_what_a_cache_of_its_own_would_be(tile: int, k_format: str, window: int) -> None:
    fields = {"tile": tile, "k_format": k_format, "tau": 0.05}
    lengths = (5, 70, 33)
    cache = slots(**fields)
    for seed, length in enumerate(lengths):
        fill(cache, length, seed)
    alone = [NestedCache(spec(**fields)) for _ in lengths]
    for seed, (single, length) in enumerate(zip(alone, lengths, strict=True)):
        single.update(*rows(length, seed), 0)
    for step in range(3):
        k, v = rows(1, 100 + step, batch=3)
        q = torch.randn(3, H, 1, D, generator=torch.Generator().manual_seed(step))
        cache.update(k, v, 0)
        together = attend(cache, q, window=window)
        for slot, single in enumerate(alone):
            single.update(k[slot : slot + 1], v[slot : slot + 1], 0)
            wanted = attend(single, q[slot : slot + 1], window=window)
            error = (together[slot : slot + 1] - wanted).norm() / wanted.norm()
            assert error <= ARITHMETIC[torch.float32].relative
    assert cache.lengths.tolist() == [8, 73, 36]
    for slot, single in enumerate(alone):
        assert torch.equal(cache.layers[0].stats[slot], single.layers[0].stats[0])


def test_growth_takes_pages_and_moves_nothing() -> None:
    cache = slots()
    first, second = fill(cache, 32, 0), fill(cache, 32, 1)
    before, where = contents(cache), addresses(cache)
    cache.ensure(first, 100)
    assert same(contents(cache)[:8], before[:8])
    assert addresses(cache) == where
    assert (len(pages_of(cache, first)), len(pages_of(cache, second))) == (4, 1)
    cache.update(*rows(1, 2, batch=3), 0)
    assert len(pages_of(cache, second)) == 2, "an eager step gets its own pages"
    assert addresses(cache) == where
    used = pages_of(cache, first) + pages_of(cache, second)
    assert len(set(used)) == len(used)
    assert cache.free_tokens == 512 - 32 * len(used)


def test_pool_exhaustion_changes_nothing() -> None:
    cache = slots(tokens=128)  # four pages
    for seed in range(2):
        fill(cache, 32, seed)
    fill(cache, 20, 2)
    before, where = contents(cache), addresses(cache)
    with says(CacheError, "2 more pages of 32 tokens are needed, 1 of 4 are free"):
        cache.update(*rows(1, 3, batch=3), 0)
    with says(CacheError, "1 of 4 are free"):
        cache.ensure(0, 96)
    with says(CacheError, "1 of 4 are free"):
        cache.view(1).update(*rows(40, 4), 0)
    assert same(contents(cache), before)
    assert (addresses(cache), cache.free_tokens) == (where, 32)
    cache.free(1)
    cache.update(*rows(1, 3, batch=3), 0)
    assert cache.lengths.tolist() == [33, 0, 21]
    assert not cache.fits(64)
    with says(CacheError, "2 more pages of 32 tokens are needed, 1 of 4 are free"):
        cache.admit(64)
    assert cache.taken() == [0, 2]


def test_longer_than_the_table_changes_nothing() -> None:
    cache = slots(max_length=64)
    slot = fill(cache, 64, 0)
    before = contents(cache)
    for call in (
        lambda: cache.admit(65),
        lambda: cache.ensure(slot, 65),
        lambda: cache.view(slot).update(*rows(1, 1), 0),
        lambda: cache.update(*rows(1, 1, batch=3), 0),
    ):
        with says(CacheError, "65 tokens in one sequence, and a slot lists pages for 64"):
            call()
    assert same(contents(cache), before)


def test_slots_are_taken_and_freed() -> None:
    cache = slots(streams=2)
    first, second = cache.admit(5), cache.admit(5)
    assert (first, second, cache.taken()) == (0, 1, [0, 1])
    with says(CacheError, "all 2 slots are taken"):
        cache.admit(5)
    view = cache.view(first)
    cache.free(first)
    for call in (cache.free, cache.view, cache.pause, cache.resume, cache.length, lambda slot: cache.ensure(slot, 9)):
        with says(CacheError, "slot 0 holds no sequence"):
            call(first)
    with says(CacheError, "slot 7 holds no sequence"):
        cache.free(7)
    assert pages_of(cache, first) == []
    cache.lengths[first] = 9  # what a compiled step on an old view would leave
    assert cache.admit(5) == first
    assert int(cache.lengths[first]) == 0
    with says(CacheError, "slot 0 was freed and holds another sequence"):
        view.update(*rows(1, 0), 0)
    cache.reset()
    assert (cache.taken(), cache.free_tokens, cache.lengths.tolist()) == ([], 512, [0, 0])


def test_refilled_slot_starts_its_guard_anew() -> None:
    cache = slots()
    for seed in range(3):
        fill(cache, 9, seed)
    layer = cache.layers[0]
    layer.state.fill_(2.0)
    layer.stats.fill_(5)
    cache.free(1)
    assert int(layer.stats[1].sum()), "still there to be read"
    assert cache.admit(9) == 1
    assert not layer.state[1].any()
    assert not layer.stats[1].any()
    assert bool((layer.state[[0, 2]] == 2.0).all())
    assert bool((layer.stats[[0, 2]] == 5).all())
    cache.view(1).update(*rows(9, 3), 0)
    attend(cache.view(1), torch.randn(1, H, 9, D))
    assert layer.stats[:, 0, guard.STEPS].tolist() == [5, 1, 5]
    assert cache.view(1).guard_report()[0]["steps"] == 1


@pytest.mark.parametrize("tokens", [1, 31, 33, 64])
def test_reused_pages_leak_nothing(tokens: int) -> None:
    """A sequence over pages full of NaN gives the bits that it gives over new ones."""
    outs = []
    for poisoned in (False, True):
        cache = slots(streams=2, tokens=128, max_length=128)
        fill(cache, 60, 0)
        old = fill(cache, 64, 1)
        cache.free(old)
        layer = cache.layers[0]
        if poisoned:
            free = [page for page in range(4) if page not in pages_of(cache, 0)]
            for page in free:
                for name in ("k_scale", "v_scale"):
                    getattr(layer, name)[:, :, page * 32 : (page + 1) * 32] = torch.nan
                for name in ("k_high", "k_residual", "v_high", "v_residual"):
                    getattr(layer, name)[:, :, page] = 0xFF
        assert fill(cache, tokens, 2) == old
        cache.ensure(old, 64)
        out = attend(cache.view(old), _query(1))
        outs.append((out, layer.state[old].clone(), layer.stats[old].clone()))
    assert all(torch.equal(a, b) for a, b in zip(*outs, strict=True))
    assert outs[1][0].isfinite().all()


def _query(batch: int) -> Tensor:
    return torch.randn(batch, H, 1, D, generator=torch.Generator().manual_seed(5))


def test_slots_outside_a_step_are_left_alone() -> None:
    """Empty, kept for a sequence that has not come, paused: zeros, nothing written, nothing counted."""
    cache = slots(streams=4)
    fill(cache, 40, 0)
    kept, paused = cache.admit(40), fill(cache, 40, 1)
    cache.pause(paused)
    before = contents(cache)
    cache.update(*rows(1, 2, batch=4), 0)
    out = attend(cache, _query(4))
    assert out[0].abs().min() > 0
    assert not out[1:].any()
    assert cache.lengths.tolist() == [41, 0, 40, 0]
    layer = cache.layers[0]
    assert layer.stats[:, 0, guard.STEPS].tolist() == [1, 0, 0, 0]
    assert not layer.stats[1:].any()
    own = pages_of(cache, 0)
    others = [page for page in range(16) if page not in own]
    for name, old in zip(PLANES[:2], before, strict=False):
        assert torch.equal(getattr(layer, name)[:, :, others], old[:, :, others])
    written = (layer.k_scale != before[2]).any(1).sum()
    assert int(written) == 1
    cache.resume(paused)
    cache.view(kept).update(*rows(3, 3), 0)
    cache.update(*rows(1, 4, batch=4), 0)
    assert cache.lengths.tolist() == [42, 4, 41, 0]


@pytest.mark.parametrize("where", ["key", "value"])
def test_nan_in_one_slot_changes_no_bit_of_the_others(where: str) -> None:
    found = []
    for planted in (False, True):
        cache = slots()
        for seed in range(3):
            k, v = rows(40, seed)
            if planted and seed == 1:
                (k if where == "key" else v)[0, 1, 7, 3] = torch.nan
            cache.view(cache.admit(40)).update(k, v, 0)
        outs = []
        for step in range(2):
            cache.update(*rows(1, 10 + step, batch=3), 0)
            outs.append(attend(cache, _query(3)))
        found.append((torch.stack(outs), cache.layers[0].state.clone(), cache.layers[0].stats.clone()))
    (clean, clean_state, clean_stats), (out, state, stats) = found
    for slot in (0, 2):
        assert torch.equal(out[:, slot], clean[:, slot])
        assert torch.equal(state[slot], clean_state[slot])
        assert torch.equal(stats[slot], clean_stats[slot])
    assert out[:, 1, :2].isfinite().all(), "the other kv head of the same slot"
    assert out[:, 1, 2:].isnan().all()
    assert (state[..., guard.FLAGS].long() & guard.NONFINITE).tolist() == [[0, 0], [0, 1], [0, 0]]


def test_a_step_that_fails_between_layers_is_not_counted() -> None:
    cache = slots(layers=2)
    slot = cache.admit(40)
    k, v = rows(5, 0)
    cache.view(slot).update(k, v, 0)
    with says(CacheError, "1 sequences with 3 kv heads"):
        cache.view(slot).update(torch.randn(1, 3, 5, D), torch.randn(1, 3, 5, D), 1)
    assert cache.length(slot) == 0
    view = cache.view(slot)
    for layer in range(2):
        view.update(k, v, layer)
    assert cache.length(slot) == 5
    straight = slots(layers=2)
    again = straight.view(straight.admit(40))
    for layer in range(2):
        again.update(k, v, layer)
    assert same(contents(cache), contents(straight))


def test_compiled_step_without_pages_writes_nothing_and_is_found_out() -> None:
    cache = slots(tokens=64)
    slot = fill(cache, 32, 0)
    fill(cache, 30, 1)

    def step(k: Tensor, v: Tensor, q: Tensor) -> Tensor:
        cache.update(k, v, 0)
        return attend(cache, q)

    compiled = torch.compile(step, backend="eager", fullgraph=True)
    before, wanted = contents(cache), attend(cache.view(slot), _query(3)[:1])
    out = compiled(*rows(1, 2, batch=3), _query(3))
    after = contents(cache)
    assert (out[:1] - wanted).norm() <= ARITHMETIC[torch.float32].relative * wanted.norm(), "stored rows only"
    own = pages_of(cache, slot)
    assert torch.equal(after[0][:, :, own], before[0][:, :, own])
    with says(CacheError, "33 tokens were stepped through, with pages for 32"):
        cache.length(slot)
    assert cache.length(1) == 31
    cache.view(slot).crop(-1)
    assert cache.length(slot) == 32


def test_crop_of_one_slot() -> None:
    cache = slots()
    slot, other = fill(cache, 40, 0), fill(cache, 40, 1)
    for tokens, left in ((-7, 33), (50, 33), (20, 20), (torch.tensor(-5), 15), (-80, 0)):
        cache.view(slot).crop(tokens)
        assert (cache.length(slot), cache.length(other)) == (left, 40)
    with says(CacheError, "crop does not work on a slot cache"):
        cache.crop(-1)


@pytest.mark.parametrize(
    ("call", "what"),
    [
        (lambda cache: cache.reorder_cache(torch.tensor([1, 0, 2])), "reorder_cache"),
        (lambda cache: cache.batch_repeat_interleave(2), "batch_repeat_interleave"),
        (lambda cache: cache.batch_select_indices(torch.tensor([0])), "batch_select_indices"),
        (lambda cache: cache.ensure_capacity(100), "generate or ensure_capacity"),
        (lambda cache: cache.view(0).reset(), "reset of one slot"),
        (lambda cache: cache.get_seq_length(), "slots hold sequences of different lengths"),
        (lambda cache: attend_masked(cache), "a mask came with a slot cache"),
        (lambda cache: cache.layers[0].update(*rows(1, 0, batch=2)), "2 sequences with 2 kv heads"),
        (lambda cache: cache.update(*rows(1, 0, batch=3), 0)[0].dequantize(), "asked for as floats"),
    ],
)
def test_what_slots_cannot_do_says_what_to_use(call: Any, what: str) -> None:
    cache = slots()
    fill(cache, 5, 0)
    with says(CacheError, what):
        call(cache)


def attend_masked(cache: SlotCache) -> Tensor:
    mask = torch.ones(3, 1, 1, 256, dtype=torch.bool)
    return cache.layers[0].attend(_query(3), mask, None, None, causal="", window=0, scale=1.0, softcap=0.0)


@pytest.mark.parametrize("sizes", [{"streams": 0}, {"tokens": 2.5}, {"max_length": True}, {"tokens": -1}])
def test_sizes_are_checked(sizes: dict[str, Any]) -> None:
    with says(OptionError, f"{next(iter(sizes))} is {next(iter(sizes.values()))!r}"):
        slots(**sizes)


def test_layers_that_do_not_fit_together() -> None:
    plans = [SitePlan("a", tile=32), SitePlan("b", tile=64)]
    mixed = CacheSpec(tuple(LayerSpec(plan, SiteControls.of(plan, G)) for plan in plans), "", "a model")
    with says(CacheError, "storage tiles of 32 and 64 keys"):
        SlotCache(mixed, [SHAPE] * 2, streams=1, tokens=64, max_length=64)
    with says(CacheError, "layer 1 keeps float keys and values"):
        SlotCache(CacheSpec((mixed.layers[0], None), "", ""), [SHAPE] * 2, streams=1, tokens=64, max_length=64)
    elsewhere = LayerShape(G, D, D, torch.float32, torch.device("meta"))
    with says(CacheError, "layers on cpu, meta"):
        SlotCache(spec(2), [SHAPE, elsewhere], streams=1, tokens=64, max_length=64)


def test_out_of_memory_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = NestedLayer._allocate, iter(range(9))

    def failing(self: NestedLayer, *sizes: int) -> dict[str, Tensor]:
        if next(calls) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return real(self, *sizes)

    monkeypatch.setattr(NestedLayer, "_allocate", failing)
    with says(CacheError, "2 layers of 16 pages of 32 tokens: out of memory (CUDA out of memory. Tried to"):
        slots(layers=2)


def test_bytes_are_those_of_the_pool() -> None:
    cache = slots(streams=8, tokens=1000, max_length=900)
    assert (cache.capacity, cache.max_length, cache.streams, cache.free_tokens) == (1024, 928, 8, 1024)
    assert cache.bits_per_value == 8.25
    assert cache.nbytes == 1024 * 2 * G * D * 8.25 / 8
    assert cache.memory()["guard"] == 8 * G * (4 * 4 + 7 * 8)
    assert slots(tokens=100, max_length=4000).max_length == 128, "no slot can list more pages than there are"
