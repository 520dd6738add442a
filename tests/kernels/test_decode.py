"""The fused attention against the reference operators: same decisions, same numbers, nothing worse."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lamp_compile.ir import Precision
from lamp_compile.runtime import certificate, layout
from tests.kernels import calls
from tests.tolerances import ARITHMETIC, KERNELS, limits


def random_mask(*shape: int, share: float = 0.6) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(9)) < share


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


def split_mask() -> torch.Tensor:
    """Two heads of a kv head that see different sub-tiles."""
    mask = torch.ones(2, 4, 1, 150, dtype=torch.bool)
    mask[:, 0, :, 64:] = False
    mask[:, 1, :, :64] = False
    return mask


CASES = {
    **{f"group {g}": {"heads": g * n, "kv_heads": n, "keys": 100} for g, n in
       ((1, 2), (2, 2), (3, 1), (4, 1), (7, 1), (8, 1), (16, 1))},
    **{f"dim {d}": {"dim": d, "kv_heads": 1, "batch": 1} for d in (80, 96, 128, 192, 256)},
    "value dim": {"dim": 128, "value_dim": 64, "kv_heads": 1},
    "wider values": {"dim": 64, "value_dim": 96, "kv_heads": 1, "batch": 1},
    "one key": {"keys": 1},
    "lengths": {"lengths": torch.tensor([150, 41])},
    "one length for all": {"lengths": torch.tensor([77])},
    "an empty sequence": {"lengths": torch.tensor([0, 65])},
    "only empty sequences": {"lengths": torch.tensor([0, 0])},
    "left padding": {"start": torch.tensor([0, 100])},
    "window": {"causal": "bottom_right", "window": 70},
    "padding and window": {
        "start": torch.tensor([3, 60]), "lengths": torch.tensor([140, 100]), "causal": "bottom_right", "window": 50,
    },
    "softcap": {"softcap": 2.0, "sharpness": 3.0},
    "sinks": {"sinks": normal(4) * 3},
    "one sink for all heads": {"sinks": normal(1)},
    "sinks of empty rows": {"sinks": normal(4), "lengths": torch.tensor([0, 90])},
    "mask": {"mask": random_mask(2, 1, 1, 150)},
    "mask per head": {"mask": random_mask(2, 4, 1, 150)},
    "mask of two axes": {"mask": random_mask(1, 150)},
    "one column for all keys": {"mask": torch.tensor([True, False]).view(2, 1, 1, 1)},
    "masked rows": {"mask": torch.zeros(2, 1, 1, 150, dtype=torch.bool)},
    "bias": {"bias": normal(1, 4, 1, 150) * 2},
    "bias with -inf": {"bias": torch.zeros(2, 1, 1, 150).masked_fill(~random_mask(2, 1, 1, 150), -torch.inf)},
    "bias in half precision": {"bias": normal(2, 1, 1, 150).half()},
    "balance": {"balance": normal(2, 64).exp()},
    "balance per sequence": {"balance": normal(2, 2, 64).exp()},
    "no rotation": {"rotation": "none"},
    "no rotation, balance": {"rotation": "none", "balance": normal(2, 64).exp()},
    "bfloat16": {"dtype": torch.bfloat16},
    "float16": {"dtype": torch.float16},
    "sharp": {"sharpness": 4.0},
    "strict": {"rule": "lamp_strict", "sharpness": 2.0},
    "strict with sinks": {"rule": "lamp_strict", "sinks": normal(4) * 3},
    "relaxed": {"rule": "lamp_relaxed", "sharpness": 2.0},
    "relaxed with bias": {"rule": "lamp_relaxed", "bias": normal(1, 4, 1, 150), "softcap": 3.0},
    "tile 64": {"tile": 64},
    "sub-tile 64": {"tile": 64, "subtile": 64},
    "tile 128": {"tile": 128},
    "sub-tile 128": {"tile": 128, "subtile": 128, "keys": 300},
    "sub-tile 64 of 128": {"tile": 128, "subtile": 64, "keys": 200},
    "nothing refined": {"tau": calls.COLD},
    "tau 0": {"tau": 0.0},
    "tau per sequence": {"tau": torch.tensor([[0.1, 1e9], [0.0, 0.05]])},
    "floor 1": {"floor": 1.0},
    "floor 1 of one head": {"floor": torch.tensor([[0.0, 1.0], [0.0, 0.0]])},
    "state 1 of one head": {
        "state": torch.tensor([[[0.0, 0, 0, 0], [0.01, 1, 5, 0]], [[0.0, 2, 0, 1], [0.0, 0, 0, 0]]]),
    },
    "floor 1, lengths": {"floor": 1.0, "lengths": torch.tensor([0, 65]), "rule": "lamp_strict"},
    "two tokens": {"tokens": 2, "causal": "bottom_right"},
    "five tokens": {"tokens": 5, "causal": "bottom_right", "sharpness": 2.0},
    "five tokens, lengths": {
        "tokens": 5, "causal": "bottom_right", "lengths": torch.tensor([97, 3]), "kv_heads": 1, "tau": 0.1,
    },
    "tokens without order": {"tokens": 3},
    "nine tokens, top left": {"tokens": 9, "causal": "top_left", "keys": 40, "batch": 1},
    "more tokens than keys": {"tokens": 9, "causal": "bottom_right", "keys": 4, "batch": 1},
    "forty tokens, window": {
        "tokens": 40, "causal": "bottom_right", "window": 60, "kv_heads": 1, "heads": 2, "batch": 1,
    },
    "tokens, mask per row": {"tokens": 5, "mask": random_mask(2, 1, 5, 150), "share": 0.1},
    "tokens, bias": {"tokens": 3, "bias": normal(2, 1, 3, 150), "causal": "bottom_right", "share": 0.1},
    "tokens, strict": {"tokens": 4, "causal": "bottom_right", "rule": "lamp_strict", "share": 0.1},
    "tokens, relaxed": {"tokens": 4, "causal": "bottom_right", "rule": "lamp_relaxed", "share": 0.1},
    "a last block of fewer tokens": {
        "tokens": 9, "heads": 3, "kv_heads": 1, "mask": random_mask(2, 1, 9, 150), "tau": 0.0, "rule": "lamp_relaxed",
    },
    "tokens, floor 1": {"tokens": 3, "causal": "bottom_right", "floor": 1.0},
}  # fmt: skip


def check(call: calls.Call, device: calls.Where) -> calls.Outcome:
    """Kernels against the reference with the same decisions; on a CPU over planes by lanes as well."""
    levels = calls.levels_of(call, calls.decided_together(call, device))
    wanted, exact = calls.by_reference(call, levels), call.exact()
    found = [calls.by_kernels(laid, device) for laid in calls.layouts(call, device)]
    for got in found:
        check_outcome(call, device, got, wanted, exact, levels)
        # Chunks that are looked at whole add weights up in another order.
        if isinstance(device, calls.Native) and (call.keys < calls.CHUNK or device.name != "avx512"):
            calls.same(got, found[0])
    return found[0]


def check_outcome(call, device, got, wanted, exact, levels) -> None:
    """Numbers, decisions, certificate and guard."""
    assert (got.out.dtype, got.out.shape) == (wanted.out.dtype, wanted.out.shape)
    assert got.lse.dtype == got.certificate.dtype == torch.float32
    seen = wanted.lse != -torch.inf
    assert torch.equal(got.lse != -torch.inf, seen)
    assert not got.out[~seen].any()
    assert not got.certificate[~seen].any()
    bounds = limits(isinstance(device, calls.Native))
    if seen.any():
        assert float((got.lse - wanted.lse)[seen].abs().max()) <= bounds["lse"].bound
    rounding = 0.0 if call.q.dtype == torch.float32 else ARITHMETIC[call.q.dtype].relative
    cold = bool((levels == Precision.HIGH).any())
    assert calls.worst(got.out, wanted.out) <= bounds["rows" if cold else "refined"].bound + rounding
    assert calls.whole(got.out, wanted.out) <= bounds["output" if cold else "refined"].bound + rounding
    assert calls.whole(got.out, exact) <= bounds["truth"].bound * calls.whole(wanted.out, exact)
    if seen.any():
        (check_same_certificate if isinstance(device, calls.Native) else check_certificate)(got, wanted, seen)
    check_guard(call, got, levels)
    assert torch.equal(got.stats, wanted.stats)


def check_same_certificate(got, wanted, seen) -> None:
    """On a CPU it is the reference's own sum."""
    share = (got.certificate / wanted.certificate)[seen]
    assert float((share - 1).abs().max()) <= limits(native=True)["certificate"].bound


