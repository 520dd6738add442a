"""Kernels for the operators that write in place, and when they apply. Importing this loads no Triton.

``append`` and ``attend`` are what ``runtime/fused_ops.py`` calls; everything they cannot do stays with the reference,
and ``why_not`` says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

RULES = ("energy", "lamp_strict", "lamp_relaxed")
FORMAT = "nested8"
SUBTILES = (32, 64, 128)
LARGEST_DIM = 256


_TRITON = find_spec("triton") is not None


def why_not_device(kind: str) -> str | None:
    """Why no kernel runs on a type of device, or None."""
    if kind != "cuda":
        return f"kernels run on CUDA and ROCm devices, this is {kind}"
    if not _TRITON:
        return "triton is not installed"
    return None


def why_not_store(planes: tuple[Tensor, ...], k_format: str, v_format: str) -> str | None:
    """Why rows cannot be appended to these planes by a kernel, or None."""
    if reason := why_not_device(planes[0].device.type):
        return reason
    if (k_format, v_format) != (FORMAT, FORMAT):
        return f"kernels store {FORMAT}, this is {k_format} and {v_format}"
    widest = 2 * max(planes[0].shape[4], planes[3].shape[3])
    if widest > LARGEST_DIM:
        return f"a head dimension of {widest}; kernels go up to {LARGEST_DIM}"
    if not all(plane.is_contiguous() for plane in planes):
        return "planes that are not contiguous"
    return None


def why_not_attend(q: Tensor, planes: tuple[Tensor, ...], state: Tensor, options: Mapping[str, Any]) -> str | None:
    """Why attention over these planes cannot run as one kernel, or None. ``options`` as of ``lamp::fused_attention``."""
    if reason := why_not_store(planes, options["k_format"], options["v_format"]):
        return reason
    if options["rule"] not in RULES:
        return f"rule {options['rule']!r} needs all sub-tiles in order; kernels know {', '.join(RULES)}"
    if options["query_bits"] != 8:
        return f"query_bits {options['query_bits']}: kernels multiply int8 queries"
    if options["subtile"] not in SUBTILES:
        return f"subtile {options['subtile']}; kernels decide on {', '.join(map(str, SUBTILES))} keys"
    if state.shape[0] != q.shape[0]:
        return "a guard state that sequences share"
    if q.dtype.itemsize == 8:
        return "float64 queries"
    return None


def prepare(device: torch.device, rotation: str, *dims: int) -> None:
    """Make what kernels keep for these head dimensions, on a device that they run on. Made at the first call instead,
    it would lie in a CUDA graph's private memory."""
    if rotation != "none" and why_not_device(device.type) is None:
        from lamp_compile.runtime.kernels._tensors import signs

        for dim in dims:
            signs(dim, device)


def append(
    k: Tensor, v: Tensor, planes: tuple[Tensor, ...], balance: Tensor | None, positions: Tensor,
    table: Tensor | None, rotation: str,
) -> None:  # fmt: skip
    """``lamp::append`` by kernel; the caller has asked ``why_not_store``."""
    from lamp_compile.runtime.kernels import append_rows as kernel

    kernel.append(k, v, planes, balance, positions, table, rotation)


def attend(
    q: Tensor, planes: tuple[Tensor, ...], hot: tuple[Tensor, ...], balance: Tensor | None,
    seen: tuple[Tensor | None, ...], options: Mapping[str, Any],
) -> Tensor:  # fmt: skip
    """``lamp::fused_attention`` by kernels; the caller has asked ``why_not_attend``. The guard's state and statistics
    in ``hot`` are written in place."""
    from lamp_compile.runtime.kernels import decode

    return decode.decode(q, planes, hot, balance, seen, options).out
