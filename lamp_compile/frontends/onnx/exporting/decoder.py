"""A transformers decoder as a module to export: token ids, positions and planes in; logits and planes out.

Prefill and decoding are the same graph: n new tokens go to the rows ``positions[b] ... positions[b] + n - 1`` of
sequence b, and attend to all rows up to their own. There is no padding and no mask: sequences of a batch may differ in
length, and what a shorter prompt has behind its end is written over by the next tokens.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from lamp_compile.errors import ModelError
from lamp_compile.frontends.huggingface import attention
from lamp_compile.frontends.huggingface.compiled import Lamp
from lamp_compile.frontends.huggingface.sites import ProbedSite
from lamp_compile.frontends.huggingface.slots import why_masked
from lamp_compile.frontends.onnx.exporting import torch_ops as _torch_ops  # noqa: F401  (registers torch.ops.lamp_onnx)
from lamp_compile.frontends.onnx.form import check_row
from lamp_compile.frontends.structure import structural_copy
from lamp_compile.runtime import cache_argument, guard
from lamp_compile.runtime.cache_layers import PLANES, LayerSpec
from lamp_compile.runtime.plane_handle import PlaneHandle

HOT, STATE = ("tau", "floor", "budget"), ("state", "stats")
FLOATS = ("keys", "values")


class PlaneLayer:
    """One layer over planes that are inputs of the graph. Not a module: it exists while a graph is recorded."""

    def __init__(self, spec: LayerSpec) -> None:
        self.spec, self.name = spec, spec.plan.name
        self.hot: tuple[Tensor, ...] = ()
        self.balance: Tensor | None = None
        self.tensors: dict[str, Tensor] = {}
        self.positions = self.lengths = torch.empty(0)

    names = (*PLANES, *STATE)

    def update(self, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> tuple[PlaneHandle, PlaneHandle]:
        """Append rows; gives back handles of all keys and values."""
        planes = [self.tensors[name] for name in PLANES]
        new = torch.ops.lamp_onnx.append(
            k, v, *planes, self.positions, self.balance, rotation=self.spec.plan.rotation, site=self.name
        )
        self.tensors.update(zip(PLANES, new, strict=True))
        handle: Any = _Untouched
        return handle(self, False, k.dtype), handle(self, True, v.dtype)

    def attend(
        self, q: Tensor, mask: Tensor | None, bias: Tensor | None, sinks: Tensor | None,
        *, causal: str, window: int, scale: float, softcap: float,
    ) -> Tensor:  # fmt: skip
        """Attention over the planes; the guard's new state becomes an output of the graph."""
        _refuse_mask(self.name, mask, bias)
        plan = self.spec.plan
        found: tuple[Tensor, Tensor, Tensor] = torch.ops.lamp_onnx.fused_attention(
            q, *(self.tensors[name] for name in PLANES), *self.hot, *(self.tensors[name] for name in STATE),
            self.lengths, self.balance, sinks, causal=causal, window=window, scale=float(scale),
            softcap=float(softcap), rotation=plan.rotation, rule=plan.rule, query_bits=plan.query_bits,
            subtile=plan.subtile, guard_window=plan.guard.window, guard_hold=plan.guard.hold,
            hysteresis=plan.guard.hysteresis, site=self.name,
        )  # fmt: skip
        out, self.tensors["state"], self.tensors["stats"] = found
        return out


