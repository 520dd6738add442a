"""What LAMP must equal with everything refined: the original model over keys and values read back from the planes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lamp_compile.runtime.kv_cache import CacheSpec, NestedCache, NestedLayer
from tests.models import zoo

GREEDY = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
EXACT = {"floor": 1, "query_bits": 0}
"""Both planes everywhere, the query as it is: the same mathematics as ordinary attention over dequantised planes."""
_FAMILIES = {family.name: family for family in zoo.FAMILIES}


def build(name: str, implementation: str = "eager") -> Any:
    """A tiny random model, the same weights each time, that never stops by itself."""
    model: Any = zoo.build(_FAMILIES[name], implementation)
    if model.can_generate():
        model.generation_config.eos_token_id = None
    return model


class DequantisedLayer(NestedLayer):
    """Stores planes and hands out floats, to any attention."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        keys, values = super().update(key_states, value_states)
        return keys.dequantize(), values.dequantize()


def dequantised_cache(spec: CacheSpec, capacity: int = 128) -> NestedCache:
    """A cache for the *original* model of ``spec``."""
    cache = NestedCache(spec, capacity)
    cache.layers = [DequantisedLayer(layer, cache.capacity) for layer in spec.layers if layer is not None]
    return cache


def relative(got: Tensor, wanted: Tensor) -> float:
    """||got - wanted|| / ||wanted||."""
    return float((got.double() - wanted.double()).norm() / wanted.double().norm())


def logits(model: Any, ids: Tensor, **kwargs: Any) -> Tensor:
    """Logits of one forward."""
    with torch.no_grad():
        found: Tensor = model(input_ids=ids, **kwargs).logits
    return found
