"""The attention and mask functions that transformers calls under the name ``"lamp"``.

Both names must be registered: a model whose attention name has no mask function gets no mask at all.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import and_masks, causal_mask_function, sdpa_mask, sliding_window_overlay

from lamp_compile.errors import InputError
from lamp_compile.runtime import prompt
from lamp_compile.runtime.kv_cache import Unmasked
from lamp_compile.runtime.plane_handle import PlaneHandle

NAME = "lamp"
SPECIAL = ("softcap", "s_aux", "position_bias")
"""Arguments that only a model file's own eager attention handles."""

Observer = Callable[[nn.Module, Tensor, Any, Any, dict[str, Any]], None]
_observer: ContextVar[Observer | None] = ContextVar("lamp_observer", default=None)


@contextmanager
def observing(observer: Observer) -> Iterator[None]:
    """Within the block, ``observer(module, q, k, v, arguments)`` sees every call of the attention function."""
    token = _observer.set(observer)
    try:
        yield
    finally:
        _observer.reset(token)


def lamp_attention(
    module: nn.Module,
    query: Tensor,
    key: Any,
    value: Any,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention for transformers: query ``[B, H, S, D]`` and two plane handles, or plain keys and values.

    Returns:
        Output ``[B, S, H, Dv]`` and None, or what the original attention returns for plain keys and values.

    Raises:
        InputError: The mask has a shape that attention cannot read.
    """
    if not torch.compiler.is_compiling() and (observer := _observer.get()) is not None:
        observer(module, query, key, value, {"scaling": scaling, "mask": attention_mask, **kwargs})
    if not isinstance(key, PlaneHandle):
        return original_attention(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    mask = bias = None
    if attention_mask is not None:
        if attention_mask.dim() != 4:
            raise InputError(
                f"a mask of shape {tuple(attention_mask.shape)}",
                where=key.layer.name,
                fix="[batch, 1 or heads, queries, keys], boolean or additive, or the model's usual 2-D mask",
            )
        attention_mask = _over_capacity(attention_mask, key.layer)
        mask, bias = (attention_mask, None) if attention_mask.dtype == torch.bool else (None, attention_mask)
    causal = ""
    if attention_mask is None:
        wanted = kwargs.get("is_causal")
        causal = "bottom_right" if (getattr(module, "is_causal", True) if wanted is None else wanted) else ""
    how: dict[str, Any] = {
        "causal": causal,
        "window": int(kwargs.get("sliding_window") or 0) if causal else 0,
        "scale": query.shape[-1] ** -0.5 if scaling is None else scaling,
        "softcap": float(kwargs.get("softcap") or 0.0),
    }
    out = _as_they_came(query, key, value, (mask, bias, kwargs.get("s_aux")), how)
    if out is None:
        out = key.layer.attend(query, mask, bias, kwargs.get("s_aux"), **how)
    return out.transpose(1, 2).contiguous(), None


def _as_they_came(
    query: Tensor, key: PlaneHandle, value: PlaneHandle, seen: tuple[Tensor | None, ...], how: dict[str, Any]
) -> Tensor | None:
    """Attention of a long prompt over the rows that were just stored; None where planes are to be read, which is
    counted for a prompt. ``seen``: mask, bias, sinks."""
    if key.fresh is None or value.fresh is None:
        return None
    mask, bias, sinks = seen
    found: Tensor | str = "an additive bias"
    if bias is None:
        found = prompt.attend(query, key.fresh, value.fresh, mask, sinks, how)
    if isinstance(found, Tensor):
        return found
    key.layer.spec.ledger.events[prompt.SLOWLY + found] += 1
    return None


def _over_capacity(mask: Tensor, layer: Any) -> Tensor:
    """A caller's own 4-D mask may end with the tokens held; the planes go on, and what lies behind is nobody's."""
    missing = layer.max_cache_len - mask.shape[-1]
    if missing == 0 or mask.shape[-1] == 1:
        return mask
    held = None if torch.compiler.is_compiling() else int(layer.cumulative_length)
    if missing < 0 or mask.shape[-1] != held:
        raise InputError(
            f"a mask over {mask.shape[-1]} keys",
            where=layer.name,
            fix=f"one column for each of the {held} tokens held" if held else "a mask as wide as the cache's capacity",
        )
    return nn.functional.pad(mask, (0, missing), value=False if mask.dtype == torch.bool else -torch.inf)


def original_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """What the model does without LAMP: SDPA, or the model file's own eager attention where SDPA would drop
    something."""
    if all(kwargs.get(name) is None for name in SPECIAL):
        sdpa: tuple[Tensor, Tensor | None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return sdpa
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if eager is None:
        named = [name for name in SPECIAL if kwargs.get(name) is not None]
        raise InputError(
            f"this attention takes {', '.join(named)} and its file has no eager_attention_forward",
            where=type(module).__qualname__,
            fix="use the model uncompiled",
        )
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        zero = torch.zeros((), dtype=query.dtype, device=query.device)
        attention_mask = torch.where(attention_mask, zero, torch.finfo(query.dtype).min)
    eager_out: tuple[Tensor, Tensor | None] = eager(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
    )
    return eager_out


def lamp_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """The boolean mask ``[B, 1, S, keys]``, spelled out because the planes are longer than the queries; None where it
    would have no keys (``SlotCache``, ``NestedCache.unpadded``): lengths, causality and window say it all.

    Raises:
        InputError: Slots would need a mask: padding, or a model's own pattern over its causal mask.
    """
    keys = kwargs.get("kv_length")
    if isinstance(keys, Unmasked):
        if _is_plain(kwargs):
            return None
        kwargs["kv_length"] = int(keys)
    elif keys == 0:
        _refuse_mask_of_slots(kwargs)
        return None
    kwargs["allow_is_causal_skip"] = False
    mask: Tensor | None = sdpa_mask(*args, **kwargs)
    return mask


def _is_plain(kwargs: dict[str, Any]) -> bool:
    """Whether the mask that is asked for is causality, and a window at most."""
    asked = kwargs.get("mask_function")
    if kwargs.get("use_vmap"):
        return False
    if torch.compiler.is_compiling():  # a graph cannot look into functions; the step before it, outside, has
        return kwargs.get("local_size") is not None or asked is causal_mask_function
    return all(part is causal_mask_function or _named(part, _WINDOW) for part in _parts(asked))


_WINDOW, _BOTH = sliding_window_overlay(1).__qualname__, and_masks(causal_mask_function).__qualname__


def _parts(function: Any) -> Iterator[Any]:
    """The functions that transformers joined with ``and_masks``; itself otherwise."""
    if not _named(function, _BOTH):
        yield function
        return
    for cell in function.__closure__:
        for part in cell.cell_contents:
            yield from _parts(part)


def _named(function: Any, name: str) -> bool:
    own = getattr(function, "__module__", None) == causal_mask_function.__module__
    return own and getattr(function, "__qualname__", "") == name


def _refuse_mask_of_slots(kwargs: dict[str, Any]) -> None:
    padding = kwargs.get("attention_mask")
    if padding is not None and (torch.compiler.is_compiling() or not bool(padding.all())):
        raise InputError(
            "a padding mask came with a cache that takes none",
            where="attention_mask",
            fix="leave it out: a slot holds its own tokens only, and generate without padding makes no masks",
        )
    if not _is_plain(kwargs):
        raise InputError(
            "the model lays a pattern of its own over the causal mask",
            where="a cache that takes no mask",
            fix="fast.lamp.cache() and generate, which take any mask",
        )


AttentionInterface.register(NAME, lamp_attention)
AttentionMaskInterface.register(NAME, lamp_mask)
