"""What comes behind the look-ahead in one launch: ``cuda/finish.cu``, compiled when it is first needed.

Where kv heads are few, ``decide``, ``refine``, ``merge`` and ``guard_step`` spend most of their time waiting for each
other. There some blocks do all of that for one kv head. What these cannot do stays with those launches.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, fields
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lamp_compile.runtime.kernels import nvrtc
from lamp_compile.runtime.kernels._tensors import per_head_step, power_of_two

if TYPE_CHECKING:
    from lamp_compile.runtime.kernels.decode import Call, Results, Scratch

THREADS = 256
"""Of a block."""
KEYS = 32
"""Of a sub-tile."""
ROWS, SUMS = 4, 9
"""Query heads to a kv head at most, and numbers that are summed of each."""
HALVES = (32, 64)
"""Half the channels of keys and of values."""
MOST_ROUNDS, MOST_TILES = 32, 7168
"""Sub-tiles that one thread decides for, and all of a sequence, at most."""
MOST_SPLITS, MOST_JOINED = 128, 12
"""Splits of the look-ahead, and those that one block joins, at most."""
MOST_BLOCKS = 16
LEAST_SUBTILES = 64
"""To one block, where there are as many."""
REALS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
WHOLES = {torch.int32: 0, torch.int64: 1}

_POINTERS = (
    "q8", "rowinfo", "k_high", "k_low", "k_scale", "v_high", "v_low", "v_scale", "partial", "meta", "energy", "peak",
    "left", "sinks", "start", "lengths", "out", "lse", "certificate", "state", "stats", "floor", "budget",
)  # fmt: skip
_REAL = ("scale", "root", "softcap", "hysteresis")
_WHOLE = (
    "blocks", "per_block", "rotates", "kv_heads", "keys", "subtiles", "slots", "splits", "window", "hold",
    "start_step", "length_step", "floor_step", "budget_step", "start_wide", "length_wide", "attention_window", "causal",
    "sink_kind", "out_kind",
)  # fmt: skip


class Arguments(ctypes.Structure):
    """``struct Finish`` of ``cuda/arguments.h``."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in _POINTERS), ("plane_keys", ctypes.c_longlong),
        *((name, ctypes.c_float) for name in _REAL), *((name, ctypes.c_int) for name in _WHOLE),
    )  # fmt: skip


@dataclass(frozen=True)
class Constants:
    """What ``cuda/finish.cu`` is compiled with."""

    threads: int
    group: int
    half_k: int
    half_v: int
    tile: int

    @cached_property
    def shared(self) -> int:
        """Bytes of shared memory of a block: ``Shared`` in ``cuda/shared.h``, or a little more."""
        warps, width, rows = self.threads // 32, 2 * self.half_v, power_of_two(self.group)
        tile = 2 * KEYS * (self.half_k + self.half_v) + 4 * KEYS
        per_warp = 12 * KEYS + 4 * ROWS * (4 + SUMS) + 4 * 32
        return (
            warps * tile + max(4 * MOST_TILES * rows, warps * tile)
            + max(4 * MOST_JOINED * rows * width, 4 * warps * ROWS * (width + 8))
            + warps * per_warp + 4 * ROWS * (MOST_SPLITS + MOST_JOINED + SUMS + 3) + 2 * MOST_TILES + 256
        )  # fmt: skip

    @cached_property
    def defines(self) -> nvrtc.Defines:
        return (
            *((f.name.upper(), getattr(self, f.name)) for f in fields(self)), ("SHARED", self.shared),
            ("MOST_TILES", MOST_TILES), ("MOST_SPLITS", MOST_SPLITS), ("MOST_JOINED", MOST_JOINED),
            ("MOST_BLOCKS", MOST_BLOCKS),
        )  # fmt: skip


def constants_of(call: Call) -> Constants:
    k_high, v_high = call.planes[0], call.planes[3]
    group = call.q.shape[1] // k_high.shape[1]
    return Constants(THREADS, group, k_high.shape[4], v_high.shape[3], k_high.shape[3])


