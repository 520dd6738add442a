"""The launches of one fused attention, from tensors to grids. Everything that depends on data stays on the device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from lamp_compile.launch_plan import LaunchPlan
from lamp_compile.runtime.kernels._tensors import (
    broadcast_steps,
    padded_half,
    parts,
    per_head_step,
    per_key,
    row_step,
    sequence_step,
    signs,
)
from lamp_compile.runtime.kernels.look_ahead import look_ahead
from lamp_compile.runtime.kernels.merge import guard_step, merge
from lamp_compile.runtime.kernels.prepare_query import prepare_query
from lamp_compile.runtime.kernels.refine import refine
from lamp_compile.runtime.kernels.result import Result
from lamp_compile.runtime.kernels.targets import Cut, Target, cut, target_of

FIELDS = 11
"""Numbers per partial result and row; ``refine`` lists them."""
RULES = {"energy": 0, "lamp_strict": 1, "lamp_relaxed": 2}
CAUSAL = {"": 0, "top_left": 1, "bottom_right": 2}
SCRATCH = 1 << 28
"""Bytes of energies and partial results at most; longer prefills are cut into blocks of queries."""


@dataclass(frozen=True)
class _Call:
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
        """Of all launches but the first: they may begin while the one ahead ends (``_device.wait_for_launch``)."""
        return {"PDL": True, "launch_pdl": True} if self.target.pdl and self.cut.launch.dependent else {"PDL": False}

    def signs(self, dim: int) -> Tensor:
        """The rotation, or a tensor that nobody reads."""
        return signs(dim, self.q.device) if self.rotates else self.q

    def keys(self) -> dict[str, Any]:
        """Of both kernels that read planes: steps, sizes, and what they are compiled for."""
        tau, floor = self.hot[:2]
        mask, bias, _, start, lengths, table = self.seen
        k_high, v_high = self.planes[0], self.planes[3]
        half_k, half_v, tile = k_high.shape[4], v_high.shape[3], k_high.shape[3]
        options = self.options
        return {
            "tau_b": per_head_step(tau), "floor_b": per_head_step(floor),
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

    def rows(self, first_block: int) -> dict[str, Any]:
        """Of all kernels that know rows."""
        kv_heads = self.planes[0].shape[1]
        return {
            "kv_heads": kv_heads, "queries": self.q.shape[2], "first_token": first_block * self.cut.tokens,
            "GROUP": self.q.shape[1] // kv_heads, "GP": self.cut.rows, "TOKENS": self.cut.tokens,
        }  # fmt: skip


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
    target = target_of(q.device)
    if q.stride(-1) != 1:
        q = q.contiguous()
    hot = (*(setting.contiguous() for setting in hot[:3]), *hot[3:])
    balance = None if balance is None else balance.contiguous()
    pages = planes[0].shape[2] if seen[5] is None else seen[5].shape[1]
    room = min(int(options["keys"]), pages * planes[0].shape[3])
    launch = LaunchPlan.parse(options.get("launch", ""))
    sizes = cut(target, launch, q, planes, room, options["subtile"], mixed=seen[5] is not None)
    call = _Call(q, planes, hot, balance, seen, options, target, sizes)
    value_dim = 2 * planes[3].shape[3]
    made: dict[str, Any] = {"dtype": torch.float32, "device": q.device}
    out = torch.empty(*q.shape[:3], value_dim, dtype=q.dtype, device=q.device)
    lse, certificate = torch.empty(q.shape[:3], **made), torch.empty(*q.shape[:3], 3, **made)
    evidence, counts = torch.empty_like(certificate), torch.empty(call.heads, call.cut.blocks, 2, **made)
    per_slot = call.cut.rows * (value_dim + FIELDS)
    per_block = 4 * call.heads * (call.cut.slots * per_slot + call.cut.subtiles * (2 * call.cut.rows + 1))
    step = max(1, SCRATCH // per_block)
    for first in range(0, call.cut.blocks, step):
        blocks = min(step, call.cut.blocks - first)
        _attend_block(call, first, blocks, (out, lse, certificate, evidence, counts))
    _, floor, budget, state, stats = hot
    rows = q.shape[1] // planes[0].shape[1] * q.shape[2]
    guard_step[(call.heads,)](
        evidence, counts, state, stats, floor, budget, per_head_step(floor), per_head_step(budget),
        planes[0].shape[1], rows, call.cut.blocks, options["guard_window"], options["guard_hold"],
        options["hysteresis"], ROWS=min(512, triton.next_power_of_2(rows)), **call.dependent(), num_warps=1,
    )  # fmt: skip
    return Result(out, lse, certificate)


def _attend_block(call: _Call, first_block: int, blocks: int, results: tuple[Tensor, ...]) -> None:
    """Four launches for some blocks of rows."""
    cut, q, planes, launch = call.cut, call.q, call.planes, call.cut.launch
    tau, floor, _, state, _ = call.hot
    out, lse, certificate, evidence, counts = results
    mask, bias, sinks, start, lengths, table = call.seen
    grid = (call.heads, blocks)
    half_k, value_dim = planes[0].shape[4], 2 * planes[3].shape[3]
    made: dict[str, Any] = {"dtype": torch.float32, "device": q.device}
    q8 = torch.empty(*grid, cut.rows, 2 * padded_half(half_k), dtype=torch.int8, device=q.device)
    rowinfo = torch.empty(*grid, 4, cut.rows, **made)
    partial = torch.empty(*grid, cut.slots, cut.rows, value_dim, **made)
    meta = torch.empty(*grid, cut.slots, FIELDS, cut.rows, **made)
    energy, peak = torch.empty(*grid, cut.subtiles, cut.rows, **made), torch.empty(*grid, cut.subtiles, **made)
    other = energy if call.options["rule"] == "energy" else torch.empty_like(energy)
    rows, keys = call.rows(first_block), call.keys()
    warps, refine_warps = cut.warps(keys["HP_V"])
    sums = {"slots": cut.slots, "splits": cut.splits, "scale": call.scale, "FIELDS": FIELDS}
    prepare_query[grid](
        q, call.balance, call.signs(q.shape[-1]), q8, rowinfo, *q.stride()[:3],
        0 if call.balance is None or call.balance.dim() == 2 else row_step(call.balance),
        root=q.shape[-1] ** -0.5, **rows, HALF=half_k, HP=padded_half(half_k), ROTATE=call.rotates,
        BALANCED=call.balance is not None, PARTS=parts(q, call.balance), PDL=call.dependent()["PDL"], num_warps=4,
    )  # fmt: skip
    look_ahead[(cut.splits, *grid)](
        q8, rowinfo, planes[0], planes[2], planes[3], planes[5], tau, floor, state, mask, bias, start, lengths, table,
        partial, meta, energy, other, peak, **keys, **rows, **sums,
        least_steps=cut.least_steps, **call.dependent(), num_warps=warps, num_stages=launch.stages,
    )  # fmt: skip
    splits_p2 = triton.next_power_of_2(cut.splits)
    refine[(cut.segments, *grid)](
        q8, rowinfo, *planes, tau, floor, state, sinks, mask, bias, start, lengths, table, partial, meta, energy,
        other, peak, **keys, **rows, **sums, segments=cut.segments, least_tiles=cut.least_tiles,
        SPLITS_P2=splits_p2, SEGMENT=cut.segment,
        HAS_SINKS=sinks is not None, **call.dependent(), num_warps=refine_warps, num_stages=launch.refine_stages,
    )  # fmt: skip
    value_width = triton.next_power_of_2(value_dim)
    merge[(rows["GROUP"] * cut.tokens, *grid)](
        partial, meta, rowinfo, sinks, call.signs(value_dim), out, lse, certificate, evidence, counts[:, first_block:],
        heads=q.shape[1], all_blocks=cut.blocks, root=value_dim**-0.5, **rows, **sums, DIM=q.shape[-1],
        VALUE_DIM=value_dim, VP=value_width, SEGMENTS_P2=triton.next_power_of_2(cut.segments),
        CHUNK=min(launch.merge_chunk, triton.next_power_of_2(cut.segments)), COLUMNS=min(value_width, 64),
        ROTATE=call.rotates, HAS_SINKS=sinks is not None, **call.dependent(),
        num_warps=launch.merge_warps,
    )  # fmt: skip