def check_certificate(got, wanted, seen) -> None:
    """Each of the three sums is at least the reference's, and what they add up to not much more."""
    assert float((got.certificate / wanted.certificate)[seen].min()) >= KERNELS["understated"].bound
    ratio = certificate.estimate(got.out, got.certificate) / certificate.estimate(wanted.out, wanted.certificate)
    assert float(ratio[seen].max()) <= KERNELS["overstated"].bound


def check_guard(call, got, levels) -> None:
    """The guard's own step, taken from what the kernel certified; it squares the rounded output, the kernel its own."""
    state, stats = calls.guarded(call, got.out, got.lse, got.certificate, levels)
    error = 2 * ARITHMETIC[call.q.dtype].relative + KERNELS["guard"].bound
    torch.testing.assert_close(got.state, state, rtol=error, atol=0)
    assert torch.equal(got.stats, stats)


def sequences(case) -> int:
    """Two where something is given for two."""
    given = {
        name: x.shape[0]
        for name, x in case.items()
        if isinstance(x, torch.Tensor) and (name, x.dim()) != ("balance", 2)
    }
    return 2 if 2 in given.values() else 1


@pytest.mark.parametrize("name", CASES)
def test_kernels_do_what_the_reference_does(name, device):
    check(calls.make(**{"batch": sequences(CASES[name]), **CASES[name]}), device)


