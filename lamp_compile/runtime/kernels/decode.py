"""The launches of one fused attention, from tensors to grids. Everything that depends on data stays on the device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lamp_compile.launch_plan import LaunchPlan
from lamp_compile.runtime.kernels._device import ROW_FIELDS
from lamp_compile.runtime.kernels._tensors import (
    broadcast_steps,
    padded_half,
    parts,
    per_head_step,
    per_key,
    power_of_two,
    row_step,
    sequence_step,
    signs,
)
from lamp_compile.runtime.kernels.decide import NOTES, decide
from lamp_compile.runtime.kernels.finish import finish
from lamp_compile.runtime.kernels.finish import why_not as why_not_finish
from lamp_compile.runtime.kernels.look_ahead import look_ahead
from lamp_compile.runtime.kernels.merge import guard_step, merge
from lamp_compile.runtime.kernels.prepare_query import prepare_query
from lamp_compile.runtime.kernels.refine import refine
from lamp_compile.runtime.kernels.result import Result
from lamp_compile.runtime.kernels.targets import Cut, Target, cut, target_of

FIELDS = 7
"""Numbers per partial result and row; ``look_ahead`` and ``refine`` list theirs."""
LEAST_DECIDED, MOST_DECIDED = 512, 1024
"""Sub-tiles that one program which decides has room for."""
OF_DECISIONS = (
    "start_stride", "length_stride", "table_stride", "keys", "subtiles", "BN", "TILE",
    "RULE", "CAUSAL", "WINDOW", "HAS_START", "HAS_LENGTHS", "PAGED", "slots", "splits", "FIELDS",
)  # fmt: skip
"""What ``decide`` needs of ``Call.keys`` and ``Call.sums``."""
OF_GUARD = ("floor_b", "budget_b", "window", "hold", "hysteresis")
"""What ``merge`` needs of ``guard_rows``."""
JOINED = 32
"""Rows times partial results that one program joins at most, where it could leave rows to others."""
RULES = {"energy": 0, "lamp_strict": 1, "lamp_relaxed": 2}
CAUSAL = {"": 0, "top_left": 1, "bottom_right": 2}
SCRATCH = 1 << 28
"""Bytes of energies and partial results at most; longer prefills are cut into blocks of queries."""


@dataclass(frozen=True)
class Call:
    """One attention: its tensors, its sizes, and the arguments that several kernels share."""

    q: Tensor
    planes: tuple[Tensor, ...]
    hot: tuple[Tensor, ...]
    balance: Tensor | None
    seen: tuple[Tensor | None, ...]
    options: Mapping[str, Any]
    target: Target
    cut: Cut

    @property
    def heads(self) -> int:
        """Sequences times kv heads."""
        return self.q.shape[0] * self.planes[0].shape[1]

    @property
    def scale(self) -> float:
        scale = self.options["scale"]
        return float(self.q.shape[-1] ** -0.5 if scale is None else scale)

    @property
    def rotates(self) -> bool:
        return bool(self.options["rotation"] != "none")

    def dependent(self) -> dict[str, bool]:
        """Of all launches."""
        return self.target.dependent(bool(self.cut.launch.dependent))

    def fold(self, warps: int) -> int:
        """Rows to which sums over the keys of a sub-tile are folded (``_device.folded``)."""
        return 8 if warps == 1 and self.target.columns == 8 else int(self.options["subtile"])

    def widths(self) -> tuple[int, int]:
        """Padded halves of the channels of keys and values."""
        return padded_half(self.planes[0].shape[4]), padded_half(self.planes[3].shape[3])

    def signs(self, dim: int) -> Tensor:
        """The rotation, or a tensor that nobody reads."""
        return signs(dim, self.q.device) if self.rotates else self.q

    def keys(self) -> dict[str, Any]:
        """Of both kernels that read planes: steps, sizes, and what they are compiled for."""
        mask, bias, _, start, lengths, table = self.seen
        k_high, v_high = self.planes[0], self.planes[3]
        half_k, half_v, tile = k_high.shape[4], v_high.shape[3], k_high.shape[3]
        options = self.options
        return {
            **broadcast_steps("mask", mask), **broadcast_steps("bias", bias),
            "start_stride": sequence_step(start), "length_stride": sequence_step(lengths),
            "table_stride": 0 if table is None else table.stride(0),
            "keys": options["keys"], "plane_keys": k_high.shape[2] * tile, "softcap": options["softcap"],
            "TILE": tile, "BN": options["subtile"], "RULE": RULES[options["rule"]],
            "CAUSAL": CAUSAL[options["causal"]], "WINDOW": options["window"], "SOFTCAP": options["softcap"] != 0.0,
            "HAS_MASK": mask is not None and not per_key(mask), "KEY_MASK": mask is not None and per_key(mask),
            "HAS_BIAS": bias is not None, "HAS_START": start is not None,
            "HAS_LENGTHS": lengths is not None, "PAGED": table is not None, "ASM": self.target.asm,
            "HALF_K": half_k, "HP_K": padded_half(half_k), "HALF_V": half_v, "HP_V": padded_half(half_v),
            "PACK": self.cut.pack, "subtiles": self.cut.subtiles,
        }  # fmt: skip

    def sums(self) -> dict[str, Any]:
        """Of all kernels that know partial results."""
        return {"slots": self.cut.slots, "splits": self.cut.splits, "scale": self.scale, "FIELDS": FIELDS}

    def rows(self, first_block: int) -> dict[str, Any]:
        """Of all kernels that know rows."""
        kv_heads = self.planes[0].shape[1]
        return {
            "kv_heads": kv_heads, "queries": self.q.shape[2], "first_token": first_block * self.cut.tokens,
            "GROUP": self.q.shape[1] // kv_heads, "GP": self.cut.rows, "TOKENS": self.cut.tokens,
        }  # fmt: skip


@dataclass(frozen=True)
class Scratch:
    """What the launches of some blocks of rows hand on."""

    q8: Tensor
    rowinfo: Tensor
    partial: Tensor
    meta: Tensor
    energy: Tensor
    other: Tensor
    peak: Tensor
    hot: Tensor
    hot_places: Tensor
    own: Tensor
    own_places: Tensor
    taken: Tensor
    noted: Tensor


@dataclass(frozen=True)
class Listed:
    """What was known before any key is read, of one token (``predict.list_subtiles``)."""

    list: Tensor
    places: Tensor
    levels: Tensor
    counts: Tensor


@dataclass(frozen=True)
class Results:
    """What the launches leave: as ``Result``, and for the guard ``merge``'s evidence and counts."""

    out: Tensor
    lse: Tensor
    certificate: Tensor
    evidence: Tensor
    counts: Tensor


