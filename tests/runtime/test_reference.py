"""The reference against brute force: every mask, level, dtype, shape; and against exact attention in float64."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from lamp_compile.ir import Floor, Precision
from lamp_compile.runtime import formats, guard, layout, ops, reference  # noqa: F401 (ops registers torch.ops.lamp)
from lamp_compile.runtime.arguments import Visibility
from tests.runtime import brute_force
from tests.tolerances import ARITHMETIC, STORAGE

SUBTILE, TILE = 32, 64


def error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((got.double() - wanted).norm() / wanted.norm().clamp_min(1e-30))


def store(case: brute_force.Case, balance=None, names=("nested8", "nested8"), tile=TILE):
    return reference.quantize(case.k, case.v, balance, *names, case.scores.rotation, tile)


def run(case: brute_force.Case, levels, planes=None, balance=None, exact=False, names=("nested8", "nested8")):
    planes = planes or store(case, balance, names)
    return reference.attend(
        case.q, planes, levels, (case.k, case.v) if exact else None, balance, case.visible, case.scores, *names, SUBTILE
    )


def some_levels(case: brute_force.Case, *, exact: bool = False, skip: bool = False, seed: int = 1) -> torch.Tensor:
    tiles = layout.tiles_for(case.k.shape[2], TILE) * TILE // SUBTILE
    low, high = (0 if skip else 1), (4 if exact else 3)
    g = torch.Generator().manual_seed(seed)
    return torch.randint(
        low, high, (case.q.shape[0], case.k.shape[1], case.q.shape[2], tiles), generator=g, dtype=torch.uint8
    )


def random_mask(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(9)) < 0.7


CASES = {
    "plain": {},
    "one key": {"keys": 1, "queries": 1},
    "group 1": {"heads": 2, "kv_heads": 2},
    "group 16": {"heads": 16, "kv_heads": 1},
    "value dim": {"dim": 24, "value_dim": 16},
    "causal top left": {"causal": "top_left", "queries": 5, "keys": 40},
    "causal bottom right": {"causal": "bottom_right", "queries": 5, "keys": 40},
    "causal more queries than keys": {"causal": "bottom_right", "queries": 9, "keys": 4},
    "window": {"causal": "bottom_right", "window": 7, "queries": 5},
    "lengths": {"lengths": torch.tensor([70, 33]), "causal": "bottom_right"},
    "one length for all": {"lengths": torch.tensor([41])},
    "left padding": {"start": torch.tensor([0, 50]), "causal": "bottom_right"},
    "padding and window": {
        "start": torch.tensor([3, 50]),
        "lengths": torch.tensor([66, 70]),
        "causal": "bottom_right",
        "window": 12,
    },
    "mask": {"mask": random_mask(2, 1, 3, 70)},
    "mask per head": {"mask": random_mask(2, 4, 3, 70)},
    "mask of two axes": {"mask": random_mask(3, 70)},
    "masked rows": {"mask": torch.zeros(2, 1, 3, 70, dtype=torch.bool)},
    "bias": {"bias": torch.randn(1, 4, 3, 70, dtype=torch.float64, generator=torch.Generator().manual_seed(3))},
    "bias with -inf": {
        "bias": torch.zeros(2, 1, 3, 70, dtype=torch.float64).masked_fill(~random_mask(2, 1, 3, 70), -torch.inf)
    },
    "softcap": {"softcap": 2.0},
    "sinks": {"sinks": torch.tensor([0.5, -1.0, 3.0, 20.0], dtype=torch.float64)},
    "no rotation": {"rotation": "none"},
    "query as it is": {"query_bits": 0},
    "query in bfloat16": {"query_bits": 16},
}


@pytest.mark.parametrize("name", CASES)
def test_attend_is_its_definition(name: str) -> None:
    case = brute_force.make(**CASES[name])
    levels = some_levels(case, exact=True, skip=True)
    out, lse, certificate = run(case, levels, exact=True)
    wanted, wanted_lse = brute_force.attend(case, store(case), levels, None, ("nested8", "nested8"), SUBTILE)
    assert error(out, wanted) <= ARITHMETIC[torch.float64].relative
    assert torch.allclose(lse.double(), wanted_lse, rtol=1e-6, atol=1e-6)
    assert certificate.isfinite().all()
    assert not out[wanted_lse == -torch.inf].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_attend_in_each_dtype(dtype: torch.dtype) -> None:
    case = brute_force.make(dtype=dtype, causal="bottom_right", keys=100)
    levels = some_levels(case)
    out, lse, _ = run(case, levels)
    assert out.dtype == dtype
    assert lse.dtype == torch.float32
    wanted, _ = brute_force.attend(case, store(case), levels, None, ("nested8", "nested8"), SUBTILE)
    assert error(out, wanted) <= ARITHMETIC[dtype].relative


@pytest.mark.parametrize("balance_rank", [2, 3])
def test_balance_is_exact(balance_rank: int) -> None:
    """Dividing keys and multiplying the query by one factor per channel changes nothing but the rounding."""
    case = brute_force.make(keys=50)
    balance = torch.rand(*((2, 2, 16) if balance_rank == 3 else (2, 16)), dtype=torch.float64) * 4 + 0.2
    levels = some_levels(case)
    out, _, _ = run(case, levels, balance=balance)
    wanted, _ = brute_force.attend(case, store(case, balance), levels, balance, ("nested8", "nested8"), SUBTILE)
    assert error(out, wanted) <= ARITHMETIC[torch.float64].relative
    exact, _ = reference.exact_attention(case.q, case.k, case.v, case.visible, case.scores.scale)
    high_precision = torch.full_like(levels, Precision.EXACT)
    assert error(run(case, high_precision, balance=balance, exact=True)[0], exact) <= ARITHMETIC[torch.float64].relative


def test_balance_saves_outlier_keys() -> None:
    case = brute_force.make(dim=64, keys=200)
    factor = torch.ones(2, 64, dtype=torch.float64)
    factor[:, 5:9] = 40.0
    wild = brute_force.Case(
        case.q / factor.repeat_interleave(2, 0)[None, :, None],
        case.k * factor[None, :, None],
        case.v,
        case.visible,
        case.scores,
    )
    exact, _ = reference.exact_attention(wild.q, wild.k, wild.v, wild.visible, wild.scores.scale)
    levels = torch.full((2, 2, 3, 8), Precision.BOTH, dtype=torch.uint8)
    without = error(run(wild, levels)[0], exact)
    balanced = error(run(wild, levels, balance=factor)[0], exact)
    assert balanced <= STORAGE["nested8"].relative
    assert without > 3 * balanced


@pytest.mark.parametrize("dim", [64, 80, 96, 128, 192, 256])
@pytest.mark.parametrize("name", sorted(formats.all_formats()))
def test_storage_error_of_each_format(name: str, dim: int) -> None:
    case = brute_force.make(dim=dim, keys=300, batch=1, heads=4, queries=8, query_bits=0 if name == "fp16" else 8)
    exact, exact_lse = reference.exact_attention(case.q, case.k, case.v, case.visible, case.scores.scale)
    levels = torch.full((1, 2, 8, 12), Precision.BOTH, dtype=torch.uint8)
    planes = store(case, names=(name, name), tile=128)
    out, lse, _ = run(case, levels, planes, names=(name, name))
    # The query's own rounding is part of every row but fp16's, whose storage is finer than eight bits.
    tolerance = max(STORAGE[name].relative, STORAGE["int8"].relative if case.scores.query_bits else 0)
    assert error(out, exact) <= tolerance
    assert (lse - exact_lse).abs().max() < 0.1
    if name == "nested8":
        cold = run(case, torch.full_like(levels, Precision.HIGH), planes)[0]
        assert 2 * error(out, exact) < error(cold, exact) <= STORAGE["nested8_high"].relative


def test_paged_equals_contiguous() -> None:
    case = brute_force.make(keys=250, lengths=torch.tensor([250, 140]), causal="bottom_right")
    planes = store(case)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(2))
    table = torch.empty(8, dtype=torch.int32)
    table[order] = torch.arange(8, dtype=torch.int32)
    table = table.view(2, 4)

    def pool(x: torch.Tensor) -> torch.Tensor:
        tiled = x.unflatten(2, (-1, TILE)) if x.dim() == 3 else x
        mixed = tiled.transpose(0, 1).flatten(1, 2)[:, order][None]
        return mixed.flatten(2, 3) if x.dim() == 3 else mixed

    names = ("k_high", "k_residual", "k_scale", "v_high", "v_residual", "v_scale")
    pooled = {name: pool(getattr(planes, name)) for name in names}
    tau, floor = torch.tensor([0.05, 0.1]), torch.zeros(2)
    args = dict(
        causal="bottom_right",
        window=0,
        scale=None,
        softcap=0.0,
        keys=250,
        rotation="hadamard",
        query_bits=8,
        subtile=SUBTILE,
        site="s",
    )
    results = []
    lengths = case.visible.lengths
    for stored, block_table in (({n: getattr(planes, n) for n in names}, None), (pooled, table)):
        seen = (None, None, None, None, None, lengths, block_table)
        importance = torch.ops.lamp.look_ahead(
            case.q, stored["k_high"], stored["k_scale"], *seen, k_format="nested8", rule="energy", **args,
        )  # fmt: skip
        levels = torch.ops.lamp.select(importance, tau, floor, None, None, exact=False, site="s")
        results.append((importance, *torch.ops.lamp.attend(
            case.q, *stored.values(), levels, None, None, *seen, k_format="nested8", v_format="nested8", **args,
        )))  # fmt: skip
    assert set(levels.unique().tolist()) == {0, 1, 2}
    for contiguous, paged in zip(*results, strict=True):
        torch.testing.assert_close(paged, contiguous)


def test_result_does_not_depend_on_the_block_of_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    case = brute_force.make(queries=37, keys=64, causal="bottom_right")
    planes, levels = store(case), some_levels(case)
    whole = run(case, levels, planes)

    def look():
        return reference.look_ahead(
            case.q, planes.k_high, planes.k_scale, None, case.visible, case.scores, "nested8", "energy", SUBTILE
        )

    importance = look()
    monkeypatch.setattr(reference, "BLOCK_ELEMENTS", 5 * 2 * 4 * 64)
    assert len(list(reference._query_blocks(37, 2 * 2 * 4 * 64))) > 3
    for one, other in zip(whole, run(case, levels, planes), strict=True):
        torch.testing.assert_close(one, other)
    torch.testing.assert_close(importance, look())


def test_row_without_a_live_key_is_minus_infinity_with_sinks_too() -> None:
    mask = torch.ones(1, 1, 3, 70, dtype=torch.bool)
    mask[:, :, 1] = False
    case = brute_force.make(mask=mask, sinks=torch.randn(4, dtype=torch.float64))
    out, lse, sums = run(case, some_levels(case))
    assert (lse[:, :, 1] == -torch.inf).all()
    assert lse[:, :, [0, 2]].isfinite().all()
    assert not out[:, :, 1].any()
    assert not sums[:, :, 1].any()


def test_rows_that_belong_to_nobody_may_hold_anything() -> None:
    """After a crop, stale rows lie behind the length; NaN there must not reach the output."""
    case = brute_force.make(keys=40, lengths=torch.tensor([30]), causal="bottom_right")
    spoilt = brute_force.Case(case.q, case.k.clone(), case.v.clone(), case.visible, case.scores)
    spoilt.k[:, :, 35:] = torch.nan
    spoilt.v[:, :, 35:] = torch.nan
    levels = some_levels(case)
    for one, other in zip(run(case, levels), run(spoilt, levels), strict=True):
        torch.testing.assert_close(one, other)


def test_nan_in_one_key_reaches_its_head_and_no_other() -> None:
    case = brute_force.make(keys=40)
    case.k[0, 1, 3, 2] = torch.nan
    out, _, certificate = run(case, some_levels(case))
    assert out[0, 2:].isnan().all()
    assert certificate[0, 2:].isnan().any()
    assert out[0, :2].isfinite().all()
    assert out[1].isfinite().all()


def test_select_follows_tau_floor_state_and_skip() -> None:
    importance = torch.tensor(
        [[[[0.5, 0.1, 0.0, float("nan"), reference.DEAD]], [[0.5, 0.1, 0.0, 0.3, reference.DEAD]]]]
    )
    S, H, B, E = Precision
    pick = lambda *a, exact=True: reference.select(importance, *a, exact).squeeze(2)[0].tolist()  # noqa: E731
    tau, none = torch.tensor([0.1, 0.0]), torch.zeros(2)
    assert pick(tau, none, None, None) == [[B, H, H, B, S], [B, B, H, B, S]]
    assert pick(tau, torch.tensor([1.0, 0.0]), None, None)[0] == [B, B, B, B, S]
    assert pick(tau, torch.tensor([2.0, 0.0]), None, None)[0] == [E, E, E, E, S]
    assert pick(tau, torch.tensor([2.0, 0.0]), None, None, exact=False)[0] == [B, B, B, B, S]
    state = guard.new_state(1, 2)
    state[0, 1, guard.FLOOR] = Floor.EXACT
    assert pick(tau, none, state, None) == [[B, H, H, B, S], [E, E, E, E, S]]
    assert pick(tau, none, None, torch.tensor([0.0, 0.2])) == [[B, H, S, B, S], [B, S, S, B, S]]


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10**6), batch=st.integers(1, 3), kv_heads=st.integers(1, 3), group=st.integers(1, 4),
    queries=st.integers(1, 6), keys=st.integers(1, 140), causal=st.sampled_from(["", "top_left", "bottom_right"]),
    softcap=st.sampled_from([0.0, 5.0]), window=st.sampled_from([0, 1, 9]),
)  # fmt: skip
def test_any_shape_is_its_definition(seed, batch, kv_heads, group, queries, keys, causal, softcap, window) -> None:
    lengths = torch.randint(1, keys + 1, (batch,), generator=torch.Generator().manual_seed(seed))
    case = brute_force.make(
        seed, batch=batch, heads=kv_heads * group, kv_heads=kv_heads, queries=queries, keys=keys, causal=causal,
        softcap=softcap, window=window if causal else 0, lengths=lengths,
    )  # fmt: skip
    levels = some_levels(case, exact=True, skip=True, seed=seed)
    out, lse, _ = run(case, levels, exact=True)
    wanted, wanted_lse = brute_force.attend(case, store(case), levels, None, ("nested8", "nested8"), SUBTILE)
    assert error(out, wanted) <= 10 * ARITHMETIC[torch.float64].relative
    assert torch.equal(lse == -torch.inf, wanted_lse == -torch.inf)


def test_exact_attention_is_sdpa() -> None:
    case = brute_force.make(queries=6, keys=6, causal="top_left")
    wanted = F.scaled_dot_product_attention(case.q, case.k, case.v, is_causal=True, enable_gqa=True)
    got, _ = reference.exact_attention(case.q, case.k, case.v, case.visible, case.scores.scale)
    torch.testing.assert_close(got, wanted)


def test_liveness_of_masks_shorter_than_the_capacity() -> None:
    mask = torch.ones(1, 1, 1, 5, dtype=torch.bool)
    live = Visibility(5, mask=mask).live(slice(0, 1), 1, 8, torch.device("cpu"))
    assert live[0, 0, 0].tolist() == [True] * 5 + [False] * 3