@pytest.mark.parametrize("rule", ["energy", "lamp_strict", "lamp_relaxed"])
@pytest.mark.parametrize("tokens", [1, 4])
def test_what_the_reference_refines_is_refined(rule, tokens, device):
    """Exactly that for a single token, but for strict, whose factor 1 - z kernels leave out; for several tokens, which
    decide together, at least that."""
    call = calls.make(1, rule=rule, tokens=tokens, causal="bottom_right", share=0.2, sharpness=1.5, keys=230, batch=1)
    own = calls.levels_of(call, kernels=False)
    ours = calls.levels_of(call, calls.decided_together(call, device))
    assert not ((own == Precision.BOTH) & (ours != Precision.BOTH)).any()
    assert 0 < int((own == Precision.BOTH).sum()) < int((own > Precision.SKIP).sum())
    counted = calls.by_kernels(call, device).stats
    live, refined = counted[..., 1], counted[..., 2]
    assert torch.equal(live, (own > Precision.SKIP).sum((2, 3)))
    assert torch.equal(refined, (ours == Precision.BOTH).sum((2, 3)))
    if tokens == 1 and rule != "lamp_strict":
        assert torch.equal(own, ours)


def test_heads_of_a_group_that_see_different_keys(device):
    call = calls.make(mask=split_mask(), tau=calls.COLD)
    check(call, device)
    check(replace(call, hot=(torch.zeros(2), *call.hot[1:])), device)


LAUNCHES = {
    "many splits": {"programs": 64, "least_subtiles": 1},
    "joined by two": {"programs": 64, "least_subtiles": 1, "refine_programs": 64, "most_segments": 2},
    "merged by twos": {"programs": 12, "least_subtiles": 2, "merge_chunk": 2},
    "one warp a program": {"most_paired": 0, "programs": 12, "least_subtiles": 2},
    "few rows a program": {"most_rows": 4, "programs": 64, "least_subtiles": 1},
}


@pytest.mark.parametrize("name", LAUNCHES)
@pytest.mark.parametrize("case", ["lengths", "five tokens, lengths", "floor 1"])
def test_however_the_call_is_cut(name, case, triton_device, monkeypatch):
    calls.use_launch(monkeypatch, **LAUNCHES[name])
    check(calls.make(**{"heads": 2, **CASES[case]}), triton_device)


def test_segments_of_the_refinement(triton_device, monkeypatch):
    """Long enough for several programs of sixteen sub-tiles each."""
    calls.use_launch(monkeypatch, refine_programs=64)
    check(calls.make(keys=1200, batch=1, heads=2, kv_heads=1, start=torch.tensor([37])), triton_device)


