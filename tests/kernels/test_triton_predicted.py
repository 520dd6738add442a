"""Triton's kernels where a look-ahead network predicts: prediction, decisions, output and audit of the reference."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lamp_compile.ir import Precision
from lamp_compile.runtime import formats, guard
from lamp_compile.runtime.network import audit, gate
from tests.kernels import calls, predicted, triton_predicted
from tests.kernels.test_decode import (
    LAUNCHES,
    check_certificate,
    check_guard,
    in_pool,
    normal,
    random_mask,
    scratch_is_nan,
    split_mask,
)
from tests.tolerances import ARITHMETIC, KERNELS, NETWORK

pytestmark = pytest.mark.usefixtures("scratch_is_nan")
__all__ = ["scratch_is_nan"]
HELD_OFF = {audit.HELD: [[3.0, 0.0], [0.0, 0.0]]}
RAISED = torch.tensor([[[0.0, 0, 0, 0], [0.01, 1, 5, 0]], [[0.0, 2, 0, 1], [0.0, 0, 0, 0]]])
PADDED = torch.ones(2, 1, 1, 150, dtype=torch.bool)
PADDED[0, ..., :70] = False

CASES = {
    "plain": {},
    "long": {"keys": 1200, "batch": 1, "heads": 2, "kv_heads": 1, "share": 0.1},
    "skips": {"keys": 400, "skip": 20.0, "share": 0.1, "kv_heads": 1},
    "sees all": {"keys": 400, "skip": 20.0, "trust": {audit.STEPS: [[32.0], [5.0]]}, "kv_heads": 1},
    "one head held off": {"skip": 20.0, "trust": HELD_OFF},
    "too long": {"trained": 100, "lengths": torch.tensor([150, 90]), "kv_heads": 1},
    "raised by the guard": {"state": RAISED},
    "floor 1, one held off": {"floor": 1.0, "trust": HELD_OFF},
    "nothing hot": {"tau": calls.COLD, "kv_heads": 1},
    "tau per sequence": {"tau": torch.tensor([[0.1, 1e9], [0.0, 0.05]])},
    **{f"group {g}": {"heads": g, "kv_heads": 1, "keys": 100} for g in (1, 3, 16)},
    "dim 80": {"dim": 80, "rank": 8, "kv_heads": 1},
    "dim 256": {"dim": 256, "kv_heads": 1, "batch": 1, "rank": 33},
    "value dim": {"dim": 128, "value_dim": 64, "kv_heads": 1, "heads": 2, "rank": 2},
    "one key": {"keys": 1, "kv_heads": 1},
    "an empty sequence": {"lengths": torch.tensor([0, 65]), "kv_heads": 1, "skip": 20.0},
    "padding and window": {
        "start": torch.tensor([3, 60]), "lengths": torch.tensor([140, 100]), "causal": "bottom_right", "window": 50,
        "kv_heads": 1,
    },
    "softcap, sinks": {"softcap": 2.0, "sharpness": 3.0, "sinks": normal(4) * 3, "kv_heads": 1},
    "left padding as a mask": {"mask": PADDED, "skip": 20.0, "kv_heads": 1},
    "mask per head": {"mask": random_mask(2, 4, 1, 150), "kv_heads": 1},
    "heads that see different keys, held off": {"mask": split_mask(), "trust": HELD_OFF},
    "masked rows": {"mask": torch.zeros(2, 1, 1, 150, dtype=torch.bool), "kv_heads": 1},
    "bias with -inf": {
        "bias": torch.zeros(2, 1, 1, 150).masked_fill(~random_mask(2, 1, 1, 150), -torch.inf), "kv_heads": 1,
    },
    "balance, no rotation": {"balance": normal(2, 2, 64).exp(), "rotation": "none"},
    "bfloat16": {"dtype": torch.bfloat16, "kv_heads": 1},
    "sub-tile 64 of 128": {"tile": 128, "subtile": 64, "keys": 200, "kv_heads": 1},
}  # fmt: skip


def check(step: predicted.Step, device: torch.device) -> triton_predicted.Outcome:
    """Kernels against the reference."""
    levels = triton_predicted.levels_of(step)
    got, wanted = triton_predicted.by_kernels(step, device), predicted.by_reference(step)
    assert torch.equal(got.stats[..., : guard.RAISED], wanted.stats[..., : guard.RAISED])
    rounding = 0.0 if step.call.q.dtype == torch.float32 else ARITHMETIC[step.call.q.dtype].relative
    cold = bool((levels == Precision.HIGH).any())
    assert calls.worst(got.out, wanted.out) <= KERNELS["rows" if cold else "refined"].bound + rounding
    assert calls.whole(got.out, wanted.out) <= KERNELS["output" if cold else "refined"].bound + rounding
    told, error = ~by_both_planes(step), NETWORK["kernel"].relative
    torch.testing.assert_close(got.history[told], wanted.history[told], rtol=0, atol=error)
    torch.testing.assert_close(got.trust, wanted.trust, rtol=NETWORK["trust"].relative, atol=error)
    certified = calls.by_reference(step.call, levels)
    seen = certified.lse != -torch.inf
    if seen.any():
        check_certificate(calls.Outcome(got.out, got.lse, got.certificate, got.state, got.stats), certified, seen)
    check_guard(step.call, got, levels)
    return got


def by_both_planes(step: predicted.Step) -> torch.Tensor:
    """Heads ``[B, G]`` whose importance both planes say in the kernels, the high plane in the reference: the gate is
    not used, and nothing is looked at because everything is refined."""
    tau, floor, _, state, _ = step.call.hot
    refined = (torch.maximum(state[..., 1], floor.expand_as(state[..., 1])) >= 1) | (tau.expand_as(state[..., 1]) <= 0)
    length = torch.full((1,), step.call.keys) if step.call.seen[4] is None else step.call.seen[4]
    return refined & ~audit.trusted(predicted.predicted(step), step.kept[2], state, length, step.options["trained"])


@pytest.mark.parametrize("name", CASES)
def test_kernels_do_what_the_reference_does(name, triton_device):
    case = CASES[name]
    check(triton_predicted.make(**{"batch": 2, **case}), triton_device)


@pytest.mark.parametrize(
    ("name", "case"), [("many splits", "one head held off"), ("merged by twos", "an empty sequence")]
)
def test_however_the_call_is_cut(name, case, triton_device, monkeypatch):
    calls.use_launch(monkeypatch, refine_programs=64, **LAUNCHES[name])
    check(triton_predicted.make(**{"keys": 400, "batch": 2, **CASES[case], "heads": 2}), triton_device)


@pytest.mark.parametrize(("tau", "floor"), [(0.0, 0.0), (calls.COLD, 0.0), (0.1, 1.0)])
def test_settings_that_change_during_a_step(tau, floor, triton_device, monkeypatch):
    """What is listed and what is refined are decided by several launches: if they disagreed, sub-tiles would be left
    out. The audit, too, goes by what was asked for when the step began."""
    from lamp_compile.runtime.kernels import decode_predicted

    step = triton_predicted.make(keys=400, batch=1, heads=2, kv_heads=1, skip=20.0, tau=tau, floor=floor)
    wanted = triton_predicted.by_kernels(step, triton_device)
    real = decode_predicted.decode.prepare

    def prepare(call, *args):
        real(call, *args)
        call.hot[0].fill_(0.01)
        call.hot[1].fill_(0.0 if floor else 1.0)

    monkeypatch.setattr(decode_predicted.decode, "prepare", prepare)
    got = triton_predicted.by_kernels(step, triton_device)
    for name in ("out", "history", "trust", "certificate"):
        assert torch.equal(getattr(got, name), getattr(wanted, name)), name


def test_kernels_know_the_constants_of_the_audit_and_the_gate(triton_device):
    """Kernels import nothing of networks."""
    from lamp_compile.runtime.kernels import decode_predicted, predict

    assert {
        "HOLD": audit.HOLD, "SLACK": audit.SLACK, "CEILING": audit.CEILING, "LAVISH": audit.LAVISH_LIMIT,
        "MOST_EXCESS": audit.MOST_EXCESS,
    } == decode_predicted.AUDIT  # fmt: skip
    known = (decode_predicted.WINDOW, decode_predicted.TRUST_FIELDS, decode_predicted.AGES, decode_predicted.DECAY)
    assert known == (audit.WINDOW, audit.FIELDS, gate.AGES, gate.DECAY)
    assert (predict.LOWEST.value, predict.LEAST.value) == (gate.LOWEST, gate.LEAST)
    assert (*range(7),) == (
        audit.EXCESS,
        audit.EXPENSE,
        audit.HELD,
        audit.FLAGS,
        audit.STEPS,
        audit.EXACT,
        audit.DROPPED,
    )
    assert (audit.MISSED, audit.LAVISH, audit.NO_NUMBER, audit.TOO_LONG) == (1, 2, 4, 8)


def test_several_parts_of_a_prediction(triton_device, monkeypatch):
    """Programs of sixteen sub-tiles each, and lists, decisions and audits of as many."""
    from lamp_compile.runtime.kernels import decode, decode_predicted

    monkeypatch.setattr(decode, "MOST_DECIDED", 16)
    monkeypatch.setattr(decode_predicted, "PART", 1)
    monkeypatch.setattr(decode_predicted, "LIST_CHUNK", 16)
    monkeypatch.setattr(decode_predicted, "AUDIT_CHUNK", 16)
    how = {"keys": 1200, "batch": 1, "heads": 2, "kv_heads": 1, "skip": 20.0, "share": 0.1}
    check(triton_predicted.make(**how), triton_device)
    check(triton_predicted.make(**how, mask=random_mask(1, 2, 1, 1200, share=0.01)), triton_device)


def test_what_is_not_needed_is_not_read(triton_device):
    """Of skipped sub-tiles nothing, of cold ones no residual: neither changes a bit. What is read does."""
    step = triton_predicted.make(keys=400, batch=1, skip=20.0, share=0.2)
    levels = triton_predicted.levels_of(step)[:, :, 0]
    counts = [int((levels == level).sum()) for level in (Precision.SKIP, Precision.HIGH, Precision.BOTH)]
    assert min(counts) > 1, counts

    def spoilt(high: torch.Tensor, residual: torch.Tensor) -> triton_predicted.Outcome:
        """What a step leaves whose planes hold something else at these sub-tiles."""
        planes = tuple(plane.clone() for plane in step.call.planes)
        for index, plane in enumerate(planes):
            tiled = plane.unflatten(2, (-1, 32)) if plane.dim() == 3 else plane
            tiled[residual if index in (1, 4) else high] = torch.nan if plane.dtype == torch.float16 else 0x77
        return triton_predicted.by_kernels(triton_predicted.with_planes(step, planes), triton_device)

    before = triton_predicted.by_kernels(step, triton_device)
    after = spoilt(levels == Precision.SKIP, levels != Precision.BOTH)
    assert before.same(after)
    assert not torch.equal(spoilt(levels == Precision.SKIP, levels == Precision.BOTH).out, before.out)
    assert spoilt(levels == Precision.HIGH, levels != Precision.BOTH).out.isnan().any()


def test_pages_in_any_order_change_nothing(triton_device):
    lengths = torch.tensor([150, 66])
    step = triton_predicted.make(lengths=lengths, causal="bottom_right", skip=20.0, trust=HELD_OFF, heads=2)
    plain = check(step, triton_device)
    call = in_pool(step.call)
    pool = torch.full((1, 2, call.planes[0].shape[2] * 4, 16), 77.0, dtype=torch.float16)
    for b, row in enumerate(call.seen[5]):
        for page, place in enumerate(row.tolist()):
            if place >= 0:
                pool[0, :, place * 4 : place * 4 + 4] = step.kept[0][b, :, page * 4 : page * 4 + 4]
    options = {**step.options, "pages": call.planes[0].shape[2]}
    paged = triton_predicted.by_kernels(
        replace(step, call=call, kept=(pool, *step.kept[1:]), options=options), triton_device
    )
    assert plain.same(paged)


@pytest.mark.parametrize("liar", ["nothing matters", "everything does"])
def test_a_gate_that_lies_is_dropped_when_the_reference_drops_it(liar, triton_device):
    """Over the step that sees all, near its limit."""
    near = {audit.STEPS: 15.0, audit.EXCESS: 2.0, audit.EXPENSE: 2.42}
    step = triton_predicted.make(keys=500, batch=1, heads=2, kv_heads=1, skip=0.05, sharpness=2.0, trust=near)
    step.call.hot[0].copy_(calls.between(calls.importance_of(step.call), 0.03))
    step.weights[triton_predicted.EXTRA][:, 1] = -30.0 if liar == "nothing matters" else 30.0
    step.weights[triton_predicted.LIMIT].fill_(3.0)
    dropped = []
    for _ in range(3):
        got = check(step, triton_device)
        step = step.after(got)
        dropped.append(bool(got.trust[..., audit.DROPPED].all()))
    assert (dropped[0], dropped[-1]) == (False, True), dropped
    bit = audit.MISSED if liar == "nothing matters" else audit.LAVISH
    assert (got.trust[..., audit.FLAGS].long() & bit).all()
    assert (got.trust[..., audit.HELD] > 0).all()


def test_a_gate_that_is_no_number_is_not_used(triton_device):
    """One head of it: the kv head goes by the exact look-ahead, the other as before."""
    step = triton_predicted.make()
    plain = check(step, triton_device)
    step.weights[triton_predicted.AGE][3] = torch.nan
    got = check(step, triton_device)
    assert got.trust[:, 1, audit.FLAGS].eq(audit.NO_NUMBER).all()
    assert got.trust[:, 0, audit.FLAGS].eq(0).all()
    assert torch.equal(got.out[:, :2], plain.out[:, :2])


@pytest.mark.parametrize("trust", [{}, HELD_OFF])
def test_a_key_that_is_no_number_leaves_no_trace_in_the_history(trust, triton_device):
    step = triton_predicted.make(trust=trust)
    step.call.planes[2][0, 0, 70] = torch.nan
    got, wanted = triton_predicted.by_kernels(step, triton_device), predicted.by_reference(step)
    assert got.out[0, :2].isnan().all()
    assert not got.out[0, 2:].isnan().any()
    assert got.history.isfinite().all()
    torch.testing.assert_close(got.history, wanted.history, rtol=0, atol=NETWORK["kernel"].relative)
    torch.testing.assert_close(got.trust, wanted.trust, rtol=NETWORK["trust"].relative, atol=1e-6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CPU tensors go to the compiled core")
def test_the_operator_is_these_kernels(triton_device):
    step = triton_predicted.make(skip=20.0)
    q, planes, hot, balance, seen, _ = step.call.arguments(triton_device)
    kept = [x.to(triton_device) for x in step.kept]
    weights = [x.to(triton_device) for x in step.weights]
    out = torch.ops.lamp.fused_predicted(q, *planes, *hot, balance, *seen, *kept, *weights, **step.options)
    wanted = triton_predicted.by_kernels(step, triton_device)
    for got, name in zip((out, *hot[3:], *kept[1:]), ("out", "state", "stats", "history", "trust"), strict=True):
        assert torch.equal(got.cpu(), getattr(wanted, name)), name


@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize(("dim", "rank"), [(128, 16), (80, 7)])
def test_summaries(dim, rank, paged, triton_device):
    """First, middle and last of a group; one sequence takes nothing; a group with a key that is no number."""
    from lamp_compile.runtime.kernels import summarize_row

    torch.manual_seed(0)
    made = formats.get("nested8").quantize(torch.randn(5, 2, 96, dim))
    high, residual = (plane.reshape(5, 2, 3, 32, dim // 2) for plane in made[:2])
    planes, table = [high, residual, made[2].clone()], None
    planes[2][3, 1, 40] = torch.nan
    if paged:
        order = torch.randperm(15)
        planes = [torch.empty_like(p) for p in planes]
        for plane, source in zip(planes, (high, residual, made[2]), strict=True):
            tiles = source.reshape(5, 2, 3, -1).transpose(1, 2).flatten(0, 1)
            pool = torch.empty_like(tiles).index_copy_(0, order, tiles)
            plane.view(-1).copy_(pool.transpose(0, 1).reshape(-1))
        planes = [p.reshape(1, 2, 15, 32, -1) for p in planes[:2]] + [planes[2].reshape(1, 2, 480)]
        table = order.view(5, 3).to(torch.int32)
        table[4, 1] = -1
    key, bias = torch.randn(2, dim, rank).half(), torch.randn(2, rank)
    positions = torch.tensor([0, 37, -1, 40, 63])
    before = torch.randn(*planes[0].shape[:2], planes[0].shape[2] * 4, rank).half()
    wanted = before.clone()
    with pytest.MonkeyPatch.context() as patch:  # the definition itself, where the CPU has a kernel
        patch.setattr("lamp_compile.runtime.kernels.why_not_summarize", lambda *args: "not here")
        torch.ops.lamp.summarize(
            *planes, wanted, key, bias, positions, table, rows=1, group=8, k_format="nested8", site=""
        )
    there = [x.to(triton_device, copy=True) for x in (*planes, before, key, bias, positions)]
    summarize_row.summarize(
        tuple(there[:3]), there[3], *there[4:7], None if table is None else table.to(triton_device), 8
    )
    got = there[3].cpu()
    touched = (wanted != before) & ~wanted.isnan()
    assert touched.any()
    assert torch.equal(got.isnan(), wanted.isnan())
    assert torch.equal(got[~touched & ~got.isnan()], before[~touched & ~got.isnan()])
    torch.testing.assert_close(
        got[touched].float(), wanted[touched].float(), rtol=NETWORK["rounding"].relative, atol=1e-3
    )