class FloatRows:
    """One layer that LAMP leaves alone: float keys and values ``[B, G, capacity, D]`` are inputs of the graph."""

    names = FLOATS

    def __init__(self, name: str) -> None:
        self.name = name
        self.tensors: dict[str, Tensor] = {}
        self.positions = self.lengths = torch.empty(0)

    def update(self, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> tuple[PlaneHandle, PlaneHandle]:
        """Append rows; gives back handles of all keys and values."""
        rows = self.positions[:, None] + torch.arange(k.shape[2], device=k.device)
        batch = torch.arange(k.shape[0], device=k.device)[:, None]
        for name, new in (("keys", k), ("values", v)):
            held = self.tensors[name].transpose(1, 2)
            self.tensors[name] = held.index_put((batch, rows), new.transpose(1, 2)).transpose(1, 2)
        handle: Any = _Untouched
        return handle(self, False, k.dtype), handle(self, True, v.dtype)

    def attend(
        self, q: Tensor, mask: Tensor | None, bias: Tensor | None, sinks: Tensor | None,
        *, causal: str, window: int, scale: float, softcap: float,
    ) -> Tensor:  # fmt: skip
        """Float attention, each query up to its own position."""
        _refuse_mask(self.name, mask, bias)
        if sinks is not None or softcap:
            raise ModelError(
                "a layer without planes has sinks or a soft-cap", where=self.name, fix="apply: true in its plan"
            )
        k, v = (self.tensors[name].repeat_interleave(q.shape[1] // self.tensors[name].shape[1], 1) for name in FLOATS)
        at = (self.positions[:, None] + torch.arange(q.shape[2], device=q.device))[:, None, :, None]
        key = torch.arange(k.shape[2], device=q.device)
        live = key <= at
        if window:
            live = live & (key > at - window)
        scores = (q @ k.transpose(-1, -2)) * scale
        return torch.softmax(scores.masked_fill(~live, torch.finfo(q.dtype).min), -1) @ v


class _Untouched(PlaneHandle):
    """Keys or values that only attention may read: a graph has no other way to them."""

    __slots__ = ()

    def dequantize(self) -> Tensor:
        raise ModelError(
            "the model reads keys or values itself", where=self.layer.name, fix="lamp_compile.compile(model) in torch"
        )


class _GraphCache(Cache):  # type: ignore[misc]
    """Layers of a graph being recorded, as a transformers forward takes them."""

    def __init__(self, layers: list[Any]) -> None:
        super().__init__(layers=layers)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """No keys: the mask function makes no mask (``attention.lamp_mask``)."""
        return 0, 0

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Of use for masks only."""
        return 0

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """To the layer, without a cache's bookkeeping."""
        return self.layers[layer_idx].update(key_states, value_states)


class DecoderGraph(nn.Module):
    """``forward(input_ids [B, n], positions [B], *cache)`` -> ``(logits [B, n, V], *cache)``.

    ``cache`` lists for each layer in turn its planes, state and stats, or its float keys and values
    (``cache_names``). Where the model can tell which tokens' logits are wanted, their numbers ``[kept]`` within the new
    ones come before it, and logits are ``[B, kept, V]``.

    Attributes:
        chooses_logits: Whether it can.

    Args:
        fast: A transformers decoder from ``lamp_compile.compile``.

    Raises:
        ModelError: An attention needs more than positions, causality and a window, or reads its cache itself.
    """

    def __init__(self, fast: nn.Module) -> None:
        super().__init__()
        lamp = fast.lamp
        assert isinstance(lamp, Lamp)
        self.model = structural_copy(lamp.original)
        self.model.set_attn_implementation(attention.NAME)  # type: ignore[operator]
        if getattr(self.model, "_can_set_experts_implementation", lambda: False)():
            # The grouped product of the default has no ONNX operator; this one gathers weights and multiplies.
            self.model.set_experts_implementation("batched_mm")  # type: ignore[operator]
        taken = inspect.signature(self.model.forward).parameters
        self.chooses_logits, self.cache = "logits_to_keep" in taken, cache_argument.name_for(self.model)
        if "position_ids" not in taken:
            raise ModelError(
                "its forward takes no position_ids",
                where=type(lamp.original).__name__,
                fix="torch.export of the model with fixed positions, and export_onnx of that module",
            )
        self.sites = {site.layer: site for site in lamp.sites}
        config: Any = lamp.original.config
        text = config.get_text_config(decoder=True)
        self.layers: list[PlaneLayer | FloatRows] = []
        for index, spec in enumerate(lamp.spec.layers):
            self.layers.append(self._layer(index, spec, text))

    def _layer(self, index: int, spec: LayerSpec | None, text: Any) -> PlaneLayer | FloatRows:
        site = self.sites.get(index)
        if site is None:
            raise ModelError(
                "a cache layer that no attention uses", where=f"layer {index}", fix="lamp_compile.compile in torch"
            )
        masked = why_masked(site, text)
        if masked or (site.reason and "head_dim" not in site.reason):
            raise ModelError(
                masked or site.reason, where=site.name, fix="lamp_compile.compile(model), which takes any mask"
            )
        if spec is None:
            return FloatRows(site.name)
        check_row(spec.plan)
        for name in HOT:
            self.register_buffer(f"lamp_{index}_{name}", getattr(spec.controls, name).clone())
        if spec.balance is not None:
            self.register_buffer(f"lamp_{index}_balance", spec.balance)
        return PlaneLayer(spec)

    def cache_names(self) -> list[str]:
        """Names of the cache's tensors, in the order of ``forward``: ``0.k_high`` and so on."""
        return [f"{index}.{name}" for index, layer in enumerate(self.layers) for name in layer.names]

    def empty_cache(self, batch: int, capacity: int) -> list[Tensor]:
        """Zeros for every tensor of ``cache_names``; ``capacity`` is rounded up to whole storage tiles."""
        made: list[Tensor] = []
        for index, layer in enumerate(self.layers):
            site = self.sites[index]
            if isinstance(layer, FloatRows):
                made += [
                    torch.zeros(batch, site.kv_heads, capacity, dim, dtype=site.dtype)
                    for dim in (site.head_dim, site.value_dim)
                ]
                continue
            made += _empty_planes(layer.spec.plan.tile, site, batch, capacity)
        return made

    def forward(self, input_ids: Tensor, positions: Tensor, *cache: Tensor) -> tuple[Tensor, ...]:
        """One step: append the tokens, and give back their logits and the cache."""
        given = iter(cache)
        wanted = {"logits_to_keep": next(given)} if self.chooses_logits else {}
        rows = input_ids.shape[1]
        for index, layer in enumerate(self.layers):
            layer.tensors = {name: next(given) for name in layer.names}
            layer.positions, layer.lengths = positions, positions + rows
            if isinstance(layer, PlaneLayer):
                layer.hot = tuple(getattr(self, f"lamp_{index}_{name}") for name in HOT)
                layer.balance = getattr(self, f"lamp_{index}_balance", None)
        places = positions[:, None] + torch.arange(rows, device=input_ids.device)
        held = _GraphCache(list(self.layers))
        logits = self.model(
            input_ids=input_ids, position_ids=places, use_cache=True, return_dict=True, **{self.cache: held}, **wanted
        ).logits
        return (logits, *(layer.tensors[name] for layer in self.layers for name in layer.names))


def _empty_planes(tile: int, site: ProbedSite, batch: int, capacity: int) -> list[Tensor]:
    tiles = -(-capacity // tile)
    lead = (batch, site.kv_heads, tiles)
    keys = [torch.zeros(*lead, tile, site.head_dim // 2, dtype=torch.uint8) for _ in range(2)]
    values = [torch.zeros(*lead, site.value_dim // 2, tile, dtype=torch.uint8) for _ in range(2)]
    scales = [torch.zeros(batch, site.kv_heads, tiles * tile, dtype=torch.float16) for _ in range(2)]
    return [*keys, scales[0], *values, scales[1], guard.new_state(batch, site.kv_heads), guard.new_stats(*lead[:2])]


def _refuse_mask(site: str, mask: Tensor | None, bias: Tensor | None) -> None:
    if mask is not None or bias is not None:
        raise ModelError("the model brings a mask of its own", where=site, fix="lamp_compile.compile(model) in torch")
