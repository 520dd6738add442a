"""Spoilt keys, dead garbage, repetition: what must be seen is flagged, what must not matter changes no bit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lamp_compile.ir import Floor
from lamp_compile.runtime import guard
from tests.kernels import calls
from tests.kernels.calls import bits, same
from tests.kernels.test_decode import in_pool

K_SCALE, V_SCALE = 2, 5


def spoil(call: calls.Call, plane: int, value: float, place: tuple[int, ...]) -> calls.Call:
    """One key's scale, as ``append`` stores a row that is not finite."""
    planes = [x.clone() for x in call.planes]
    planes[plane][place] = value
    return replace(call, planes=tuple(planes))


SETTINGS = {
    "mixed": {},
    "cold": {"tau": calls.COLD},
    "refined": {"floor": 1.0},
    "masked": {"mask": torch.ones(1, 70) > 0},
}


@pytest.mark.parametrize(
    ("name", "plane", "value"),
    [
        *((name, plane, torch.nan) for name in ("mixed", "cold", "masked") for plane in (K_SCALE, V_SCALE)),
        ("refined", K_SCALE, torch.nan), ("refined", V_SCALE, torch.nan),
        ("mixed", K_SCALE, torch.inf), ("cold", V_SCALE, torch.inf),
    ],
)  # fmt: skip
def test_one_spoilt_key_is_its_own_heads_matter(name, plane, value, device):
    clean = calls.make(keys=70, **SETTINGS[name])
    before = calls.by_kernels(clean, device)
    got = calls.by_kernels(spoil(clean, plane, value, (0, 1, 40)), device)
    hit = torch.zeros(2, 2, dtype=torch.bool)
    hit[0, 1] = True
    rows = hit.repeat_interleave(2, 1)
    assert got.out[rows].isnan().all()
    for name in ("out", "lse", "certificate"):
        assert torch.equal(bits(getattr(got, name)[~rows]), bits(getattr(before, name)[~rows])), name
    for name in ("state", "stats"):
        assert torch.equal(getattr(got, name)[~hit], getattr(before, name)[~hit]), name
    error, level, hold, flags = got.state[0, 1].tolist()
    assert (error, level, hold) == (0.0, Floor.EXACT, 64.0)
    assert int(flags) == guard.NONFINITE + guard.EXACT_MISSING
    assert got.stats[0, 1, [guard.STEPS, guard.RAISED, guard.BAD]].tolist() == [1, 0, 1]


def test_a_head_stays_flagged_and_works_again_once_the_key_is_gone(device):
    clean = calls.make(keys=70)
    bad = calls.by_kernels(spoil(clean, K_SCALE, torch.nan, (0, 0, 3)), device)
    after = calls.by_kernels(replace(clean, hot=(*clean.hot[:3], bad.state, bad.stats)), device)
    assert after.out.isfinite().all()
    assert int(after.state[0, 0, guard.FLAGS]) & guard.NONFINITE
    assert after.state[..., guard.FLOOR].tolist() == [[2.0, 0.0], [0.0, 0.0]]
    assert after.stats[0, 0, guard.REFINED] == 3 + int(bad.stats[0, 0, guard.REFINED])


def check_spoilt_query(device, **settings) -> calls.Outcome:
    """One row's query is NaN: that row alone is lost, and its kv head is flagged."""
    clean = calls.make(tokens=2, causal="bottom_right", keys=70, tau=calls.COLD, **settings)
    before, q = calls.by_kernels(clean, device), clean.q.clone()
    q[1, 2, 0, 5] = torch.nan
    got = calls.by_kernels(replace(clean, q=q), device)
    rows = torch.zeros(got.lse.shape, dtype=torch.bool)
    rows[1, 2, 0] = True
    assert got.lse[rows].isnan().all()
    assert got.out[~rows].isfinite().all()
    assert torch.equal(got.out[0], before.out[0])
    assert got.state[..., guard.FLOOR].tolist() == [[0.0, 0.0], [0.0, 2.0]]
    assert int(got.state[1, 1, guard.FLAGS]) & guard.NONFINITE
    return got


def test_a_spoilt_query_is_its_own_rows_matter(device):
    check_spoilt_query(device)


