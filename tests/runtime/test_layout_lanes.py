"""Planes by lanes hold what planes by rows hold: what is written to them, what operators compute from them, and what a
cache does with them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from lamp_compile.errors import InputError
from lamp_compile.runtime import certificate, checks, kernels, layout, reference, worst_case
from lamp_compile.runtime.arguments import Planes, Scores, Visibility
from lamp_compile.runtime.network import predict
from tests.kernels import calls, predicted
from tests.kernels.calls import planes_by_lanes
from tests.kernels.test_decode import in_pool

DATA = (0, 1, 3, 4)
"""Planes that lie one way or the other; the other two are scales."""
STORE = ("nested8", "nested8", "hadamard", "site")
G, H, D = 2, 4, 64


def by_lanes(call: calls.Call) -> calls.Call:
    return replace(call, planes=planes_by_lanes(call.planes))


def of_bytes(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def test_where_each_byte_lies() -> None:
    keys, values = of_bytes(2, 3, 4, 32, 24), of_bytes(2, 3, 4, 16, 32)
    of_keys, of_values = layout.as_lanes(keys), layout.as_lanes(values)
    assert of_keys.shape == (2, 3, 4, *layout.key_shape(32, 24, lanes=True)) == (2, 3, 4, 6, 32, 4)
    assert of_values.shape == (2, 3, 4, *layout.value_shape(32, 16, lanes=True)) == (2, 3, 4, 8, 16, 4)
    for key, c in ((0, 0), (31, 23), (17, 6), (6, 17)):
        assert torch.equal(of_keys[:, :, :, c // 4, key, c % 4], keys[:, :, :, key, c])
    for key, c in ((0, 0), (31, 15), (17, 6), (6, 13)):
        assert torch.equal(of_values[:, :, :, key // 4, c, key % 4], values[:, :, :, c, key])
    for rows, lanes in ((keys, of_keys), (values, of_values)):
        assert lanes.is_contiguous()
        assert torch.equal(layout.as_rows(lanes), rows)
        assert layout.as_lanes(lanes) is lanes
        assert layout.as_rows(rows) is rows
        assert (layout.by_lanes(lanes), layout.by_lanes(rows)) == (True, False)
    for x in (keys, of_keys):
        assert (layout.tile_of(x), layout.key_width(x)) == (32, 24)
        assert torch.equal(layout.key_rows(x), keys.flatten(2, 3))
    for x in (values, of_values):
        assert layout.value_width(x) == 16
        assert torch.equal(layout.value_rows(x), values.transpose(-1, -2).flatten(2, 3))


@pytest.mark.parametrize("write", [layout.write_keys, layout.write_values])
def test_rows_are_written_where_they_would_lie(write: Any) -> None:
    keys = write is layout.write_keys
    by_rows = of_bytes(2, 3, 4, *(layout.key_shape if keys else layout.value_shape)(32, 16))
    lanes, new = layout.as_lanes(by_rows), of_bytes(2, 3, 9, 16, seed=1)
    positions = torch.tensor([0, 3, 31, 32, 33, 70, 95, 96, 127])
    for plane in (by_rows, lanes):
        write(plane, new, positions)
    assert layout.by_lanes(lanes)
    assert torch.equal(layout.as_rows(lanes), by_rows)
    rows = (layout.key_rows if keys else layout.value_rows)(lanes)
    assert torch.equal(rows[:, :, positions], new)


@pytest.mark.parametrize("put", [layout.put_keys, layout.put_values])
@pytest.mark.parametrize("table", [None, torch.tensor([[2, 5, -1], [0, 1, 3]])], ids=["sequences", "pages"])
@pytest.mark.parametrize("first", [30, -1])
def test_rows_are_put_where_they_would_lie(put: Any, table: Tensor | None, first: int) -> None:
    shape = (layout.key_shape if put is layout.put_keys else layout.value_shape)(32, 16)
    by_rows = of_bytes(2 if table is None else 1, 3, 6, *shape)
    before, lanes, new = by_rows.clone(), layout.as_lanes(by_rows), of_bytes(2, 3, 40, 16, seed=1)
    place = layout.places(torch.tensor([first, first]), 2, 40, 32, table)
    for plane in (by_rows, lanes):
        put(plane, new, place)
    assert torch.equal(layout.as_rows(lanes), by_rows)
    assert torch.equal(before, by_rows) == (first < 0)


CASES: dict[str, dict[str, Any]] = {
    "a step": {"lengths": torch.tensor([150, 66])},
    "eight heads to a kv head": {"heads": 16, "start": torch.tensor([3, 40])},
    "tokens": {"tokens": 7, "causal": "bottom_right", "lengths": torch.tensor([150, 66])},
    "a window and sinks": {"tokens": 3, "causal": "top_left", "window": 50, "sinks": torch.randn(4)},
    "other values": {"dim": 96, "value_dim": 128, "softcap": 20.0},
    "strict": {"rule": "lamp_strict"},
}


@pytest.mark.usefixtures("reference_only")
@pytest.mark.parametrize("paged", [False, True], ids=["sequences", "pages"])
@pytest.mark.parametrize("name", CASES)
def test_attention_is_the_same_to_the_bit(name: str, paged: bool) -> None:
    by_rows = calls.make(**CASES[name])
    by_rows = in_pool(by_rows) if paged else by_rows
    lanes = by_lanes(by_rows)
    assert torch.equal(*(calls.importance_of(x) for x in (by_rows, lanes)))
    levels = calls.levels_of(by_rows)
    assert {1, 2} <= set(levels.flatten().tolist())
    found = [vars(calls.by_reference(x, levels)) for x in (by_rows, lanes)]
    assert all(map(torch.equal, *(x.values() for x in found)))
    whole = []
    for x in (by_rows, lanes):
        whole.append(torch.ops.lamp.attention.cached(x.q, *x.planes, *x.hot, x.balance, *x.seen, **x.options))
        hot = tuple(t.clone() for t in x.hot)
        out = torch.ops.lamp.fused_attention(x.q, *x.planes, *hot, x.balance, *x.seen, **x.options)
        assert all(map(torch.equal, (out, *hot[3:]), whole[-1]))
    assert all(map(torch.equal, *whole))


@pytest.mark.usefixtures("reference_only")
@pytest.mark.parametrize("paged", [False, True], ids=["sequences", "pages"])
def test_rows_are_appended_in_place(paged: bool) -> None:
    call = in_pool(calls.make()) if paged else calls.make()
    lanes = by_lanes(call)
    before = [x.clone() for x in lanes.planes]
    k, v = torch.randn(2, 2, 40, 64), torch.randn(2, 2, 40, 64)
    for planes in (call.planes, lanes.planes):
        torch.ops.lamp.append(k, v, *planes, None, torch.tensor([90, 3]), call.seen[5], *STORE)
    assert all(map(torch.equal, lanes.planes, planes_by_lanes(call.planes)))
    assert not any(map(torch.equal, lanes.planes, before))


@pytest.mark.usefixtures("reference_only")
@pytest.mark.parametrize("skip", [0.0, 0.3])
def test_a_predicted_step_and_its_summaries_are_the_same(skip: float) -> None:
    step = predicted.make(skip=skip, lengths=torch.tensor([150, 66]))
    other = replace(step, call=by_lanes(step.call))
    assert predicted.by_reference(step).same(predicted.by_reference(other))
    key, key_bias = torch.randn(2, 64, 16), torch.randn(2, 16)
    made = []
    for planes in (step.call.planes, other.call.planes):
        summary = torch.zeros_like(step.kept[0])
        torch.ops.lamp.summarize(
            *planes[:3], summary, key, key_bias, torch.tensor([140, 0]), None, rows=10, group=8, k_format="nested8",
            site="",
        )  # fmt: skip
        made.append(summary)
    assert torch.equal(*made)
    assert made[0].any()


def test_bounds_and_estimates_are_the_same() -> None:
    call = calls.make(lengths=torch.tensor([150, 66]))
    levels, visible = calls.levels_of(call), Visibility(150, lengths=call.seen[4])
    both = [Planes(*planes) for planes in (call.planes, planes_by_lanes(call.planes))]
    assert both[0].tile == both[1].tile == 32
    scores = Scores(0.125, rotation="hadamard")
    bounds = [worst_case.bound(call.q, worst_case.Stored(x, levels), visible, scores) for x in both]
    assert torch.equal(*bounds)
    assert (bounds[0] > 0).all()
    noises = [certificate.row_noise(x, D, D, "nested8", "nested8") for x in both]
    assert torch.equal(noises[0].value_square, noises[1].value_square)
    keys = [reference.final_importance(
        call.q, (x.k_high, x.k_residual, x.k_scale), levels, None, visible, scores, "nested8", 32
    ) for x in both]  # fmt: skip
    assert torch.equal(*keys)


def test_graphs_know_the_shapes() -> None:
    call = calls.make(dim=96, value_dim=128, tokens=2)
    with FakeTensorMode(allow_non_fake_inputs=True):
        for planes in (call.planes, planes_by_lanes(call.planes)):
            q = torch.empty(call.q.shape)
            options = {name: call.options[name] for name in call.options if name not in ("v_format", "launch")}
            for name in ("guard_window", "guard_hold", "hysteresis"):
                options.pop(name)
            importance = torch.ops.lamp.look_ahead(q, planes[0], planes[2], None, *call.seen, **options)
            assert importance.shape == (2, 2, 2, 5)
            out = torch.ops.lamp.attention.cached(q, *planes, *call.hot, None, *call.seen, **call.options)[0]
            assert out.shape == (2, 4, 2, 128)


@pytest.mark.usefixtures("reference_only")
def test_a_compiled_graph_writes_and_reads_them() -> None:
    k, v, q = torch.randn(2, 2, 3, 64), torch.randn(2, 2, 3, 64), torch.randn(2, 4, 3, 64)

    def step(planes: tuple[Tensor, ...], hot: tuple[Tensor, ...]) -> Tensor:
        torch.ops.lamp.append(k, v, *planes, None, torch.arange(1) + 120, None, *STORE)
        rows = torch.ops.lamp.quantize(
            k, v, None, k_format="nested8", v_format="nested8", rotation="hadamard", tile=0, site=""
        )
        layout.write_keys(planes[0], rows[0], torch.arange(3) + 62)
        layout.write_values(planes[3], rows[3], torch.arange(3) + 62)
        return torch.ops.lamp.attention.cached(q, *planes, *hot, None, *call.seen, **call.options)[0]

    call = calls.make(causal="bottom_right")
    wanted = step(call.planes, call.hot)
    torch._dynamo.reset()
    lanes = by_lanes(calls.make(causal="bottom_right"))
    found = torch.compile(step, backend="aot_eager", fullgraph=True)(lanes.planes, call.hot)
    assert torch.equal(found, wanted)
    assert all(map(torch.equal, lanes.planes, planes_by_lanes(call.planes)))


WRONG = {
    "K alone": {0: (2, 2, 5, 8, 32, 4), 1: (2, 2, 5, 8, 32, 4)},
    "V alone": {3: (2, 2, 5, 8, 32, 4), 4: (2, 2, 5, 8, 32, 4)},
    "a residual by rows": {1: (2, 2, 5, 32, 32)},
    "lanes of 8 bytes": {0: (2, 2, 5, 4, 32, 8), 1: (2, 2, 5, 4, 32, 8)},
    "tiles of 64 keys": {
        **dict.fromkeys((0, 1), (2, 2, 5, 8, 64, 4)), **dict.fromkeys((3, 4), (2, 2, 5, 16, 32, 4)),
        2: (2, 2, 320), 5: (2, 2, 320),
    },
    "values of 8 bytes": {3: (2, 2, 5, 8, 8, 4), 4: (2, 2, 5, 8, 8, 4)},
    "K in V's place": {3: (2, 2, 5, 32, 8, 4), 4: (2, 2, 5, 32, 8, 4)},
    "a scale too short": {5: (2, 2, 159)},
    "seven dimensions": dict.fromkeys(DATA, (2, 2, 5, 8, 32, 2, 2)),
    "three dimensions": dict.fromkeys(DATA, (2, 2, 5)),
}  # fmt: skip


def wrong_planes(name: str, call: calls.Call) -> tuple[Tensor, ...]:
    right = planes_by_lanes(call.planes) if "alone" not in name else call.planes
    checks.planes("site", right, None, 2)
    return tuple(torch.zeros(WRONG[name].get(index, x.shape), dtype=x.dtype) for index, x in enumerate(right))


@pytest.mark.parametrize("name", WRONG)
def test_planes_that_do_not_belong_together(name: str) -> None:
    wrong = wrong_planes(name, calls.make())
    with pytest.raises(InputError, match=r"(?s)do not belong together.*where: .*try: .*by lanes"):
        checks.planes("site", wrong, None, 2)


def test_what_is_given_with_them_is_checked() -> None:
    planes = planes_by_lanes(calls.make().planes)
    checks.planes("site", planes, None, 2, 32)
    checks.keys_of_planes("site", torch.zeros(2, 2, 1, 64), planes[0])
    with pytest.raises(InputError, match="do not belong together"):
        checks.planes("site", planes, None, 2, 16)
    with pytest.raises(InputError, match="2 heads and 64 channels"):
        checks.keys_of_planes("site", torch.zeros(2, 2, 1, 32), planes[0])
    weights = torch.zeros(2, 64, 16), torch.zeros(2, 16)
    summary = torch.zeros(2, 2, 20, 16).half()
    predict._check_summaries("site", planes[:3], summary, weights, 8)
    wide = tuple(x.reshape(2, 2, 5, 4, 64, 4) for x in planes[:2])
    with pytest.raises(InputError, match="k_high is"):
        predict._check_summaries("site", (*wide, torch.zeros(2, 2, 320).half()), summary, weights, 16)


def test_which_kernels_read_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "why_not_device", lambda kind: None)
    call, summary = by_lanes(calls.make()), torch.zeros(2, 2, 20, 16).half()
    for device, known in (("cpu", None), ("meta", "planes by lanes; kernels for GPUs")):
        q, state, made, *planes = (x.to(device) for x in (call.q, call.hot[3], summary, *call.planes))
        reasons = (
            kernels.why_not_store(tuple(planes), "nested8", "nested8"),
            kernels.why_not_attend(q, tuple(planes), state, call.options),
            kernels.why_not_summarize(tuple(planes[:3]), made, 1, 8, "nested8"),
        )
        assert all(reason is None if known is None else known in str(reason) for reason in reasons)
        predicts = {**call.options, "pages": 5}
        kept = (made, torch.zeros(2, 2, 5, 2, device=device), torch.zeros(2, 2, 7, device=device))
        assert kernels.why_not_predicted(q, tuple(planes), kept, predicts) is None
