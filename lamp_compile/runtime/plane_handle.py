"""What a cache layer hands to attention instead of keys or values: a name for its planes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lamp_compile.runtime import formats, layout, rotation

if TYPE_CHECKING:
    from lamp_compile.runtime.cache_layers import NestedLayer


class PlaneHandle:
    """Keys or values ``[B, G, capacity, D]`` of one cache layer, as planes.

    The registered attention function reads the planes. Model code that touches keys or values itself gets them
    dequantised (and then pays for a float copy); that is why there is no ``__getattr__``, which would hide such a use
    and which Dynamo cannot trace.
    """

    __slots__ = ("dtype", "fresh", "layer", "values")

    def __init__(self, layer: NestedLayer, values: bool, dtype: torch.dtype, fresh: Tensor | None = None) -> None:
        self.layer = layer
        self.values = values
        self.dtype = dtype
        self.fresh = fresh
        """The rows as they came ``[B, G, n, D]``, where they are all there is and attention may read them."""

    @property
    def shape(self) -> torch.Size:
        """``[B, G, capacity, D]``."""
        layer = self.layer
        dim = layer.v_head_dim if self.values else layer.k_head_dim
        return torch.Size((layer.batch_size, layer.num_heads, layer.max_cache_len, dim))

    @property
    def device(self) -> torch.device:
        """Where the planes live."""
        return self.layer.k_high.device

    def dequantize(self) -> Tensor:
        """The stored numbers at full precision, ``[B, G, capacity, D]``; what is beyond the sequence's length is zero
        or stale."""
        layer, plan = self.layer, self.layer.plan
        if self.values:
            rows = (layout.value_rows(layer.v_high), layout.value_rows(layer.v_residual), layer.v_scale)
            stored = formats.get(plan.v_format).dequantize(*rows)
            return rotation.unrotate(stored, plan.rotation).to(self.dtype)
        rows = (layout.key_rows(layer.k_high), layout.key_rows(layer.k_residual), layer.k_scale)
        stored = rotation.unrotate(formats.get(plan.k_format).dequantize(*rows), plan.rotation)
        if layer.balance is not None:
            stored = stored * layer.balance[:, None, :]
        return stored.to(self.dtype)

    def expand(self, *sizes: int) -> Tensor:
        """As of the dequantised tensor."""
        return self.dequantize().expand(*sizes)

    def transpose(self, first: int, second: int) -> Tensor:
        """As of the dequantised tensor."""
        return self.dequantize().transpose(first, second)

    def __getitem__(self, index: Any) -> Tensor:
        return self.dequantize()[index]

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        def plain(x: Any) -> Any:
            if isinstance(x, list | tuple):
                return type(x)(plain(item) for item in x)
            return x.dequantize() if isinstance(x, PlaneHandle) else x

        return func(*(plain(x) for x in args), **{name: plain(x) for name, x in (kwargs or {}).items()})