def blocks_of(call: Call) -> int:
    """Blocks that share one sequence and kv head: as many as run at once, where these can join all splits."""
    room = call.target.processors // max(1, call.heads), call.cut.subtiles // LEAST_SUBTILES
    return min(MOST_BLOCKS, max(1, -(-call.cut.splits // MOST_JOINED), min(room)))


def why_not(call: Call) -> str | None:
    """Why these launches stay apart, or None. Of what is asked for the first time here the kernel is compiled."""
    if reason := _why_not(call) or nvrtc.why_not(call.q.device):
        return reason
    constants = constants_of(call)
    if constants.shared > call.target.shared:
        return f"{constants.shared} bytes of shared memory; this GPU has {call.target.shared}"
    return nvrtc.why_not_compiled("finish", constants.defines, call.q.device)


def _why_not(call: Call) -> str | None:
    """What of a call it cannot do, or is not faster at, on any GPU."""
    cut, planes = call.cut, call.planes
    mask, bias, sinks, start, lengths, table = call.seen
    if call.heads > cut.launch.most_finished:
        return f"{call.heads} kv heads; the plan has one launch for up to {cut.launch.most_finished}"
    if call.q.shape[2] != 1 or cut.rows > ROWS:
        return f"{call.q.shape[2]} new tokens and {cut.rows} rows; it takes one and {ROWS}"
    if call.options["subtile"] != KEYS or call.options["rule"] != "energy":
        return f"sub-tiles of {call.options['subtile']} keys, rule {call.options['rule']!r}; it takes {KEYS}, 'energy'"
    if mask is not None or bias is not None or table is not None:
        return "a mask, a bias or pages"
    if planes[0].shape[4] not in HALVES or planes[3].shape[3] not in HALVES:
        return f"a head dimension other than {' or '.join(str(2 * half) for half in HALVES)}"
    if cut.subtiles > min(MOST_TILES, MOST_ROUNDS * THREADS):
        return f"{cut.subtiles} sub-tiles; it has room for {min(MOST_TILES, MOST_ROUNDS * THREADS)}"
    if cut.splits > min(MOST_SPLITS, MOST_JOINED * blocks_of(call)):
        return f"{cut.splits} splits of the look-ahead for {blocks_of(call)} blocks"
    if any(x is not None and x.dtype not in WHOLES for x in (start, lengths)) or call.q.dtype not in REALS:
        return "a type that it does not read"
    if any(setting.dtype != torch.float32 for setting in call.hot[1:3]):
        return "a floor or budget that is not float32"
    if sinks is not None and (sinks.dtype not in REALS or not sinks.is_contiguous()):
        return "sinks that it does not read"
    return None


def finish(call: Call, scratch: Scratch, results: Results) -> bool:
    """The launch; ``why_not`` has been asked. Whether the device took it: if not, nothing has been written."""
    constants, blocks = constants_of(call), blocks_of(call)
    numbers = call.heads * blocks * ROWS * (SUMS + 2 * constants.half_v)
    left = torch.empty(numbers, dtype=torch.float32, device=call.q.device)
    return nvrtc.launch(
        "finish", constants.defines, arguments_of(call, scratch, results, left),
        grid=(blocks, call.planes[0].shape[1], call.q.shape[0]), threads=constants.threads, shared=constants.shared,
        dependent=call.dependent()["PDL"], device=call.q.device,
    )  # fmt: skip


def arguments_of(call: Call, scratch: Scratch, results: Results, left: Tensor) -> Arguments:
    """Addresses and numbers. ``left``: room for what blocks leave."""
    _, _, sinks, start, lengths, _ = call.seen
    _, floor, budget, state, stats = call.hot
    names = ("k_high", "k_low", "k_scale", "v_high", "v_low", "v_scale")
    tensors: dict[str, Tensor | None] = {
        "q8": scratch.q8, "rowinfo": scratch.rowinfo, **dict(zip(names, call.planes, strict=True)),
        "partial": scratch.partial, "meta": scratch.meta, "energy": scratch.energy, "peak": scratch.peak, "left": left,
        "sinks": sinks, "start": start, "lengths": lengths, "out": results.out, "lse": results.lse,
        "certificate": results.certificate, "state": state, "stats": stats, "floor": floor, "budget": budget,
    }  # fmt: skip
    keys, options, blocks = call.keys(), call.options, blocks_of(call)
    start_wide, length_wide = (0 if x is None else WHOLES[x.dtype] for x in (start, lengths))
    numbers: dict[str, Any] = {
        "plane_keys": keys["plane_keys"], "scale": call.scale, "root": results.out.shape[-1] ** -0.5,
        "softcap": options["softcap"], "hysteresis": options["hysteresis"], "blocks": blocks,
        "per_block": -(-(1 << 18) // blocks),
        "rotates": int(call.rotates), "kv_heads": call.planes[0].shape[1], "keys": keys["keys"],
        "subtiles": call.cut.subtiles, "slots": call.cut.slots, "splits": call.cut.splits,
        "window": options["guard_window"], "hold": options["guard_hold"], "start_step": keys["start_stride"],
        "length_step": keys["length_stride"], "floor_step": per_head_step(floor),
        "budget_step": per_head_step(budget), "start_wide": start_wide, "length_wide": length_wide,
        "attention_window": keys["WINDOW"], "causal": keys["CAUSAL"],
        "sink_kind": 0 if sinks is None else REALS[sinks.dtype], "out_kind": REALS[results.out.dtype],
    }  # fmt: skip
    return Arguments(**{name: 0 if x is None else x.data_ptr() for name, x in tensors.items()}, **numbers)
