"""Prompts into an empty cache: the keys and values that attention needs are at hand as they came.

Reading planes back saves nothing then, and a prompt's many rows are bound by arithmetic, not bytes: torch's own flash
attention is several times faster than kernels made for a few rows over many keys. The planes are written all the same.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from lamp_compile.runtime import shadow
from lamp_compile.runtime.fused_ops import inference_only

if TYPE_CHECKING:
    from lamp_compile.runtime.cache_layers import NestedLayer

DEVICES = ("cuda",)
"""Where it is the faster way. A CPU's kernels take prompts as fast as torch does."""
DTYPES = (torch.bfloat16, torch.float16)
"""What flash attention takes; without it scores of all rows and keys would be laid out in memory."""
LEAST_ROWS = 128
"""Below this the kernels are as fast."""
MOST_DIM = 256


def is_one(layer: NestedLayer, k: Tensor, v: Tensor, empty: bool) -> bool:
    """Whether attention over new rows ``[B, G, n, D]`` is to read them as they came.

    Args:
        layer: Where they are stored.
        k: Keys.
        v: Values.
        empty: Nothing was held before them.
    """
    return (
        empty
        and not torch.compiler.is_compiling()
        and k.shape[2] >= LEAST_ROWS
        and k.device.type in DEVICES
        and k.dtype in DTYPES
        and k.shape[3] == v.shape[3] <= MOST_DIM
        and k.shape[3] % 8 == 0
        and not layer.reference_only
        and shadow.current() is None
    )


def attend(
    q: Tensor, k: Tensor, v: Tensor, *, causal: str, window: int, scale: float, softcap: float, sinks: Tensor | None
) -> Tensor | None:
    """Attention of q ``[B, H, S, D]`` over keys and values ``[B, G, S, D]``; None where flash attention has no such
    form."""
    rows = q.shape[2]
    if sinks is not None or softcap or 0 < window < rows or k.shape[2] != rows:
        return None
    options: dict[str, Any] = {"is_causal": bool(causal), "scale": scale, "enable_gqa": q.shape[1] != k.shape[1]}
    return inference_only(functional.scaled_dot_product_attention(q, k, v, **options), q)
