"""A step that a look-ahead network predicts, in the compiled core: what the reference says, nothing read that need not
be."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lamp_compile.errors import InputError, LampError
from lamp_compile.runtime import guard, kernels
from lamp_compile.runtime.network import audit
from tests.kernels import calls, predicted
from tests.kernels.test_cpu import threads
from tests.kernels.test_decode import normal, random_mask, split_mask
from tests.tolerances import PREDICTED

SEGMENT = 2048
HELD = guard.new_state(2, 2)
HELD[0, 1, guard.FLOOR] = 1.0

CASES = {
    **{f"group {g}": {"heads": g * 2, "keys": 100} for g in (1, 3, 4, 5, 16)},
    **{f"dim {d}": {"dim": d, "kv_heads": 1, "batch": 1} for d in (48, 80, 128, 256)},
    **{f"rank {r}": {"rank": r} for r in (1, 8, 24, 33, 48, 64)},
    **{f"summaries of {g}": {"group": g} for g in (1, 4, 32)},
    "rank 8 at the end": {"rank": 8, "keys": 160, "batch": 1},
    "weights in float32": {"half": False, "rank": 20},
    "value dim": {"dim": 128, "value_dim": 64, "kv_heads": 1},
    "one key": {"keys": 1},
    "lengths": {"lengths": torch.tensor([150, 41])},
    "one length for all": {"lengths": torch.tensor([77])},
    "an empty sequence": {"lengths": torch.tensor([0, 65])},
    "left padding": {"start": torch.tensor([0, 100])},
    "window": {"causal": "bottom_right", "window": 70},
    "padding and window": {
        "start": torch.tensor([3, 60]), "lengths": torch.tensor([140, 100]), "causal": "bottom_right", "window": 50,
    },
    "softcap": {"softcap": 2.0, "sharpness": 3.0},
    "sinks": {"sinks": normal(4) * 3},
    "mask": {"mask": random_mask(2, 1, 1, 150)},
    "mask per head": {"mask": random_mask(2, 4, 1, 150)},
    "heads that see different sub-tiles": {"mask": split_mask()},
    "masked rows": {"mask": torch.zeros(2, 1, 1, 150, dtype=torch.bool)},
    "bias": {"bias": normal(1, 4, 1, 150) * 2},
    "balance": {"balance": normal(2, 64).exp()},
    "no rotation": {"rotation": "none"},
    "bfloat16": {"dtype": torch.bfloat16},
    "sub-tile 64": {"tile": 64, "subtile": 64},
    "sub-tile 128": {"tile": 128, "subtile": 128, "keys": 300},
    "sub-tile 64 of 128, skipping": {"tile": 128, "subtile": 64, "keys": 1000, "skip": 0.3},
    "several segments": {"keys": 2 * SEGMENT + 333, "batch": 1, "heads": 2, "kv_heads": 1},
    "a late window": {"keys": 3 * SEGMENT, "batch": 1, "causal": "bottom_right", "window": 900, "skip": 0.5},
    "pages": {
        "keys": 150, "batch": 1, "table": torch.tensor([[3, 0, 4, 1, 2], [1, 4, -1, -1, -1]], dtype=torch.int32),
        "lengths": torch.tensor([150, 60]),
    },
    "nothing refined": {"tau": calls.COLD},
    "everything refined": {"tau": 0.0},
    "floor 1": {"floor": 1.0, "skip": 0.5},
    "skipping": {"keys": 1000, "skip": 0.4},
    "skipping little": {"keys": 1000, "skip": 0.05, "margin": 3.0},
    "skipping with a mask": {"keys": 700, "skip": 0.4, "mask": random_mask(2, 1, 1, 700, share=0.9)},
    "a step that skips nothing": {"keys": 1000, "skip": 0.4, "steps": 32.0},
    "dropped": {"keys": 600, "level": -9.0, "limit": 1e-3, "skip": 0.1, "steps": 16.0},
    "called too much": {"keys": 600, "level": 9.0, "tau": 0.01},
    "too long": {"lengths": torch.tensor([150, 60]), "trained": 100, "skip": 0.5},
    "overruled": {"state": HELD, "skip": 0.5},
}  # fmt: skip


def made(name: str) -> predicted.Step:
    given = dict(CASES[name])
    if name == "pages":  # the pool has one sequence of planes, the call two
        step = predicted.make(**{**given, "table": None, "lengths": None, "tau": 0.01})
        q = calls.queries((2, *step.call.q.shape[1:]), 1.0, None, "hadamard", 2)
        hot = (*step.call.hot[:3], guard.new_state(2, 2), guard.new_stats(2, 2))
        seen = (None, None, None, None, given["lengths"], given["table"])
        kept = (step.kept[0], step.kept[1].repeat(2, 1, 1, 1), step.kept[2].repeat(2, 1, 1))
        return replace(step, call=replace(step.call, q=q, hot=hot, seen=seen), kept=kept)
    return predicted.make(**given)


def check(step: predicted.Step, native: calls.Native) -> predicted.After:
    """The kernel leaves what the reference does; over planes by lanes the same bits."""
    got, wanted = predicted.by_kernel(step, native), predicted.by_reference(step)
    assert all(got.same(predicted.by_kernel(laid, native)) for laid in predicted.layouts(step, native))
    assert torch.equal(got.stats, wanted.stats), (got.stats, wanted.stats)
    assert calls.whole(got.out, wanted.out) < PREDICTED["output"].bound
    for name in ("state", "history", "trust"):
        ours, theirs = getattr(got, name), getattr(wanted, name)
        assert torch.equal(ours.isnan(), theirs.isnan()), name
        assert torch.allclose(ours, theirs, rtol=PREDICTED[name].bound, atol=1e-6, equal_nan=True), name
    return got


@pytest.mark.parametrize("name", CASES)
def test_the_kernel_leaves_what_the_reference_does(name: str, native: calls.Native) -> None:
    step = made(name)
    got = check(step, native)
    believed = got.trust[..., audit.EXACT] == 0
    if name in ("too long", "overruled"):
        assert (~believed).sum() == 2 if name == "too long" else not believed[0, 1]
        assert believed.any()
    else:
        assert believed.all()
    if name == "dropped":
        assert (got.trust[..., audit.DROPPED] == 1).all()


def test_held_off_and_numbers_that_are_none(native: calls.Native) -> None:
    step = predicted.make(skip=0.4)
    step.kept[2][0, 0, audit.HELD] = 5.0
    step.kept[1][1, 1, 2] = -1.0  # its logarithm is no number
    got = check(step, native)
    assert got.trust[..., audit.EXACT].tolist() == [[1.0, 0.0], [0.0, 1.0]]
    assert got.trust[1, 1, audit.FLAGS] == audit.NO_NUMBER
    assert got.trust[0, 0, audit.HELD] == 4.0
    assert got.trust[1, 1, audit.HELD] == audit.HOLD
    exact = calls.by_kernels(step.call, native)
    # The heads that are not believed do what the exact look-ahead does, to the bit.
    heads = exact.out.shape[1] // 2
    assert torch.equal(got.out[0, :heads], exact.out[0, :heads])
    assert torch.equal(got.out[1, heads:], exact.out[1, heads:])
    assert not torch.equal(got.out[0, heads:], exact.out[0, heads:])


@pytest.mark.parametrize("name", ["several segments", "skipping", "a late window", "dropped", "group 5"])
def test_any_number_of_threads_gives_the_same_bits(name: str, native: calls.Native) -> None:
    with threads(1):
        first = predicted.by_kernel(made(name), native)
    for count in (2, 3, 5):
        for step in predicted.layouts(made(name), native):
            with threads(count):
                assert first.same(predicted.by_kernel(step, native)), count


def spoilt(plane: Tensor, where: Tensor) -> Tensor:
    """The plane ``[B, G, P, ...]`` or scales ``[B, G, N]`` with other bits at some sub-tiles ``[B, G, T]`` of 32."""
    made, tiles = plane.clone(), where.shape[2]
    flat = made.reshape(*made.shape[:2], tiles, -1)
    if made.dtype == torch.float16:
        flat[where] = torch.nan
    else:
        flat[where] = flat[where] ^ 0x5A
    return made


@pytest.mark.parametrize("lanes", [False, True], ids=["rows", "lanes"])
def test_nothing_is_read_of_what_is_skipped_nor_the_residual_of_what_is_cold(lanes: bool, native: calls.Native) -> None:
    step = predicted.make(keys=1000, skip=0.4, margin=0.5, share=0.1, lanes=lanes)
    importance = predicted.predicted(step)[:, :, 0]
    length = torch.tensor([step.call.keys])
    below = audit.skip_threshold(0.4, step.weights[5], length, 32)[..., None]
    live, cold = importance >= 0, importance <= step.call.hot[0][:, None]
    skipped = live & (importance <= below)
    assert 0.1 < float(skipped.sum() / live.sum()) < 0.9
    clean = predicted.by_kernel(step, native)
    assert int(clean.stats[..., guard.LIVE].sum()) == int((live & ~skipped).sum())
    assert int(clean.stats[..., guard.REFINED].sum()) == int((live & ~skipped & ~cold).sum())
    k_high, k_residual, k_scale, v_high, v_residual, v_scale = step.call.planes
    planes = (
        spoilt(k_high, skipped), spoilt(k_residual, skipped | cold), spoilt(k_scale, skipped),
        spoilt(v_high, skipped), spoilt(v_residual, skipped | cold), spoilt(v_scale, skipped),
    )  # fmt: skip
    other = replace(step, call=replace(step.call, planes=planes))
    assert clean.same(predicted.by_kernel(other, native))
    step.kept[2][..., audit.STEPS] = 2 * audit.WINDOW  # now everything is read, and found to be spoilt
    assert predicted.by_kernel(replace(other, kept=step.kept), native).out.isnan().all()


def test_the_audit_hears_of_what_is_refined_from_both_planes(native: calls.Native) -> None:
    """Its energies are those of the weights that the step ended up with, not of the exact look-ahead."""
    step = predicted.make(keys=500, share=0.9, sharpness=3.0)
    everything = replace(step, call=replace(step.call, hot=(torch.zeros(2), *step.call.hot[1:])))
    mine, both = (predicted.by_kernel(x, native).history[..., 0] for x in (step, everything))
    exact = calls.importance_of(step.call)[:, :, 0].clamp_min(0.0)
    assert calls.whole(mine, both) < 0.5 * calls.whole(exact, both)
    assert calls.whole(both, exact) > 1e-3


@pytest.mark.parametrize("level", [0.0, -9.0, 9.0])
def test_many_steps_with_gates_that_lie_and_that_do_not(level: float, native: calls.Native) -> None:
    """History and trust go their way as in the reference, dropped and tried again."""
    one = other = predicted.make(
        keys=1000, batch=1, heads=2, level=level, tau=0.1, skip=0.1, steps=0.0, limit=4.0, sharpness=3.0
    )
    for i in range(audit.WINDOW + audit.HOLD + 8):
        q = calls.queries(tuple(one.call.q.shape), 3.0, None, "hadamard", 2) if i % 5 == 0 else one.call.q
        one, other = (replace(x, call=replace(x.call, q=q)) for x in (one, other))
        one, other = one.after(predicted.by_kernel(one, native)), other.after(predicted.by_reference(other))
    assert torch.allclose(one.kept[2], other.kept[2], rtol=PREDICTED["steps"].bound)
    assert torch.allclose(one.kept[1], other.kept[1], rtol=PREDICTED["steps"].bound, atol=1e-6)
    assert torch.equal(one.call.hot[4], other.call.hot[4])
    flags = one.kept[2][..., audit.FLAGS].long()
    if level:
        assert (flags & (audit.MISSED if level < 0 else audit.LAVISH)).all()
        assert (one.kept[2][..., audit.DROPPED] >= 2).all(), "tried again after a hold"


@pytest.mark.parametrize("group", [1, 4, 8, 32])
def test_summaries_of_planes_by_lanes_are_the_same(group: int, native: calls.Native) -> None:
    """To the bit; and nothing else is written."""
    step, weights = predicted.make(group=group), (torch.randn(2, 64, 16), torch.randn(2, 16))
    made = []
    for laid in predicted.layouts(step, native):
        made.append(step.kept[0].clone())
        keys = laid.call.planes[:3]
        assert kernels.why_not_summarize(keys, made[-1], 1, group, "nested8") is None
        kernels.summarize(keys, made[-1], weights, torch.tensor([149, 38]), None, group)
    assert len(made) == 2
    assert torch.equal(*made)
    changed = (made[0] != step.kept[0]).any(-1).any(1)
    assert changed.nonzero().tolist() == [[0, 149 // group], [1, 38 // group]]


def test_wrong_shapes_are_refused_before_anything_is_read() -> None:
    step = predicted.make()
    summary, history, trust = step.kept
    for index, kept in enumerate(
        ((summary[:, :1], history, trust), (summary, history[:, :, 1:], trust), (summary, history, trust[:1]))
    ):
        with pytest.raises(InputError, match=("summar", "history", "trust")[index]):
            run(replace(step, kept=tuple(x.contiguous() for x in kept)))  # type: ignore[arg-type]
    for index in range(6):
        weights = list(step.weights)
        weights[index] = weights[index][..., :-1]
        with pytest.raises(InputError):
            run(replace(step, weights=tuple(weights)))
    with pytest.raises(InputError, match=r"room for|do not belong"):
        run(replace(step, options={**step.options, "room": step.options["room"] * 2}))


@pytest.mark.parametrize("lane", ["kernel", "reference"])
@pytest.mark.parametrize("wrong", [{"rotation": "zzz"}, {"query_bits": 3}, {"guard_hold": -1}, {"window": -5}], ids=str)
def test_settings_that_mean_nothing_are_refused(lane: str, wrong: dict[str, object]) -> None:
    step = predicted.make()
    rule = {} if lane == "kernel" else {"rule": "lamp_strict"}  # networks' kernels know one rule
    run(replace(step, options={**step.options, **rule}))
    with pytest.raises(LampError, match=next(iter(wrong))):
        run(replace(step, options={**step.options, **rule, **wrong}))


def run(step: predicted.Step) -> Tensor:
    call = step.call
    out: Tensor = torch.ops.lamp.fused_predicted(
        call.q, *call.planes, *call.hot, *step.seen, *step.kept, *step.weights, **step.options
    )
    return out
