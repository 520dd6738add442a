"""Prompts into an empty cache: the keys and values that attention needs are at hand as they came.

Reading planes back saves nothing then, and a prompt's many rows are bound by arithmetic, not bytes: torch's own flash
attention is several times faster than kernels made for a few rows over many keys. The planes are written all the same.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

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
MOST_MASK = 1 << 30
"""Entries of a mask; it becomes as many numbers of the model's type."""


def is_one(layer: NestedLayer, k: Tensor, v: Tensor, empty: bool) -> bool:
    """Whether attention over new rows ``[B, G, n, D]`` is to read them as they came. Not for graphs.

    Args:
        layer: Where they are stored.
        k: Keys.
        v: Values.
        empty: Nothing was held before them.
    """
    return (
        empty
        and k.shape[2] >= LEAST_ROWS
        and k.device.type in DEVICES
        and k.dtype in DTYPES
        and k.shape[3] == v.shape[3] <= MOST_DIM
        and k.shape[3] % 8 == 0
        and not layer.reference_only
        and shadow.current() is None
    )


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, sinks: Tensor | None,
    *, causal: str, window: int, scale: float, softcap: float,
) -> Tensor | None:  # fmt: skip
    """Attention of q ``[B, H, S, D]`` over keys and values ``[B, G, S, D]``; None where torch has no fast form of it.

    Args:
        q: Queries.
        k: Keys.
        v: Values.
        mask: Boolean, ``[B, 1, S, keys]`` with as many keys or more; a row that sees none gives 0.
        sinks: Logits in the softmax's denominator.
        causal: "" for none.
        window: Newest keys that a row sees; 0 for all.
        scale: On scores.
        softcap: On scores; 0 for none.
    """
    rows = q.shape[2]
    if sinks is not None or softcap or k.shape[2] != rows or (mask is None and 0 < window < rows):
        return None
    if mask is None:
        grouped = q.shape[1] != k.shape[1]
        out = functional.scaled_dot_product_attention(q, k, v, is_causal=bool(causal), scale=scale, enable_gqa=grouped)
        return inference_only(out, q)
    if mask.shape[1:3] != (1, rows) or mask.shape[3] < rows or mask.shape[0] * rows * rows > MOST_MASK:
        return None
    seen = mask[..., :rows]
    blind = ~seen.any(-1, keepdim=True)
    # The form that takes masks wants as many heads of keys as of queries.
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    out = functional.scaled_dot_product_attention(q, k, v, attn_mask=seen | blind, scale=scale)
    return inference_only(out.masked_fill(blind, 0.0), q)
