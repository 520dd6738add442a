"""Kernels for the operators that write in place, and when they apply. Importing this loads no Triton.

``append`` and ``attend`` are what ``runtime/fused_ops.py`` calls; everything they cannot do stays with the reference,
and ``why_not`` says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from lamp_compile.runtime import layout
from lamp_compile.runtime.kernels import cpu

RULES = ("energy", "lamp_strict", "lamp_relaxed")
FORMAT = "nested8"
SUBTILES = (32, 64, 128)
LARGEST_DIM = 256


SPANS = (4, 8, 16, 32)
"""Keys per summary of a look-ahead network that Triton's kernels take."""
MOST_RANK = 64
"""And numbers per summary."""
MOST_HEADS = 65535
"""Sequences times kv heads: one axis of a grid."""
OLDEST = (8, 0)
"""Compute capability of the oldest NVIDIA GPU that kernels are compiled for."""
ROCM = ("gfx942", "gfx950")

_TRITON = find_spec("triton") is not None
_refused: dict[torch.device, str] = {}


def why_not_device(kind: str) -> str | None:
    """Why no kernel runs on a type of device, or None."""
    if kind == "cpu":
        reason: str | None = cpu.why_not()
        return reason
    if kind != "cuda":
        return f"kernels run on CUDA and ROCm devices and on CPUs, this is {kind}"
    if not _TRITON:
        return "triton is not installed"
    return None


def why_not_model(device: torch.device) -> str | None:
    """Why no kernel runs on this very GPU, or None. Asks the driver: not for graphs."""
    if reason := why_not_device(device.type):
        return reason
    if device.type != "cuda":
        return None
    found: Any = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        name = str(found.gcnArchName).split(":")[0]
        return None if name in ROCM else f"kernels are compiled for {' and '.join(ROCM)}, this is {name}"
    if (found.major, found.minor) < OLDEST:
        return f"kernels need compute capability {OLDEST[0]}.{OLDEST[1]}, this is {found.major}.{found.minor}"
    return None


def why_not_store(
    planes: tuple[Tensor, ...], k_format: str, v_format: str, dtype: torch.dtype = torch.float32
) -> str | None:
    """Why rows of that dtype cannot be appended to these planes by a kernel, or None."""
    if reason := why_not_device(planes[0].device.type):
        return reason
    if planes[0].device in _refused:
        return _refused[planes[0].device]
    if dtype == torch.float64:
        return "float64 keys"
    if (k_format, v_format) != (FORMAT, FORMAT):
        return f"kernels store {FORMAT}, this is {k_format} and {v_format}"
    if {planes[0].dim(), planes[3].dim()} - {5, 6}:
        return "planes of other than five or six dimensions"
    if reason := _why_not_lanes(planes):
        return reason
    tile, half_k, half_v = layout.tile_of(planes[0]), layout.key_width(planes[0]), layout.value_width(planes[3])
    widest = 2 * max(half_k, half_v)
    if widest > LARGEST_DIM:
        return f"a head dimension of {widest}; kernels go up to {LARGEST_DIM}"
    if not all(plane.is_contiguous() for plane in planes):
        return "planes that are not contiguous"
    if planes[0].device.type == "cpu" and (half_k % 2 or half_v % 2 or tile % 32):
        return "CPU kernels take head dimensions that are multiples of 4, and storage tiles of 32 keys"
    return None