def test_a_spoilt_query_looks_spoilt(device):
    assert check_spoilt_query(device).out[1, 2, 0].isnan().all()


@pytest.mark.parametrize("plane", [K_SCALE, V_SCALE], ids=["key", "value"])
def test_a_spoilt_key_that_is_alone_looks_spoilt(plane, device):
    call = spoil(calls.make(keys=40, lengths=torch.tensor([1, 40])), plane, torch.nan, (0, 0, 0))
    got = calls.by_kernels(call, device)
    assert got.out[1].isfinite().all()
    assert int(got.state[0, 0, guard.FLAGS]) & guard.NONFINITE
    assert got.out[0, :2].isnan().all()


ZEROS = torch.zeros(2, 1, 3, 70)


@pytest.mark.parametrize(
    ("plane", "bias", "floor"),
    [
        (K_SCALE, None, 0.0), (K_SCALE, None, 1.0), (V_SCALE, None, 0.0), (K_SCALE, ZEROS, 0.0),
        (V_SCALE, None, 1.0), (V_SCALE, ZEROS, 0.0),
    ],
)  # fmt: skip
def test_a_spoilt_key_does_not_reach_the_tokens_before_it(plane, bias, floor, device):
    """Tokens of one program see different keys; a weight of 0 takes nothing, not even NaN."""
    clean = calls.make(tokens=3, causal="bottom_right", keys=70, tau=calls.COLD, floor=floor, bias=bias, batch=2)
    got = calls.by_kernels(spoil(clean, plane, torch.nan, (0, 0, 69)), device)
    assert got.out[0, :2, 2].isnan().all()
    assert got.out[0, :2, :2].isfinite().all()
    assert got.lse[0, :2, :2].isfinite().all()
    assert got.out[1].isfinite().all()
    assert got.out[0, 2:].isfinite().all()


@pytest.mark.parametrize("tau", [calls.COLD, 0.05, 0.0], ids=["cold", "mixed", "refined"])
@pytest.mark.parametrize("plane", [K_SCALE, V_SCALE], ids=["key", "value"])
@pytest.mark.parametrize("keys", [(40,), range(32, 64)], ids=["one", "all"])
def test_spoilt_keys_do_not_reach_heads_that_see_none_of_their_sub_tile(keys, plane, tau, device):
    """Their largest score is nobody's: weights relative to it are none, and neither is a scale that is NaN."""
    mask = torch.ones(1, 4, 1, 96, dtype=torch.bool)
    mask[:, 0, :, 32:64] = False
    call = calls.make(keys=96, batch=1, kv_heads=1, mask=mask, tau=tau)
    for key in keys:
        call = spoil(call, plane, torch.nan, (0, 0, key))
    got = calls.by_kernels(call, device)
    assert got.out[:, 1:].isnan().all()
    for name in ("out", "lse", "certificate"):
        assert getattr(got, name)[:, 0].isfinite().all(), name
    assert int(got.state[0, 0, guard.FLAGS]) & guard.NONFINITE


GARBAGE = {
    "lengths": {"lengths": torch.tensor([97, 33])},
    "left padding": {"start": torch.tensor([40, 5]), "lengths": torch.tensor([150, 70])},
    "window": {"causal": "bottom_right", "window": 40, "lengths": torch.tensor([97, 150])},
    "tokens": {"tokens": 3, "causal": "bottom_right", "lengths": torch.tensor([97, 33])},
    "an empty sequence": {"lengths": torch.tensor([0, 70])},
    "floor 1": {"floor": 1.0, "lengths": torch.tensor([97, 33])},
    "strict": {"rule": "lamp_strict", "lengths": torch.tensor([97, 33])},
    "wide tiles": {"tile": 128, "lengths": torch.tensor([97, 33])},
}