def begin(
    q: Tensor, planes: tuple[Tensor, ...], hot: tuple[Tensor, ...], balance: Tensor | None,
    seen: tuple[Tensor | None, ...], options: Mapping[str, Any],
) -> tuple[Call, Results]:  # fmt: skip
    """A call, cut, and room for its results."""
    if q.stride(-1) != 1:
        q = q.contiguous()
    hot = (*(setting.contiguous() for setting in hot[:3]), *hot[3:])
    if (sinks := seen[2]) is not None and sinks.numel() == 1:  # one for all heads; kernels read one for each
        seen = (*seen[:2], sinks.reshape(1).expand(q.shape[1]).contiguous(), *seen[3:])
    balance = None if balance is None else balance.contiguous()
    pages = planes[0].shape[2] if seen[5] is None else seen[5].shape[1]
    room = min(int(options["keys"]), pages * planes[0].shape[3])
    launch, target = LaunchPlan.parse(options.get("launch", "")), target_of(q.device)
    sizes = cut(target, launch, q, planes, room, options["subtile"], mixed=seen[5] is not None)
    call = Call(q, planes, hot, balance, seen, options, target, sizes)
    made: dict[str, Any] = {"dtype": torch.float32, "device": q.device}
    out = torch.empty(*q.shape[:3], 2 * planes[3].shape[3], dtype=q.dtype, device=q.device)
    certificate = torch.empty(*q.shape[:3], 3, **made)
    evidence, counts = torch.empty_like(certificate), torch.empty(call.heads, sizes.blocks, 2, **made)
    return call, Results(out, torch.empty(q.shape[:3], **made), certificate, evidence, counts)


