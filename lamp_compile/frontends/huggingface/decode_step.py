"""One decode step of a compiled model as a module to export: the planes and the guard's state are its buffers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lamp_compile.errors import ModelError
from lamp_compile.frontends.huggingface.compiled import Lamp
from lamp_compile.runtime import cache_argument, layout
from lamp_compile.runtime.cache_layers import NestedLayer

HOT = ("tau", "floor", "budget")


class DecodeStep(nn.Module):
    """Token ids ``[B, n]`` in, logits ``[B, n, V]`` out; everything between two calls is in the buffers.

    For ``torch.export.export(step, (ids,), strict=True)``. The buffers are called ``layer<i>_k_high`` and so on, as the
    cache's tensors are; ``layer<i>_cumulative_length`` counts tokens. Save the program before it has run: what it has
    read is in its buffers.

    Args:
        model: A transformers decoder from ``lamp_compile.compile``.
        batch: Sequences.
        capacity: Tokens there is room for; an exported program cannot grow.

    Raises:
        ModelError: The model was not compiled on that route, or a layer keeps float keys and values, because LAMP left
            it alone.
    """

    def __init__(self, model: nn.Module, batch: int = 1, capacity: int = layout.TILE) -> None:
        super().__init__()
        lamp = getattr(model, "lamp", None)
        if not isinstance(lamp, Lamp):
            raise ModelError(
                "no transformers decoder compiled by LAMP",
                where=type(model).__name__,
                fix="DecodeStep(lamp_compile.compile(model))",
            )
        plan = lamp.plan
        if plan.shadow or any(row.apply and (row.guard.retry or row.exact_tier != "none") for row in plan.sites):
            raise ModelError(
                "the plan asks for shadow steps, retries or an exact tier, which an exported step cannot do",
                where=type(model).__name__,
                fix="a plan without shadow, guard.retry and exact_tier",
            )
        self.model, self.cache, self.argument = model, lamp.cache(capacity), cache_argument.name_for(model)
        by_name = {site.name: site for site in lamp.sites}
        for index, layer in enumerate(self.cache.layers):
            if not isinstance(layer, NestedLayer):
                raise ModelError(
                    f"layer {index} keeps float keys and values",
                    where=type(model).__name__,
                    fix="export a model whose attention sites are all claimed (`lamp-compile explain`)",
                )
            site = by_name[layer.name]
            like: dict[str, Any] = {"dtype": site.dtype, "device": layer.controls.tau.device}
            layer.lazy_initialization(
                torch.zeros(batch, site.kv_heads, 0, site.head_dim, **like),
                torch.zeros(batch, site.kv_heads, 0, site.value_dim, **like),
            )
            for name in (*layer.per_sequence, "cumulative_length"):
                self.register_buffer(f"layer{index}_{name}", getattr(layer, name))
            for name in HOT:
                self.register_buffer(f"layer{index}_{name}", getattr(layer.controls, name))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Planes saved by a machine that keeps them in the other order of bytes are turned (``runtime/layout.py``)."""
        for name, own in self.named_buffers(recurse=False):
            given = state_dict.get(prefix + name)
            if isinstance(given, Tensor) and {given.dim(), own.dim()} == {5, 6}:
                state_dict[prefix + name] = layout.as_lanes(given) if layout.by_lanes(own) else layout.as_rows(given)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Append the tokens ``[B, n]`` and give back their logits ``[B, n, V]``."""
        logits: Tensor = self.model(input_ids=input_ids, use_cache=True, **{self.argument: self.cache}).logits
        return logits