def garbage(call: calls.Call) -> calls.Call:
    """Random bytes and NaN scales wherever no row looks."""
    live = torch.zeros(2, call.planes[2].shape[2], dtype=torch.bool)
    tokens, window = call.q.shape[2], call.options["window"]
    for b in range(2):
        end = int(call.seen[4][b])
        first = 0 if call.seen[3] is None else int(call.seen[3][b])
        live[b, max(first, end - tokens + 1 - window if window else 0) : end] = True
    tile = call.planes[0].shape[3]
    dead = ~live[:, None].expand(2, 2, -1)
    planes = [x.clone() for x in call.planes]
    for index in (K_SCALE, V_SCALE):
        planes[index][dead] = torch.nan
    for index in (0, 1):
        rows = planes[index].flatten(2, 3)
        rows[dead] = torch.randint(0, 256, rows[dead].shape, dtype=torch.uint8)
    for index in (3, 4):
        x = planes[index].transpose(-1, -2).flatten(2, 3)
        x[dead] = torch.randint(0, 256, x[dead].shape, dtype=torch.uint8)
        planes[index] = x.unflatten(2, (-1, tile)).transpose(-1, -2).contiguous()
    return replace(call, planes=tuple(planes))


@pytest.mark.parametrize("name", GARBAGE)
def test_dead_garbage_changes_no_bit(name, device):
    clean = calls.make(**{"heads": 2, "kv_heads": 2, **GARBAGE[name]})
    dirty = garbage(clean)
    assert dirty.planes[2].isnan().any()
    same(calls.by_kernels(clean, device), calls.by_kernels(dirty, device))


def test_garbage_in_pages_of_nobody_changes_no_bit(device, monkeypatch):
    calls.use_launch(monkeypatch)  # the launches that read pages, for both
    clean = calls.make(lengths=torch.tensor([97, 33]))
    pooled = in_pool(garbage(clean))
    free = torch.ones(pooled.planes[0].shape[2], dtype=torch.bool)
    free[pooled.seen[5][pooled.seen[5] >= 0].long()] = False
    for index in (K_SCALE, V_SCALE):
        pooled.planes[index].unflatten(2, (-1, 32))[:, :, free] = torch.nan
    same(calls.by_kernels(clean, device), calls.by_kernels(pooled, device))


@pytest.mark.parametrize("settings", [{}, {"tokens": 4, "causal": "bottom_right"}], ids=["one token", "four tokens"])
def test_repeated_it_gives_the_same_bits(settings, device, monkeypatch):
    """Programs finish in any order; sums must not depend on it."""
    call = calls.make(heads=2, kv_heads=1, **settings)
    for most_finished in (0, 128) if device.type == "cuda" else (0,):
        calls.use_launch(monkeypatch, programs=64, least_subtiles=1, most_finished=most_finished)
        first = calls.by_kernels(call, device)
        for _ in range(20 if device.type == "cuda" else 2):
            same(first, calls.by_kernels(call, device))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a CUDA device")
def test_a_graph_of_append_and_read_replays_to_the_same_bits(triton_device):
    """The row that a replay appends is read by the attention behind it, every time."""
    from lamp_compile.runtime.kernels import append_rows, decode

    q, planes, hot, balance, seen, options = calls.make(
        dim=128, heads=32, kv_heads=8, keys=8192, batch=4, lengths=torch.tensor([1, 1, 1, 1]), share=0.1,
    ).arguments(triton_device)  # fmt: skip
    lengths = seen[4]
    k, v = torch.randn(2, 4, 8, 1, 128, device=triton_device)
    noise = torch.randn(4, 8, 1, 128, device=triton_device)

    def step() -> torch.Tensor:
        append_rows.append(k + lengths[:, None, None, None] * noise * 1e-3, v, planes, None, lengths, None, "hadamard")
        lengths.add_(1)
        return decode.decode(q, planes, hot, balance, seen, options).out

    start = torch.tensor([100, 2000, 5000, 7000], device=triton_device)
    saved = [x.clone() for x in hot[3:]]
    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    runs = []
    for _ in range(3):
        lengths.copy_(start)
        for x, y in zip(hot[3:], saved, strict=True):
            x.copy_(y)
        outs = []
        for _ in range(300):
            graph.replay()
            outs.append(out.clone())
        runs.append((torch.stack(outs), hot[3].clone(), hot[4].clone()))
    for one in runs[1:]:
        for got, wanted in zip(one, runs[0], strict=True):
            assert torch.equal(got, wanted)
    lengths.copy_(start + 299)
    for x, y in zip(hot[3:], saved, strict=True):
        x.copy_(y)
    assert torch.isfinite(runs[0][0]).all()
    assert not torch.equal(runs[0][0][0], runs[0][0][-1])
