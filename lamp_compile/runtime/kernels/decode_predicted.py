"""The launches of one step of one token at a site with a look-ahead network. As in ``decode.py`` everything that
depends on data stays on the device: lists have room for all sub-tiles, and their counts lie beside them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lamp_compile.runtime.kernels import decode
from lamp_compile.runtime.kernels._tensors import power_of_two
from lamp_compile.runtime.kernels.audit_step import merge_and_audit, trust_and_guard
from lamp_compile.runtime.kernels.decode import Call, Listed, Results, Scratch
from lamp_compile.runtime.kernels.predict import list_subtiles, predict_parts
from lamp_compile.runtime.kernels.result import Result
from lamp_compile.runtime.kernels.targets import Cut

PART = 64
"""Sub-tiles of one program of ``predict_parts``."""
LIST_CHUNK = 4096
"""Sub-tiles that a program lists at a time."""
AUDIT: dict[str, int | float] = {
    "HOLD": 64, "SLACK": 4.0, "CEILING": 1e4, "LAVISH": 2.5, "MOST_EXCESS": 20.0,
}  # fmt: skip
"""``network/audit.py``'s constants; kernels know nothing of networks but what they are given."""
WINDOW, TRUST_FIELDS, AGES, DECAY = 16, 7, 16, 0.9
"""Its window and fields of the trust; of ``network/gate.py`` the points of the bias by age, and the decay of means."""
AUDIT_CHUNK = 256
"""Sub-tiles of one program of the audit."""
LISTED_STEPS = 32
"""Steps of the look-ahead's loop in one program at most. Lists differ in length, and one step in sixteen skips nothing:
programs of as many steps for all, of which short lists fill fewer, end at one time."""


@dataclass(frozen=True)
class Gate:
    """What the network has of one layer: summaries ``[B, G, N / group, R]`` (of the pool with pages), history
    ``[B, G, T, 2]``, trust ``[B, G, 7]``, and its weights, as of ``network.gate.Gate``, of one step ahead."""

    summary: Tensor
    history: Tensor
    trust: Tensor
    query: Tensor
    query_bias: Tensor
    age: Tensor
    extra: Tensor
    limit: Tensor
    margin: Tensor

    def contiguous(self) -> Gate:
        """With weights that kernels can walk through."""
        return Gate(self.summary, self.history, self.trust, *(x.contiguous() for x in list(vars(self).values())[3:]))

    @property
    def rank(self) -> int:
        return self.query.shape[2]

    @property
    def padded_rank(self) -> int:
        return max(16, power_of_two(self.rank))


def decode_predicted(
    q: Tensor, planes: tuple[Tensor, ...], hot: tuple[Tensor, ...], balance: Tensor | None,
    seen: tuple[Tensor | None, ...], gate: Gate, options: Mapping[str, Any],
) -> Result:  # fmt: skip
    """Fused attention of q ``[B, H, 1, D]`` over six planes, their importance predicted.

    Args:
        q: Any strides.
        planes: As of ``lamp::attend``.
        hot: tau, floor, budget, state, stats; the last two are written in place.
        balance: ``[G, D]``, ``[B, G, D]`` or None.
        seen: mask, bias, sinks, start, lengths, block table.
        gate: Its history and trust are written in place.
        options: The keyword arguments of ``lamp::fused_predicted``.
    """
    call, results = decode.begin(q, planes, hot, balance, seen, options)
    call, gate = replace(call, cut=_even(call.cut)), gate.contiguous()
    scratch = decode.room_for(call, 1)
    lead, device = (call.heads, call.cut.subtiles), q.device
    projected = torch.empty(call.heads, call.cut.rows, gate.padded_rank, dtype=torch.float32, device=device)
    listed = Listed(
        torch.empty(lead, dtype=torch.int32, device=device),
        torch.empty(lead, dtype=torch.int32, device=device),
        torch.empty(lead, dtype=torch.uint8, device=device),
        torch.empty(call.heads, 4, dtype=torch.int32, device=device),
    )
    predicted = torch.empty(lead, dtype=torch.float32, device=device)
    decode.prepare(call, scratch, 0, _projection(call, gate, projected))
    _predict(call, scratch, gate, projected, listed, predicted)
    decode.look(call, scratch, 0, listed)
    decode.refine_chosen(call, scratch, 0, listed)
    _join_and_audit(call, scratch, results, gate, listed, predicted)
    return Result(results.out, results.lse, results.certificate)