def why_not_attend(q: Tensor, planes: tuple[Tensor, ...], state: Tensor, options: Mapping[str, Any]) -> str | None:
    """Why attention over these planes cannot run as one kernel, or None. ``options``: of ``lamp::fused_attention``."""
    if reason := why_not_store(planes, options["k_format"], options["v_format"]):
        return reason
    if options["rule"] not in RULES:
        return f"rule {options['rule']!r} needs all sub-tiles in order; kernels know {', '.join(RULES)}"
    if options["query_bits"] != 8:
        return f"query_bits {options['query_bits']}: kernels multiply int8 queries"
    if options["subtile"] not in SUBTILES:
        return f"subtile {options['subtile']}; kernels decide on {', '.join(map(str, SUBTILES))} keys"
    if (tile := layout.tile_of(planes[0])) % options["subtile"]:
        return f"sub-tiles of {options['subtile']} keys in storage tiles of {tile}"
    if state.shape[0] != q.shape[0]:
        return "a guard state that sequences share"
    if not state.is_contiguous() or state.dtype != torch.float32:
        return "a guard state that is not contiguous float32"
    if q.device.type != "cpu" and q.shape[0] * planes[0].shape[1] > MOST_HEADS:
        return f"more than {MOST_HEADS} sequences times kv heads"
    if q.dtype == torch.float64:
        return "float64 queries"
    if q.device.type == "cpu" and q.shape[1] > cpu.MOST_GROUP * planes[0].shape[1]:
        return f"{q.shape[1] // planes[0].shape[1]} query heads to a kv head; CPU kernels take {cpu.MOST_GROUP}"
    return None


def why_not_predicted(
    q: Tensor, planes: tuple[Tensor, ...], kept: tuple[Tensor, ...], options: Mapping[str, Any]
) -> str | None:
    """Why a step that a network predicts cannot run as one kernel over planes that ``why_not_attend`` has nothing
    against, or None.

    Args:
        q: ``[B, H, S, D]``.
        planes: Six of them.
        kept: Summaries ``[B, G, N / group, R]``, history ``[B, G, T, 2]``, trust ``[B, G, 7]``.
        options: Of ``lamp::fused_predicted``.
    """
    summary, history, trust = kept
    if q.shape[2] != 1:
        return f"{q.shape[2]} new tokens; kernels predict for one"
    if options["rule"] != "energy":
        return f"rule {options['rule']!r}: networks predict what 'energy' asks"
    # Sizes of a graph may be symbols that this must not pin down: keys of a page over summaries of a page.
    group = layout.tile_of(planes[0]) * options["pages"] // summary.shape[2]
    groups, most = _summaries(q.device)
    if group not in groups:
        return f"summaries of {group} keys; kernels take {', '.join(map(str, groups))}"
    if summary.shape[3] > most:
        return f"rank {summary.shape[3]}; kernels go up to {most}"
    wanted = ((summary, torch.float16), (history, torch.float32), (trust, torch.float32))
    if not all(x.is_contiguous() and x.dtype == dtype for x, dtype in wanted):
        return "summaries, history or trust that are not contiguous float16 and float32"
    return None


def target_name(device: torch.device) -> str:
    """What ``Plan.launch`` calls this device ("sm_90"); empty where no kernel runs."""
    if device.type == "cpu" or why_not_model(device) is not None:
        return ""
    from lamp_compile.runtime.kernels.targets import target_of

    return target_of(device).name


def prepare(device: torch.device, rotation: str, *dims: int) -> None:
    """Make what kernels keep for these head dimensions, on a device that they run on. Made at the first call instead,
    it would lie in a CUDA graph's private memory. Also where it is found out that this very GPU is not served."""
    if reason := why_not_model(device):
        if why_not_device(device.type) is None:
            _refused[device] = reason
        return
    if rotation != "none" and device.type != "cpu":
        from lamp_compile.runtime.kernels._tensors import signs

        for dim in dims:
            signs(dim, device)


def append(
    k: Tensor, v: Tensor, planes: tuple[Tensor, ...], balance: Tensor | None, positions: Tensor,
    table: Tensor | None, rotation: str,
) -> None:  # fmt: skip
    """``lamp::append`` by kernel; the caller has asked ``why_not_store``."""
    if k.device.type == "cpu":
        cpu.append(k, v, planes, balance, positions, table, rotation)
        return
    from lamp_compile.runtime.kernels import append_rows as kernel

    with _on(k.device):
        kernel.append(k, v, planes, balance, positions, table, rotation)


