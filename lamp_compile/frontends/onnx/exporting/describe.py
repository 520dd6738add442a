"""What a decoder's artifact says about itself, for ``lamp_compile.OrtSession``: the object that
``runtime/ort/artifact.py`` reads."""

from __future__ import annotations

from typing import Any

from lamp_compile.frontends.onnx.exporting import kept_logits
from lamp_compile.frontends.onnx.exporting.decoder import DecoderGraph, PlaneLayer
from lamp_compile.runtime.hot_values import FIELDS
from lamp_compile.runtime.ort import artifact

MODULE = {"version": artifact.VERSION, "kind": "module"}
"""Of a model without a cache: ``OrtSession.run`` takes its inputs as they are."""


def decoder(graph: DecoderGraph, original: Any) -> dict[str, Any]:
    """Names of inputs and outputs, sizes and plan of every layer, as plain data.

    Args:
        graph: What was exported; its tensors are called ``past.<layer>.<name>`` and ``present.<layer>.<name>``.
        original: The transformers model, for its limits and its end tokens.
    """
    config = original.config.get_text_config(decoder=True)
    generation = getattr(original, "generation_config", None)
    stop = getattr(generation, "eos_token_id", None)
    rows: dict[str, list[Any]] = {"sites": [], "float_sites": []}
    for index, layer in enumerate(graph.layers):
        site = graph.sites[index]
        about: dict[str, Any] = {
            "name": layer.name, "kv_heads": site.kv_heads, "head_dim": site.head_dim, "value_dim": site.value_dim,
        }  # fmt: skip
        if not isinstance(layer, PlaneLayer):
            for side in ("past", "present"):
                about[side] = {"k": f"{side}.{index}.keys", "v": f"{side}.{index}.values"}
            rows["float_sites"].append(about)
            continue
        plan = layer.spec.plan
        for side in ("past", "present"):
            about[side] = {name: f"{side}.{index}.{name}" for name in layer.names}
        values = {"tau": plan.tau, "floor": plan.floor, "budget": plan.guard.budget}
        about |= {
            "heads": site.heads, "tile": plan.tile, "controls": {name: f"lamp.{index}.{name}" for name in FIELDS},
            "plan": {**{name: _plain(value) for name, value in values.items()}, "window": plan.guard.window},
        }  # fmt: skip
        rows["sites"].append(about)
    chosen = {artifact.FIRST_LOGITS: kept_logits.NAME} if graph.chooses_logits else {}
    return {
        "version": artifact.VERSION, "kind": "decoder", "vocab": int(config.vocab_size),
        "max_length": getattr(config, "max_position_embeddings", None),
        "eos_token_id": config.eos_token_id if stop is None else stop,
        "inputs": {"tokens": "input_ids", "slots": "positions"}, "logits": "logits", **chosen, **rows,
    }  # fmt: skip


def _plain(value: Any) -> Any:
    """A number or a list of them; JSON has no infinity, so that one is spelled out as in plans."""
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return "Infinity" if value == float("inf") else value