def _even(cut: Cut) -> Cut:
    """Programs of the look-ahead that have the same number of steps, whatever the list's length."""
    steps = -(-cut.subtiles // cut.pack)
    splits = max(cut.splits, min(cut.launch.most_splits, -(-steps // LISTED_STEPS)))
    return replace(cut, splits=splits, least_steps=-(-steps // splits))


def _projection(call: Call, gate: Gate, projected: Tensor) -> dict[str, Any]:
    """What ``prepare_query`` needs to project the queries, as many numbers at a time as registers hold."""
    per_number = call.cut.rows * call.planes[0].shape[4]
    step = max(1, min(gate.padded_rank, 4096 // power_of_two(per_number)))
    return {
        "GATE": gate.query, "GATE_BIAS": gate.query_bias, "PROJECTED": projected, "RANK": gate.rank,
        "RP": gate.padded_rank, "STEP": step,
    }  # fmt: skip


def _live(call: Call) -> dict[str, Any]:
    """What the kernels around the attention know of which keys live."""
    start, lengths = call.seen[3:5]
    keys = call.keys()
    kept = ("start_stride", "length_stride", "keys", "BN", "CAUSAL", "WINDOW", "HAS_START", "HAS_LENGTHS")
    return {"START": start, "LENGTHS": lengths, **{name: keys[name] for name in kept}}


def _pages(call: Call) -> dict[str, Any]:
    """And of where they are, and whether rows see all of them."""
    table, keys = call.seen[5], call.keys()
    return {
        "MASKED": call.seen[0] is not None,
        "TABLE": table,
        **{name: keys[name] for name in ("table_stride", "TILE", "PAGED")},
    }


def _predict(
    call: Call, scratch: Scratch, gate: Gate, projected: Tensor, listed: Listed, predicted: Tensor
) -> None:  # fmt: skip
    """Two launches: what the gate says, and what follows of it."""
    state = call.hot[3]
    keys, subtiles, sinks = call.keys(), call.cut.subtiles, call.seen[2]
    rows = {name: call.rows(0)[name] for name in ("kv_heads", "GROUP", "GP")}
    in_planes = call.planes[0].shape[2] * keys["TILE"]
    spans = keys["BN"] * gate.summary.shape[2] // in_planes
    chunk = max(16, min(PART, power_of_two(subtiles)))
    chunks, listing = -(-subtiles // chunk), _power(subtiles, LIST_CHUNK)
    made: dict[str, Any] = {"dtype": torch.float32, "device": call.q.device}
    found = torch.empty(call.heads, subtiles, call.cut.rows, **made)
    parts = torch.empty(call.heads, chunks, 4, call.cut.rows, **made)
    predict_parts[(chunks, call.heads)](
        projected, gate.summary, gate.history, gate.age, gate.extra, call.seen[0], FOUND=found, PARTS=parts,
        **_live(call), mask_b=keys["mask_b"], mask_h=keys["mask_h"], mask_key=keys["mask_key"],
        **_pages(call), **rows, subtiles=subtiles, tiles=gate.history.shape[2], summary_groups=gate.summary.shape[2],
        scale=call.scale, NP=max(call.target.columns, call.cut.rows), SPANS=spans, RANK=gate.rank, RP=gate.padded_rank,
        AGES=AGES, CHUNK=chunk,
        **call.dependent(), num_warps=4,
    )  # fmt: skip
    list_subtiles[(call.heads,)](
        found, parts, scratch.rowinfo, state, gate.trust, gate.margin, sinks, PREDICTED=predicted, LEVELS=listed.levels,
        LIST=listed.list, PLACES=listed.places, COUNTS=listed.counts, **_live(call), **_pages(call), **rows,
        subtiles=subtiles, chunks=chunks,
        trained=call.options["trained"], skip=call.options["skip"], CHUNK=listing,
        CHUNKS_P2=power_of_two(chunks), HAS_SINKS=sinks is not None, **_trust(call), **call.dependent(),
        num_warps=min(16, max(4, listing // 256)),
    )  # fmt: skip


def _power(tiles: int, most: int) -> int:
    """A power of two for some sub-tiles, ``most`` at most."""
    return min(most, max(16, power_of_two(tiles)))


def _trust(call: Call) -> dict[str, Any]:
    """Constants of the audit that two kernels know."""
    return {"SKIPS": call.options["skip"] > 0, "AUDIT_WINDOW": WINDOW, "TRUST_FIELDS": TRUST_FIELDS}


def _join_and_audit(
    call: Call, scratch: Scratch, results: Results, gate: Gate, listed: Listed, predicted: Tensor
) -> None:  # fmt: skip
    """The last two launches."""
    tiles, live, options = gate.history.shape[2], _live(call), call.options
    chunk = _power(tiles, AUDIT_CHUNK)
    parts = -(-tiles // chunk)
    evidence = torch.empty(call.heads, parts, 6, dtype=torch.float32, device=call.q.device)
    known = {
        "COUNTS": listed.counts, "TRUST": gate.trust, "AUDIT": evidence, "skip": options["skip"], **_trust(call),
    }  # fmt: skip
    merge_and_audit[(call.rows(0)["GROUP"] + parts, call.heads, 1)](
        **decode.joining(call, scratch, 0, results, 1), GUARD_COUNTS=results.counts, ENERGY=scratch.energy,
        PREDICTED=predicted, LEVELS=listed.levels, MARGIN=gate.margin, HISTORY=gate.history, **known, **live,
        subtiles=call.cut.subtiles, tiles=tiles, AUDIT_CHUNK=chunk, DECAY=DECAY,
    )  # fmt: skip
    lengths = {name: live[name] for name in ("LENGTHS", "length_stride", "keys", "BN", "HAS_LENGTHS")}
    trust_and_guard[(call.heads,)](
        *decode.guard_arguments(call, results), ROWINFO=scratch.rowinfo, LIMIT=gate.limit, **known,
        **lengths, **decode.guard_rows(call),
        parts=parts, trained=options["trained"], GP=call.cut.rows, PARTS_P2=power_of_two(parts), **AUDIT,
        **call.dependent(), num_warps=1,
    )  # fmt: skip