def attend(
    q: Tensor, planes: tuple[Tensor, ...], hot: tuple[Tensor, ...], balance: Tensor | None,
    seen: tuple[Tensor | None, ...], options: Mapping[str, Any],
) -> Tensor:  # fmt: skip
    """``lamp::fused_attention`` by kernels; the caller has asked ``why_not_attend``. The guard's state and statistics
    in ``hot`` are written in place."""
    if q.device.type == "cpu":
        return cpu.attend(q, planes, hot, balance, seen, options).out
    from lamp_compile.runtime.kernels import decode

    with _on(q.device):
        return decode.decode(q, planes, hot, balance, seen, options).out


def attend_predicted(
    q: Tensor, planes: tuple[Tensor, ...], hot: tuple[Tensor, ...], seen: tuple[Tensor | None, ...],
    kept: tuple[Tensor, ...], weights: tuple[Tensor, ...], options: Mapping[str, Any],
) -> Tensor:  # fmt: skip
    """``lamp::fused_predicted`` by kernel; the caller has asked ``why_not_attend`` and ``why_not_predicted``. What of
    ``hot`` and ``kept`` changes is written in place.

    Args:
        q: ``[B, H, 1, D]``.
        planes: Six of them.
        hot: tau, floor, budget, state, stats.
        seen: balance, mask, bias, sinks, start, lengths, block table.
        kept: Summaries, history, trust.
        weights: query, query_bias, age, extra, limit, margin of the gate.
        options: Of ``lamp::fused_predicted``.
    """
    if q.device.type == "cpu":
        return cpu.attend(q, planes, hot, seen[0], seen[1:], options, predicted=(kept, weights)).out
    from lamp_compile.runtime.kernels.decode_predicted import Gate, decode_predicted

    with _on(q.device):
        return decode_predicted(q, planes, hot, seen[0], seen[1:], Gate(*kept, *weights), options).out


def summarize(
    keys: tuple[Tensor, ...], summary: Tensor, weights: tuple[Tensor, Tensor], positions: Tensor,
    table: Tensor | None, group: int,
) -> None:  # fmt: skip
    """``lamp::summarize`` by kernel; the caller has asked ``why_not_summarize``. ``keys`` are three planes, ``weights``
    the gate's key and key_bias."""
    if summary.device.type == "cpu":
        return cpu.summarize(keys, summary, *weights, positions, table, group)
    from lamp_compile.runtime.kernels import summarize_row as kernel

    with _on(summary.device):
        kernel.summarize(keys, summary, *weights, positions, table, group)
    return None


def why_not_summarize(planes: tuple[Tensor, ...], summary: Tensor, rows: int, group: int, k_format: str) -> str | None:
    """Why summaries of new keys cannot be made by a kernel, or None. ``planes`` are those of the keys."""
    if rows != 1:
        return "kernels summarise one new key"
    if reason := why_not_device(planes[0].device.type) or _refused.get(planes[0].device):
        return reason
    if reason := _why_not_lanes(planes):
        return reason
    if k_format != FORMAT or 2 * layout.key_width(planes[0]) > LARGEST_DIM or layout.tile_of(planes[0]) % 32:
        return f"kernels summarise {FORMAT} of up to {LARGEST_DIM} channels, in tiles of 32 keys"
    groups, most = _summaries(planes[0].device)
    if group not in groups or summary.shape[-1] > most or summary.dtype != torch.float16:
        return f"kernels make float16 summaries of {groups} keys, of rank {most} at most"
    if not all(x.is_contiguous() for x in (*planes, summary)):
        return "planes or summaries that are not contiguous"
    return None


def _why_not_lanes(planes: tuple[Tensor, ...]) -> str | None:
    """Why planes cannot be read in the order that their bytes lie in, or None."""
    if planes[0].device.type != "cpu" and any(map(layout.by_lanes, planes)):
        return "planes by lanes; kernels for GPUs read them by rows"
    return None


def _summaries(device: torch.device) -> tuple[tuple[int, ...], int]:
    """Keys per summary, and the largest rank, that kernels take."""
    return (cpu.GROUPS, cpu.MOST_RANK) if device.type == "cpu" else (SPANS, MOST_RANK)


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device, whatever the tensors are on."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