@pytest.mark.parametrize("name", ["group 4", "group 7", "sinks", "lengths", "five tokens, lengths"])
def test_whoever_takes_the_guards_step(name, triton_device, monkeypatch):
    """Programs that join all rows of a kv head take it themselves; where each joins one row a launch does. Both as the
    reference; several tokens always have the launch."""
    from lamp_compile.runtime.kernels import decode

    launched = []
    kernel = decode.guard_step

    class Watched:
        def __getitem__(self, grid):
            launched.append(grid)
            return kernel[grid]

    monkeypatch.setattr(decode, "guard_step", Watched())
    calls.use_launch(monkeypatch)
    call = calls.make(**CASES[name])
    for most in (0, 64):
        monkeypatch.setattr(decode, "JOINED", most)
        check(call, triton_device)
        assert bool(launched) == (not most or call.q.shape[2] > 1)
        launched.clear()


@pytest.mark.parametrize(
    ("floor", "refine_programs", "kind"),
    [(0.0, 12, ""), (1.0, 12, ""), (1.0, 1, ""), (1.0, 1, "pages"), (0.0, 1, "five tokens")],
)
def test_decisions_in_chunks(floor, refine_programs, kind, triton_device, monkeypatch):
    """However many programs decide, the list is the same: shared by several programs of the refinement, or more than
    one of them gathers at a time."""
    from lamp_compile.runtime.kernels import decode

    calls.use_launch(monkeypatch, refine_programs=refine_programs)
    more = {"tokens": 5, "causal": "bottom_right"} if kind == "five tokens" else {"lengths": torch.tensor([1700, 900])}
    call = calls.make(keys=1700, batch=2, heads=2, kv_heads=1, share=0.3, start=torch.tensor([0, 517]), **more)
    call = replace(call, hot=(call.hot[0], torch.full_like(call.hot[1], floor), *call.hot[2:]))
    check(call, triton_device)
    call = in_pool(call) if kind == "pages" else call
    together = calls.by_kernels(call, triton_device)
    monkeypatch.setattr(decode, "MOST_DECIDED", 16)
    apart = calls.by_kernels(call, triton_device)
    assert torch.equal(apart.out, together.out)
    assert torch.equal(apart.stats, together.stats)
    torch.testing.assert_close(apart.certificate, together.certificate)


def test_no_key_at_all(device):
    """Room for none leaves nothing to decide, which is noted all the same."""
    call = calls.make(keys=40)
    got = calls.by_kernels(replace(call, options={**call.options, "keys": 0}), device)
    assert got.out.count_nonzero() == 0
    assert (got.lse == -torch.inf).all()
    assert got.stats.count_nonzero() == 0


def test_settings_that_change_during_a_step(triton_device, monkeypatch):
    """A controller writes tau whenever it likes: all launches of a step go by what it was when the step began."""
    from lamp_compile.runtime.kernels import decode

    calls.use_launch(monkeypatch)
    call = calls.make(keys=600, batch=1, heads=2, kv_heads=1, share=0.2)
    wanted = calls.by_kernels(call, triton_device)
    arguments = call.arguments(triton_device)
    tau, floor = arguments[2][:2]

    class Late:
        """``decide``, but everything is to be refined from here on."""

        def __getitem__(self, grid):
            tau.zero_()
            floor.fill_(1.0)
            return real[grid]

    real = decode.decide
    monkeypatch.setattr(decode, "decide", Late())
    assert torch.equal(decode.decode(*arguments).out.cpu(), wanted.out)
    assert float(tau.max()) == 0.0


def test_a_prefill_in_blocks_of_queries(triton_device, monkeypatch):
    from lamp_compile.runtime.kernels import decode

    call = calls.make(tokens=14, heads=2, kv_heads=1, causal="bottom_right", keys=70, share=0.1)
    calls.use_launch(monkeypatch, most_rows=8)
    together = calls.by_kernels(call, triton_device)
    monkeypatch.setattr(decode, "SCRATCH", 1)
    apart = check(call, triton_device)
    for name, value in together.tensors().items():
        assert torch.equal(value, apart.tensors()[name]), name


