"""The compiled core for CPUs: what no other kernel has. Threads, how work is cut, every dtype, instruction sets."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from lamp_compile.runtime.kernels import cpu
from lamp_compile.runtime.kernels.cpu import _library
from lamp_compile.runtime.rotation import HEAD_DIMS
from tests.kernels import calls
from tests.kernels.calls import bits, same
from tests.kernels.test_decode import check, random_mask
from tests.tolerances import CPU_KERNELS

SEGMENT = 2048
"""Keys that share a partial result (``core/rows.h``)."""
THREADS = (1, 2, 3, 5)


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# Pieces of several segments are shared by threads that have nothing left, and there may be fewer pieces than threads.
CUTS = {
    "one head, long": {"heads": 4, "kv_heads": 1, "batch": 1, "keys": 3 * SEGMENT + 77},
    "three heads, long": {"heads": 3, "kv_heads": 3, "batch": 1, "keys": 2 * SEGMENT + 5},
    "many heads": {"heads": 12, "kv_heads": 6, "batch": 3, "keys": 300},
    "tokens": {"heads": 8, "kv_heads": 1, "batch": 1, "keys": SEGMENT + 100, "tokens": 21, "causal": "bottom_right"},
    "window": {
        "heads": 2, "kv_heads": 1, "batch": 1, "keys": 4 * SEGMENT, "tokens": 3, "causal": "bottom_right",
        "window": 2500,
    },
    "relaxed": {
        "heads": 4, "kv_heads": 1, "batch": 1, "keys": 2 * SEGMENT + 300, "rule": "lamp_relaxed", "sharpness": 2.0,
    },
    "lengths": {"heads": 2, "kv_heads": 1, "keys": 3 * SEGMENT, "lengths": torch.tensor([5000, 31])},
    # Chunks that four rows see whole are looked at in a way of their own, where instructions allow: those of 64
    # channels by lanes alone.
    "whole chunks": {"heads": 4, "kv_heads": 1, "batch": 1, "keys": 2 * SEGMENT + 700, "dim": 128},
    "whole chunks of 64 channels": {
        "heads": 16, "kv_heads": 2, "keys": SEGMENT + 1100, "causal": "bottom_right", "window": 1900,
    },
    "96 channels": {"heads": 4, "kv_heads": 1, "batch": 1, "keys": SEGMENT + 700, "dim": 96},
    "whole chunks, wide": {"heads": 8, "kv_heads": 1, "batch": 1, "keys": SEGMENT + 1100, "dim": 256},
    "whole chunks, tiles of 128": {
        "heads": 4, "kv_heads": 1, "batch": 1, "keys": SEGMENT + 1100, "dim": 128, "value_dim": 80, "tile": 128,
        "causal": "bottom_right", "window": 1500,
    },
    "whole chunks, two tokens of two heads": {
        "heads": 4, "kv_heads": 2, "batch": 1, "keys": SEGMENT + 600, "dim": 128, "value_dim": 20, "tokens": 2,
        "causal": "bottom_right", "rotation": "none",
    },
    "whole chunks of tokens": {
        "heads": 4, "kv_heads": 1, "batch": 1, "keys": SEGMENT + 513, "dim": 128, "tokens": 3, "causal": "bottom_right",
        "lengths": torch.tensor([SEGMENT + 513]),
    },
}  # fmt: skip


@pytest.mark.parametrize("name", CUTS)
def test_any_number_of_threads_gives_the_same_bits(name, native):
    for call in calls.layouts(calls.make(**{"share": 0.1, **CUTS[name]}), native):
        with threads(1):
            first = calls.by_kernels(call, native)
        assert first.stats[..., 2].gt(0).any()
        for count in THREADS[1:]:
            with threads(count):
                same(first, calls.by_kernels(call, native))


@pytest.mark.parametrize("name", CUTS)
def test_however_the_work_is_cut(name, native):
    with threads(3):
        check(calls.make(**{"share": 0.1, **CUTS[name]}), native)


@pytest.mark.parametrize("group", [1, 2, 4, 8])
@pytest.mark.parametrize("dim", [64, 96, 128, 256])
def test_planes_by_lanes(dim, group, native):
    """Of every size that models have, long enough for whole chunks; 80 channels lie by rows alone."""
    call = calls.make(dim=dim, heads=group, kv_heads=1, batch=1, keys=SEGMENT + 700, share=0.1)
    assert len(calls.layouts(call, native)) == 2
    check(call, native)
    assert len(calls.layouts(calls.make(dim=80), native)) == 1


def beside_portable(call: calls.Call, native: calls.Native) -> list[tuple[calls.Outcome, calls.Outcome]]:
    """What an instruction set leaves over planes of either layout, and the portable one over planes by rows."""
    found = [calls.by_kernels(laid, native) for laid in calls.layouts(call, native)]
    _library.load().lamp_use(b"portable")
    plain = calls.by_kernels(call, calls.Native("portable"))
    return [(got, plain) for got in found]


def test_a_window_of_any_size(native):
    """One that reaches further than any key is none, however large its number."""
    call = calls.make(heads=4, kv_heads=1, batch=1, keys=3 * SEGMENT + 77, causal="bottom_right", share=0.1)
    none = calls.by_kernels(call, native)
    for window in (1 << 40, (1 << 63) - 2049, (1 << 63) - 1):
        same(none, calls.by_kernels(replace(call, options={**call.options, "window": window}), native))


def test_threads_without_a_piece_are_called(native):
    """One piece of four segments: four threads are of use, and called. ``native/helping.cpp`` sees that they help."""
    call = calls.make(heads=4, kv_heads=1, batch=1, keys=3 * SEGMENT + 77, share=0.1)
    first, asked = calls.by_kernels(call, native), []
    task_type = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_size_t)
    parallel_type = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)

    def parallel(_context, task, data, count):
        asked.append(count)
        started = [threading.Thread(target=task_type(task), args=(data, i)) for i in range(count)]
        for thread in started:
            thread.start()
        for thread in started:
            thread.join()

    lent, core = parallel_type(parallel), _library.load()
    core.lamp_lend_threads.argtypes = [parallel_type, ctypes.c_void_p]
    core.lamp_lend_threads(lent, None)
    try:
        for count in (3, 6):
            with threads(count):
                same(first, calls.by_kernels(call, native))
    finally:
        core.lamp_lend_threads(parallel_type(), None)
    assert asked == [3, 4]


@pytest.mark.parametrize("group", [2, 4])
@pytest.mark.parametrize("dim", [128, 256])
def test_both_planes_at_once(dim, group, native):
    """Head dimensions whose nibbles fill whole vectors: joined to bytes where everything is refined."""
    check(calls.make(dim=dim, heads=2 * group, kv_heads=2, batch=2, floor=1.0), native)


@pytest.mark.parametrize("count", THREADS)
def test_appending_with_any_number_of_threads(count, native):
    k, v = torch.randn(2, 3, 200, 64), torch.randn(2, 3, 200, 96)
    room, made = calls.make(kv_heads=3, heads=3, keys=256, value_dim=96).planes, []
    for planes, number in ((room, 1), (room, count), (calls.planes_by_lanes(room), count)):
        made.append(tuple(map(torch.zeros_like, planes)))
        with threads(number):
            cpu.append(k, v, made[-1], None, torch.tensor([17, 40]), None, "hadamard")
    assert made[0][0].any()
    for one, other, lanes in zip(calls.planes_by_lanes(made[0]), calls.planes_by_lanes(made[1]), made[2], strict=True):
        assert torch.equal(bits(one), bits(other))
        assert torch.equal(bits(one), bits(lanes))


STORED = {"nothing": 0.0, "next to nothing": 1e-9, "large": 1e4, "NaN": torch.nan, "infinity": torch.inf}


@pytest.mark.parametrize("dim", HEAD_DIMS)
def test_rows_are_stored_as_by_the_reference(dim, native):
    """Ordinary ones, with one channel of each kind or all of them: rows of 1e-9 have a scale of 0. Several infinities
    become NaN or infinity by a rotation, as its sums go."""
    how = {"k_format": "nested8", "v_format": "nested8", "site": ""}
    for rotation in ("hadamard", "none"):
        k, v = torch.randn(2, 1, 1, 40, dim)
        for row, value in enumerate(STORED.values()):
            k[0, 0, row, dim // 3] = v[0, 0, row + 7, dim - 1] = value
            k[0, 0, row + 7] = v[0, 0, row] = value
        wanted = torch.ops.lamp.quantize(k, v, None, **how, rotation=rotation, tile=32)
        got = tuple(map(torch.zeros_like, wanted))
        cpu.append(k, v, got, None, torch.zeros(1, dtype=torch.int64), None, rotation)
        for index, (mine, theirs) in enumerate(zip(got, wanted, strict=True)):
            if index in (2, 5):
                assert torch.equal(mine.isfinite(), theirs.isfinite())
                known = mine.isfinite()
                assert torch.allclose(mine[known].float(), theirs[known].float(), rtol=2e-3, atol=1e-7)
            elif rotation == "none":
                assert torch.equal(mine, theirs)
            else:  # of the rows of numbers: sums in another order are a step apart once in many thousands
                rows = (mine.movedim(3, 0) if index < 3 else mine.movedim(4, 0)).flatten(1)
                pairs = (theirs.movedim(3, 0) if index < 3 else theirs.movedim(4, 0)).flatten(1)
                assert (rows != pairs)[12:].float().mean() < 2e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("dim", "value_dim"), [(16, 20), (64, 128), (80, 48), (96, 64), (128, 80), (192, 128), (256, 192), (64, 256)]
)
def test_any_dtype_of_any_head_dimension(dtype, dim, value_dim, native):
    check(
        calls.make(
            dim=dim, value_dim=value_dim, dtype=dtype, batch=1, heads=3, kv_heads=1, rotation=kind(dim, value_dim)
        ),
        native,
    )


def kind(*dims: int) -> str:
    """There is no rotation of 20 channels."""
    return "none" if 20 in dims else "hadamard"


@pytest.mark.parametrize("rule", ["energy", "lamp_strict", "lamp_relaxed"])
@pytest.mark.parametrize("subtile", [32, 64, 128])
def test_long_contexts_by_every_rule(rule, subtile, native):
    """Several segments, the last one ragged; decisions of one segment do not reach into the next."""
    call = calls.make(
        heads=5, kv_heads=1, batch=1, keys=2 * SEGMENT + 333, rule=rule, subtile=subtile, tile=128, sharpness=2.0,
        share=0.1,
    )  # fmt: skip
    check(call, native)


@pytest.mark.parametrize("group", [5, 13, 33, 63, 64])
def test_groups_of_any_size(group, native):
    """Rows are taken four, two or one at a time, up to 64."""
    check(calls.make(heads=group, kv_heads=1, batch=1, keys=90), native)
    if group < 33:
        check(calls.make(heads=group, kv_heads=1, batch=1, keys=90, tokens=7, causal="bottom_right", share=0.1), native)


@pytest.mark.parametrize("first", [0, 31, 1999, 2049, 4090])
def test_a_window_anywhere_in_a_long_context(first, native):
    """Work begins at the segment where the window does, and the room for scores is counted by the window."""
    length = first + 700
    check(
        calls.make(
            keys=3 * SEGMENT, batch=1, heads=2, kv_heads=1, tokens=40, causal="bottom_right", window=661, share=0.1,
            lengths=torch.tensor([length]),
        ),
        native,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_lengths_of_either_kind(dtype, native):
    """Every other element of a longer tensor, so that steps are seen."""
    wide = torch.tensor([[150, 7], [41, 9]], dtype=dtype)
    call = calls.make(lengths=torch.tensor([150, 41]), start=torch.tensor([3, 20]))
    plain = check(call, native)
    seen = (*call.seen[:3], torch.tensor([[3, 1], [20, 1]], dtype=dtype)[:, 0], wide[:, 0], None)
    same(plain, calls.by_kernels(replace(call, seen=seen), native))


def test_masks_and_biases_of_any_strides(native):
    mask, bias = random_mask(2, 4, 3, 150), torch.randn(2, 4, 3, 150)
    call = calls.make(tokens=3, mask=mask, bias=bias, share=0.1)
    plain = check(call, native)
    turned = tuple(x.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0) for x in (mask, bias))
    assert not turned[0].is_contiguous()
    same(plain, calls.by_kernels(replace(call, seen=(*turned, *call.seen[2:])), native))


@pytest.mark.parametrize(("step", "sharpness"), [(2.0**-5, 5.0), (2.0**3, 0.25)])
def test_first_keys_of_a_segment_that_are_unlike_the_others(step, sharpness, native):
    """Weights of a whole chunk are relative to scores of keys before it: those may be far below its own, or above."""
    call = calls.make(heads=4, kv_heads=1, batch=1, keys=2 * SEGMENT + 700, dim=128, sharpness=sharpness)
    size = torch.ones(call.planes[2].shape[-1])
    for first in range(0, call.keys, SEGMENT):
        size[first : first + 32] = step
    planes = (*call.planes[:2], (call.planes[2] * size).half(), *call.planes[3:])
    call = replace(call, k=call.k * size[: call.keys, None], planes=planes)
    tau = calls.between(calls.importance_of(call), 0.1)
    check(replace(call, hot=(torch.full((1,), float(tau)), *call.hot[1:])), native)


def test_scores_that_no_level_is_near(native):
    """A hundred powers of two above the first keys': on another instruction set, where there are no levels, alike."""
    call = calls.make(heads=4, kv_heads=1, batch=1, keys=2 * SEGMENT + 700, dim=128, sharpness=60.0, share=0.1)
    for got, plain in beside_portable(call, native):
        assert calls.whole(got.out, plain.out) <= CPU_KERNELS["sets"].bound
        assert torch.equal(got.stats, plain.stats)


