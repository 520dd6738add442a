"""A slot cache for a compiled transformers model: whether its attention needs no mask, and the positions of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lamp_compile.errors import CacheError
from lamp_compile.frontends.huggingface.sites import ProbedSite
from lamp_compile.runtime import cache_argument
from lamp_compile.runtime.kv_cache import CacheSpec
from lamp_compile.runtime.slot_cache import SlotCache, SlotView

LAYER_TYPES = {"full_attention": False, "sliding_attention": True}
"""Layer types whose mask is causality and, where True, a window."""


def make_slots(
    config: Any, spec: CacheSpec, sites: Sequence[ProbedSite], streams: int, tokens: int, max_length: int | None
) -> SlotCache:
    """A cache of slots for the model with this configuration.

    Raises:
        CacheError: A layer keeps floats or attends by a mask that lengths, causality and window do not describe, or
            memory is short.
        OptionError: A size is no whole number above 0.
    """
    text = config.get_text_config(decoder=True)
    for layer in spec.layers:
        if layer is not None and layer.plan.exact_tier != "none":
            raise CacheError(
                "exact_tier 'host' keeps a copy of whole caches, not of pages",
                where=layer.plan.name,
                fix="fast.lamp.cache() and generate, or exact_tier 'none'",
            )
    by_layer = {site.layer: site for site in sites if not site.reason}
    for site in by_layer.values():
        if reason := why_masked(site, text):
            raise CacheError(reason, where=site.name, fix="fast.lamp.cache() and generate, which take any mask")
    first = next(iter(by_layer.values()))
    shapes = [by_layer.get(index, first).shape for index in range(len(spec.layers))]
    if max_length is None:
        longest = getattr(text, "max_position_embeddings", None)
        max_length = min(tokens, longest) if isinstance(longest, int) and isinstance(tokens, int) else tokens
    return SlotCache(spec, shapes, streams=streams, tokens=tokens, max_length=max_length)


def positions_for(cache: SlotView, parameters: Sequence[str], args: Sequence[Any], kwargs: dict[str, Any]) -> None:
    """Add the position ids that a forward over slots was not given.

    Raises:
        CacheError: The model takes none.
    """
    if kwargs.get("position_ids") is not None:
        return
    if "position_ids" not in parameters:
        raise CacheError(
            "the model takes no position_ids, and the slots' sequences differ in length",
            where=cache_argument.NAME,
            fix="fast.lamp.cache() and generate",
        )
    index = list(parameters).index("position_ids")
    if len(args) > index:
        return
    ids = args[0] if args else kwargs.get("input_ids")
    ids = kwargs.get("inputs_embeds") if ids is None else ids
    if ids is not None:
        kwargs["position_ids"] = cache.next_positions(ids.shape[1])


def why_masked(site: ProbedSite, text: Any) -> str | None:
    """Why length, causality and the window that the module passes on do not say all that the model's own mask of this
    site says without padding; None where they do. ``text``: the configuration of the decoder."""
    kinds = getattr(text, "layer_types", None)
    if kinds is not None:
        kind = kinds[site.layer]
        windowed = LAYER_TYPES.get(kind)
    else:
        kind = "its mask"
        chunked = getattr(text, "attention_chunk_size", None) is not None
        windowed = None if chunked else getattr(text, "sliding_window", None) is not None
    passed = any(feature.startswith("window") for feature in site.features)
    if windowed is None or windowed != passed:
        return f"{kind} is not causality {'and a window ' if passed else ''}alone"
    return None