@pytest.mark.parametrize("tokens", [1, 3])
def test_queries_in_any_order_in_memory(tokens, device):
    """As a projection leaves them, and with channels apart."""
    call = calls.make(tokens=tokens, causal="bottom_right", keys=70)
    plain = calls.by_kernels(call, device)
    for q in (call.q.transpose(1, 2).contiguous().transpose(1, 2), call.q.transpose(1, 3).contiguous().transpose(1, 3)):
        assert not q.is_contiguous() or tokens == 1
        moved = calls.by_kernels(replace(call, q=q), device)
        assert torch.equal(moved.out, plain.out)


@pytest.mark.parametrize("tokens", [1, 4])
def test_pages_in_any_order_change_nothing(tokens, device, monkeypatch):
    """The same sequences in a pool, shuffled, with pages that nobody has; by the launches that read pages."""
    calls.use_launch(monkeypatch)
    call = calls.make(
        tokens=tokens, causal="bottom_right", lengths=torch.tensor([150, 66]), sharpness=2.0, share=0.2,
    )  # fmt: skip
    plain = check(call, device)
    for laid in calls.layouts(call, device):
        paged = calls.by_kernels(in_pool(laid), device)
        for name, value in plain.tensors().items():
            assert torch.equal(value, paged.tensors()[name]), name


def in_pool(call: calls.Call) -> calls.Call:
    """The same call over a pool with twice the pages; pages behind a sequence's end are -1."""
    tile = layout.tile_of(call.planes[0])
    batch, kv_heads, pages = call.planes[0].shape[:3]
    order = torch.randperm(2 * batch * pages, generator=torch.Generator().manual_seed(2))[: batch * pages]
    table = order.view(batch, pages).to(torch.int32)
    pools = []
    for plane in call.planes:
        tiled = plane.unflatten(2, (-1, tile)) if plane.dim() == 3 else plane
        bits = torch.uint8 if tiled.dtype == torch.uint8 else torch.int16
        pool = torch.randint(0, 255, (1, kv_heads, 2 * batch * pages, *tiled.shape[3:])).to(bits).view(tiled.dtype)
        pool[0, :, order] = tiled.transpose(0, 1).flatten(1, 2)
        pools.append(pool.flatten(2, 3) if plane.dim() == 3 else pool)
    lengths = call.seen[4]
    if lengths is not None:
        table[torch.arange(pages) * tile >= lengths[:, None]] = -1
    return replace(call, planes=tuple(pools), seen=(*call.seen[:5], table))


@pytest.fixture
def scratch_is_nan():
    """What no program has written is NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(before)


@pytest.mark.parametrize("floor", [0.0, 1.0])
def test_short_sequences_beside_a_long_one(floor, triton_device, monkeypatch, scratch_is_nan):
    """The long one has several programs in each launch, of which the short ones fill one, and the empty one none."""
    calls.use_launch(monkeypatch, mixed_steps=1, mixed_tiles=16)
    sizes = {"batch": 3, "heads": 2, "kv_heads": 1, "keys": 700, "lengths": torch.tensor([690, 40, 0])}
    check(in_pool(calls.make(**sizes, sharpness=2.0, share=0.2, floor=floor)), triton_device)


STATES = torch.tensor([
    [[0.0, 0, 0, 0], [0.5, 0, 0, 0], [0.0, 1, 0, 0]],
    [[0.5, 1, 4, 3], [0.0, 2, 0, 1], [0.0, 1, 3, 2]],
])  # fmt: skip


@pytest.mark.parametrize("budget", [torch.inf, 0.25, 1e-6, torch.tensor([[0.25, 1e-6, torch.inf], [1e-6, 0.25, 1.0]])])
def test_guard_from_any_state(budget, device):
    """Raised, lowered, held, flagged: as the reference's step does."""
    call = calls.make(heads=3, kv_heads=3, keys=70, state=STATES, budget=budget, floor=torch.tensor([0.0, 0.0, 2.0]))
    got = check(call, device)
    assert not torch.equal(got.state, STATES)


def test_a_guard_that_rises_is_heeded_by_the_next_step(device):
    call = calls.make(tau=calls.COLD, budget=1e-6)
    first = check(call, device)
    assert first.stats[..., 2].eq(0).all()
    assert first.state[..., 1].eq(1).all()
    second = check(replace(call, hot=(*call.hot[:3], first.state, first.stats)), device)
    assert torch.equal(second.stats[..., 2], first.stats[..., 1])
