"""How a call is cut into programs for a GPU that is not here."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch

from lamp_compile.launch_plan import LaunchPlan
from tests.kernels import calls

if find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

from lamp_compile.runtime.kernels import decode, targets

PROGRAMS = {8: None, 9: 168, 12: 168, 16: 128, 64: None}


@pytest.mark.parametrize("programs", PROGRAMS)
def test_registers_for_as_many_programs(programs, monkeypatch):
    """A quarter of a multiprocessor has 16,384 registers and a program is one warp: 2 fit without a limit, 3 of 168."""
    hopper = replace(targets.target_of(torch.device("cpu")), name="sm_90", asm=True, processors=132)
    monkeypatch.setattr(decode, "target_of", lambda device: hopper)
    call = calls.make()
    begun, _ = decode.begin(call.q, call.planes, call.hot, call.balance, call.seen, call.options)
    wanted = {} if PROGRAMS[programs] is None else {"maxnreg": PROGRAMS[programs]}
    assert decode.registers(begun, 1, programs) == wanted
    # Two warps a program: half as many of them.
    paired = {4: None, 5: 168, 6: 168, 8: 128, 12: None}
    for count, most in paired.items():
        assert decode.registers(begun, 2, count) == ({} if most is None else {"maxnreg": most})
    assert decode.registers(begun, 4, 4) == {}
    large = replace(begun, cut=replace(begun.cut, small=False))
    assert decode.registers(large, 1, programs) == {}


def test_one_long_sequence_is_cut_into_no_more_than_can_be_joined(monkeypatch):
    """Many programs fit on a device, but what they leave must be joined. Fewer fit of those that hold more; those of
    several warps fold no sums."""
    hopper = replace(targets.target_of(torch.device("cpu")), name="sm_90", asm=True, processors=132)
    monkeypatch.setattr(decode, "target_of", lambda device: hopper)
    keys = 1 << 18
    for dim, most, programs in ((128, 64, 64), (128, 4096, 132 * 5), (256, 4096, 132 * targets.FIT)):
        call = calls.make(batch=1, heads=4, kv_heads=1, dim=dim, keys=64)
        planes = tuple(torch.empty(1, 1, keys // 32, *p.shape[3:], dtype=p.dtype, device="meta") if p.dim() == 5
                       else torch.empty(1, 1, keys, dtype=p.dtype, device="meta") for p in call.planes)  # fmt: skip
        cut = targets.cut(
            hopper, LaunchPlan(most_splits=128, most_segments=most), call.q, planes, keys, 32, mixed=False
        )
        assert cut.segments == programs
        assert cut.splits == 128
        assert cut.small == (dim == 128)
    begun, _ = decode.begin(call.q, call.planes, call.hot, call.balance, call.seen, call.options)
    assert (begun.fold(1), begun.fold(2)) == (8, 32)


def test_steps_in_flight_fit_into_shared_memory():
    small = replace(targets.target_of(torch.device("cpu")), shared=65536)
    assert [targets.in_flight(3, step, small) for step in (8192, 16384, 32768, 65536)] == [3, 3, 2, 1]


@pytest.mark.parametrize(
    ("batch", "given", "warps", "segments"),
    [
        (1, {}, 2, 50),
        (8, {}, 2, 132 * 5 // 64),
        (16, {}, 2, 132 * 5 // 128),
        (32, {}, 1, 132 * 12 // 256),  # few programs for each kv head: they share more evenly when there are more
        (8, {"most_paired": 32}, 1, 132 * 12 // 64),
        (8, {"paired_programs": 6}, 2, 132 * 6 // 64),
        (8, {"refine_warps": 4}, 4, 132 * 12 // 64),
    ],
)
def test_where_two_warps_share_a_program(batch, given, warps, segments):
    hopper = replace(targets.target_of(torch.device("cpu")), name="sm_90", asm=True, processors=132)
    q = torch.empty(batch, 32, 1, 128, device="meta")
    planes = (torch.empty(batch, 8, 1024, 32, 64, device="meta"), q, q, torch.empty(1, 1, 1, 64, device="meta"))
    cut = targets.cut(hopper, LaunchPlan(**given), q, planes, 32768, 32, mixed=False)
    assert (cut.warps(64)[1], cut.segments) == (warps, segments)
    assert targets.cut(replace(hopper, asm=False), LaunchPlan(), q, planes, 32768, 32, mixed=False).refine_warps == 1
