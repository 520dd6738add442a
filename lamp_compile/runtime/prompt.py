"""Prompts into an empty cache: the keys and values that attention needs are at hand as they came.

Reading planes back saves nothing then, and a prompt's many rows are bound by arithmetic, not bytes: torch's own flash
attention is several times faster than kernels made for a few rows over many keys. The planes are written all the same.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from lamp_compile.runtime.fused_ops import inference_only
from lamp_compile.runtime.kernels import cpu

if TYPE_CHECKING:
    from lamp_compile.runtime.cache_layers import NestedLayer

FAST_CPUS = ("avx512",)
"""Instruction sets whose kernels take prompts faster than torch does."""
DTYPES = {"cuda": (torch.bfloat16, torch.float16), "cpu": (torch.float32, torch.bfloat16, torch.float16)}
"""What flash attention takes; without it scores of all rows and keys would be laid out in memory."""
LEAST_ROWS = {"cuda": 128, "cpu": 8}
"""With fewer the kernels are as fast on a GPU, and a CPU has next to nothing to gain."""
MOST_DIM = 256
MOST_MASK = 1 << 30
"""Entries of a mask; it becomes as many numbers of the model's type."""
NOT_FAST = "torch has no fast attention for them on this GPU"
SLOWLY = "attentions of long prompts read the planes: "
"""How an event of the ledger begins that counts what did not go this way."""


def least_rows(device: torch.device) -> float:
    """Tokens from which on prompts on this device go this way; infinitely many where none do."""
    slower = device.type != "cpu" or cpu.instruction_set() not in FAST_CPUS
    return LEAST_ROWS.get(device.type, math.inf) if slower else math.inf


def is_one(layer: NestedLayer, k: Tensor, v: Tensor, empty: bool) -> bool:
    """Whether new rows ``[B, G, n, D]`` are a prompt that attention had better read as they came. Not for graphs.

    Args:
        layer: Where they are stored.
        k: Keys.
        v: Values.
        empty: Nothing was held before them.
    """
    return empty and k.shape[2] >= least_rows(k.device) and not layer.reference_only


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, sinks: Tensor | None, how: Mapping[str, Any]
) -> Tensor | str:
    """Attention of q ``[B, H, S, D]`` over keys and values ``[B, G, S, D]``, or why torch has no fast form of it.

    Args:
        q: Queries.
        k: Keys.
        v: Values.
        mask: Boolean, ``[B, 1, S, keys]`` with as many keys or more; a row that sees none gives 0.
        sinks: Logits in the softmax's denominator.
        how: ``causal`` ("" for none), ``window`` (newest keys that a row sees, 0 for all), ``scale`` and ``softcap`` (0
            for none).
    """
    rows, scale, window = q.shape[2], how["scale"], how["window"]
    if reason := _why_not(q, k, v, sinks, how):
        return reason
    if mask is None and not 0 < window < rows:
        causal, grouped = bool(how["causal"]), q.shape[1] != k.shape[1]
        if q.is_cuda and not _is_fast(q, k, v, None, causal, grouped):
            return NOT_FAST
        out = functional.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=grouped)
        return inference_only(out, q)
    batch = 1 if mask is None else mask.shape[0]
    if batch * rows * rows > MOST_MASK:
        return f"a mask of more than {MOST_MASK} entries"
    if mask is None:
        key = torch.arange(rows, device=q.device)
        mask = ((key <= key[:, None]) & (key > key[:, None] - window))[None, None]
    if mask.shape[1:3] != (1, rows) or mask.shape[3] < rows:
        return f"a mask of shape {tuple(mask.shape)}"
    seen = mask[..., :rows]
    blind = ~seen.any(-1, keepdim=True)
    # The form that takes masks wants as many heads of keys as of queries.
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    seen = seen | blind
    if q.is_cuda and not _is_fast(q, k, v, seen.expand(q.shape[0], q.shape[1], rows, rows), False, False):
        return NOT_FAST
    out = functional.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale)
    return inference_only(out.masked_fill(blind, 0.0), q)


def _why_not(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, how: Mapping[str, Any]) -> str:
    """Why these cannot go through torch's attention without all scores in memory, as far as shapes tell; or empty."""
    if q.dtype not in (taken := DTYPES.get(q.device.type, ())) or not q.dtype == k.dtype == v.dtype:
        words = [str(dtype).removeprefix("torch.") for dtype in (k.dtype, *taken)]
        return f"{words[0]}, and flash attention takes {', '.join(words[1:-1])} and {words[-1]}"
    if not k.shape[3] == v.shape[3] <= MOST_DIM or (q.is_cuda and k.shape[3] % 8):
        return f"head dimensions of {k.shape[3]} and {v.shape[3]}"
    if sinks is not None or how["softcap"]:
        return "sinks" if sinks is not None else "a soft-cap"
    return "" if q.shape[2] == k.shape[2] else f"{q.shape[2]} queries for {k.shape[2]} keys"


def _is_fast(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, grouped: bool) -> bool:
    """Whether torch has an attention for these on this GPU that does not lay out all scores in memory."""
    given = torch.backends.cuda.SDPAParams(q, k, v, mask, 0.0, causal, grouped)
    asked = (
        torch.backends.cuda.can_use_flash_attention,
        torch.backends.cuda.can_use_efficient_attention,
        torch.backends.cuda.can_use_cudnn_attention,
    )
    return any(can(given) for can in asked)
