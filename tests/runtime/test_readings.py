"""What the controller reads of caches that come and go."""

from __future__ import annotations

import gc

import torch

from lamp_compile.runtime import guard
from lamp_compile.runtime.controller_thread import StepClock
from lamp_compile.runtime.ledger import Ledger
from lamp_compile.runtime.readings import WINDOWS, Reader

STEPS = 40


class Layer:
    """What a reading asks of a layer."""

    name, is_initialized = "site", True

    def __init__(self) -> None:
        cpu = torch.device("cpu")
        self.state, self.stats = guard.new_state(1, 2, cpu), guard.new_stats(1, 2, cpu)

    def step(self) -> None:
        self.stats[..., guard.STEPS] += STEPS


class Cache:
    """And of a cache."""

    def __init__(self, layers: list[Layer]) -> None:
        self.layers = layers


def test_a_cache_where_a_dead_one_lay_is_another():
    """It dies, too, and did as much: by ``id`` the two would be one cache that did nothing since."""
    ledger = Ledger()
    reader = Reader(ledger, {"site": STEPS // WINDOWS}, StepClock())
    layers, others = [Layer()], [[Layer()] for _ in range(2000)]
    cache = Cache(layers)
    ledger.watch(cache)
    layers[0].step()
    assert reader.read().sites[0].steps == 2 * STEPS
    place, found = id(cache), []
    gc.disable()
    try:
        del cache
        while others and (not found or id(found[-1]) != place):
            found.append(Cache(others.pop()))
    finally:
        gc.enable()
    assert id(found[-1]) == place, "no cache came to lie there"
    ledger.watch(found[-1])
    found[-1].layers[0].step()
    found.clear()
    gc.collect()
    reading = reader.read()
    assert reading is not None
    assert reading.sites[0].steps == 2 * STEPS


def test_what_a_cache_did_before_it_died_is_read_once():
    ledger = Ledger()
    reader = Reader(ledger, {"site": STEPS // WINDOWS}, StepClock())
    cache = Cache([Layer()])
    ledger.watch(cache)
    cache.layers[0].step()
    assert reader.read().sites[0].steps == 2 * STEPS
    cache.layers[0].step()
    cache.layers[0].step()
    del cache
    gc.collect()
    assert reader.read().sites[0].steps == 4 * STEPS
    assert reader.read() is None