@pytest.mark.parametrize("plane", ["k_scale", "v_scale"])
def test_what_is_spoilt_in_a_whole_chunk_spoils_what_it_would_anywhere(plane, native):
    """As on another instruction set; keys by scores, values by weights."""
    call = calls.make(heads=8, kv_heads=2, batch=1, keys=SEGMENT + 700, dim=128, share=0.1)
    planes = dict(zip(("k_high", "k_residual", "k_scale", "v_high", "v_residual", "v_scale"), call.planes, strict=True))
    planes[plane] = planes[plane].clone()
    planes[plane].view(2, -1)[1, 1234] = torch.nan
    spoilt = replace(call, planes=tuple(planes.values()))
    for got, plain in beside_portable(spoilt, native):
        assert got.out[:, :4].isfinite().all()
        assert got.out[:, 4:].isnan().all()
        assert torch.equal(got.out.isnan(), plain.out.isnan())
        assert calls.whole(got.out[:, :4], plain.out[:, :4]) <= CPU_KERNELS["sets"].bound


def test_a_missing_page_is_dead_as_long_as_nobody_sees_it(native):
    """Pages before the window or behind the length may be -1 or anything else that is no page."""
    from tests.kernels.test_decode import in_pool

    call = calls.make(causal="bottom_right", window=60, lengths=torch.tensor([150, 130]))
    for laid in calls.layouts(call, native):
        pooled = in_pool(laid)
        plain = calls.by_kernels(pooled, native)
        table = pooled.seen[5].clone()
        table[:, :2] = torch.tensor([[-1, 10**6], [-7, -1]])
        same(plain, calls.by_kernels(replace(pooled, seen=(*pooled.seen[:5], table)), native))


@pytest.mark.skipif(len(cpu.instruction_sets()) < 2, reason="only one instruction set here")
@pytest.mark.parametrize("name", CUTS)
def test_instruction_sets_agree(name, native):
    """Closely: integer products are the same, sums of floats have another order."""
    for got, plain in beside_portable(calls.make(**{"share": 0.1, **CUTS[name]}), native):
        assert calls.whole(got.out, plain.out) <= CPU_KERNELS["sets"].bound
        assert float((got.lse - plain.lse).abs().max()) <= CPU_KERNELS["lse"].bound
        assert torch.equal(got.stats, plain.stats)