def decode(
    q: Tensor, planes: tuple[Tensor, ...], hot: tuple[Tensor, ...], balance: Tensor | None,
    seen: tuple[Tensor | None, ...], options: Mapping[str, Any],
) -> Result:  # fmt: skip
    """Fused attention of q ``[B, H, S, D]`` over six planes.

    Args:
        q: Any strides.
        planes: As of ``lamp::attend``.
        hot: tau, floor, budget, state, stats; the last two are written in place.
        balance: ``[G, D]``, ``[B, G, D]`` or None.
        seen: mask, bias, sinks, start, lengths, block table.
        options: The keyword arguments of ``lamp::fused_attention``.
    """
    call, results = begin(q, planes, hot, balance, seen, options)
    per_slot = call.cut.rows * (2 * planes[3].shape[3] + FIELDS)
    per_block = 4 * call.heads * (call.cut.slots * per_slot + call.cut.subtiles * (2 * call.cut.rows + 1))
    step, together = max(1, SCRATCH // per_block), why_not_finish(call) is None
    for first in range(0, call.cut.blocks, step):
        blocks = min(step, call.cut.blocks - first)
        scratch = room_for(call, blocks)
        prepare(call, scratch, first, NO_GATE)
        look(call, scratch, first, None)
        if together := together and finish(call, scratch, results):
            continue
        refine_chosen(call, scratch, first, None)
        join(call, scratch, first, results)
    if not (together or guards(call)):
        guard_step[(call.heads,)](*guard_arguments(call, results), **guard_rows(call), **call.dependent(), num_warps=1)
    return Result(results.out, results.lse, results.certificate)


def room_for(call: Call, blocks: int) -> Scratch:
    """Scratch of some blocks of rows."""
    cut, planes, grid = call.cut, call.planes, (call.heads, blocks)
    made: dict[str, Any] = {"dtype": torch.float32, "device": call.q.device}
    width = 2 * padded_half(planes[0].shape[4])
    energy = torch.empty(*grid, cut.subtiles, cut.rows, **made)
    whole: dict[str, Any] = {"dtype": torch.int32, "device": call.q.device}
    hot = torch.empty(*grid, max(1, cut.subtiles), **whole)  # its head is read in any case
    hot_places = hot if call.seen[5] is None else torch.empty_like(hot)
    own = torch.empty_like(hot) if chunks_of(cut) > 1 else hot
    own_places = own if call.seen[5] is None else torch.empty_like(own)
    return Scratch(
        torch.empty(*grid, cut.rows, width, dtype=torch.int8, device=call.q.device),
        torch.empty(*grid, ROW_FIELDS.value, cut.rows, **made),
        torch.empty(*grid, cut.slots, cut.rows, 2 * planes[3].shape[3], **made),
        torch.empty(*grid, cut.slots, FIELDS, cut.rows, **made),
        energy, energy if call.options["rule"] == "energy" else torch.empty_like(energy),
        torch.empty(*grid, cut.subtiles, **made), hot, hot_places, own, own_places,
        torch.empty(*grid, chunks_of(cut), 2, **whole),
        torch.empty(*grid, chunks_of(cut), NOTES.value, cut.rows, **made),
    )  # fmt: skip


NO_GATE: dict[str, Any] = {"GATE": None, "GATE_BIAS": None, "PROJECTED": None, "RANK": 0, "RP": 0, "STEP": 1}
"""Of ``prepare_query`` at a site without a look-ahead network."""


def prepare(call: Call, scratch: Scratch, first_block: int, gate: dict[str, Any]) -> None:
    """The first launch."""
    q, half_k = call.q, call.planes[0].shape[4]
    tau, floor, _, state, _ = call.hot
    prepare_query[tuple(scratch.q8.shape[:2])](
        q, call.balance, call.signs(q.shape[-1]), tau, floor, state, scratch.q8, scratch.rowinfo, **gate,
        stride_b=q.stride(0), stride_h=q.stride(1), stride_s=q.stride(2),
        balance_b=0 if call.balance is None or call.balance.dim() == 2 else row_step(call.balance),
        root=q.shape[-1] ** -0.5, **call.rows(first_block), HALF=half_k, HP=padded_half(half_k), ROTATE=call.rotates,
        BALANCED=call.balance is not None, PARTS=parts(q, call.balance), tau_b=per_head_step(tau),
        floor_b=per_head_step(floor), **call.dependent(), num_warps=4,
    )  # fmt: skip


def look(call: Call, scratch: Scratch, first_block: int, listed: Listed | None) -> None:
    """The launch that reads the high plane."""
    cut, planes, grid = call.cut, call.planes, scratch.q8.shape[:2]
    mask, bias, _, start, lengths, table = call.seen
    keys = call.keys()
    warps, _ = cut.warps(keys["HP_V"])
    known = (None,) * 3 if listed is None else (listed.list, listed.places, listed.counts)
    look_ahead[(cut.splits, *grid)](
        scratch.q8, scratch.rowinfo, planes[0], planes[2], planes[3], planes[5], mask, bias, start, lengths, table,
        scratch.partial, scratch.meta, scratch.energy, scratch.other, scratch.peak, *known, **keys,
        **call.rows(first_block), **call.sums(), **call.dependent(), LISTED=listed is not None,
        least_steps=cut.least_steps, FOLD=call.fold(warps), **registers(call, warps, cut.launch.programs),
        num_warps=warps, num_stages=cut.stages,
    )  # fmt: skip


def refine_chosen(call: Call, scratch: Scratch, first_block: int, listed: Listed | None) -> None:
    """The decision, and the launch that reads both planes of what was chosen."""
    cut, planes, grid = call.cut, call.planes, scratch.q8.shape[:2]
    mask, bias, sinks, start, lengths, table = call.seen
    keys, sums, rows = call.keys(), call.sums(), call.rows(first_block)
    _, refine_warps = cut.warps(keys["HP_V"])
    levels, counts = (None, None) if listed is None else (listed.levels, listed.counts)
    common = {**call.dependent(), "LISTED": listed is not None}
    hot = (scratch.hot, scratch.hot_places, scratch.taken)
    decide[(chunks_of(cut), *grid)](
        scratch.rowinfo, scratch.meta, scratch.energy, scratch.other, scratch.peak, sinks, start, lengths, table,
        levels, counts, *hot, scratch.noted,
        **{name: number for name, number in {**keys, **sums}.items() if name in OF_DECISIONS}, **rows, **common,
        SPLITS_P2=power_of_two(cut.splits), CHUNK=decided(cut),
        HAS_SINKS=sinks is not None,
        num_warps=min(16, max(4, decided(cut) * cut.rows // 512)),
    )  # fmt: skip
    del keys["RULE"], keys["table_stride"]  # it has its decisions and places from there
    refine[(cut.segments, *grid)](
        scratch.q8, scratch.rowinfo, *planes, mask, bias, start, lengths, scratch.partial,
        scratch.meta, scratch.energy, *hot[:2], scratch.own, scratch.own_places, scratch.taken, counts,
        **keys, **rows, **sums, **common,
        **lists(cut), CHUNK=decided(cut), FOLD=call.fold(refine_warps),
        **registers(call, refine_warps, cut.refine_programs), num_warps=refine_warps, num_stages=cut.refine_stages,
    )  # fmt: skip


def registers(call: Call, warps: int, programs: int) -> dict[str, int]:
    """Registers of a thread at most, so that as many programs of one or two warps fit as are aimed at: a quarter of a
    multiprocessor has 16384 for its share of their warps."""
    share = -(-programs * warps // 4)
    limited = call.target.asm and call.cut.small and warps <= 2 and 2 < share <= 4
    return {"maxnreg": 16384 // (32 * share) // 8 * 8} if limited else {}


def decided(cut: Cut) -> int:
    """Sub-tiles of which one program decides: all of a block of rows, if these are few."""
    return min(MOST_DECIDED, max(LEAST_DECIDED, power_of_two(cut.subtiles)))


def chunks_of(cut: Cut) -> int:
    """Programs that decide for one block of rows."""
    return max(1, -(-cut.subtiles // decided(cut)))  # one with nothing to decide, too: others read what it notes


def lists(cut: Cut) -> dict[str, int]:
    """Of the kernels that know the lists of these."""
    return {"chunks": chunks_of(cut), "CHUNKS_P2": power_of_two(chunks_of(cut))}


def join(call: Call, scratch: Scratch, first_block: int, results: Results) -> None:
    """The launch that joins the partial results; with ``guards`` the last one."""
    together = guards(call)
    programs = 1 if together else call.rows(first_block)["GROUP"] * call.cut.tokens
    _, floor, budget, state, stats = call.hot
    steps = {name: number for name, number in guard_rows(call).items() if name in OF_GUARD}
    merge[(programs, *scratch.q8.shape[:2])](
        **joining(call, scratch, first_block, results, call.cut.rows if together else 1),
        COUNTS=results.counts[:, first_block:], STATE=state, STATS=stats, FLOOR=floor, BUDGET=budget,
        **steps, GUARD=together,
    )  # fmt: skip


def guards(call: Call) -> bool:
    """Whether one program joins all rows of a kv head and takes the guard's step: of one token, where partial results
    are few enough for it."""
    return call.q.shape[2] == 1 and call.cut.rows * power_of_two(call.cut.segments) <= JOINED


def joining(call: Call, scratch: Scratch, first_block: int, results: Results, rows: int) -> dict[str, Any]:
    """What ``merge`` is given for some rows to a program, but for its counts and the guard."""
    cut, q, launch, sinks, half_v = call.cut, call.q, call.cut.launch, call.seen[2], call.planes[3].shape[3]
    segments, (_, width) = power_of_two(cut.segments), call.widths()
    chunk = min(max(1, launch.merge_chunk // rows), segments)
    warps = max(2 if rows == 1 else 4, chunk * rows * width // 1024)
    return {
        "PARTIAL": scratch.partial, "META": scratch.meta, "TAKEN": scratch.taken, "NOTED": scratch.noted,
        "ROWINFO": scratch.rowinfo, "SINKS": sinks, "SIGNS": call.signs(2 * half_v), "OUT": results.out,
        "LSE": results.lse, "CERTIFICATE": results.certificate,
        "EVIDENCE": results.evidence, "heads": q.shape[1], "all_blocks": cut.blocks, "root": (2 * half_v) ** -0.5,
        **call.rows(first_block), **call.sums(), "DIM": q.shape[-1], "HALF_V": half_v, "HP_V": width,
        "SEGMENTS_P2": segments, "PACK": cut.pack, **lists(cut), "CHUNK": chunk, "ROWS": rows,
        "ROTATE": call.rotates, "HAS_SINKS": sinks is not None, **call.dependent(),
        "num_warps": min(launch.merge_warps, warps),
    }  # fmt: skip


def guard_arguments(call: Call, results: Results) -> tuple[Tensor, ...]:
    """The tensors of the guard's step."""
    _, floor, budget, state, stats = call.hot
    return results.evidence, results.counts, state, stats, floor, budget


def guard_rows(call: Call) -> dict[str, Any]:
    """And its numbers."""
    _, floor, budget, _, _ = call.hot
    options, kv_heads = call.options, call.planes[0].shape[1]
    rows = call.q.shape[1] // kv_heads * call.q.shape[2]
    return {
        "floor_b": per_head_step(floor), "budget_b": per_head_step(budget), "kv_heads": kv_heads, "rows": rows,
        "blocks": call.cut.blocks, "window": options["guard_window"], "hold": options["guard_hold"],
        "hysteresis": options["hysteresis"], "ROWS": min(512, power_of_two(rows)),
    }  # fmt: skip
