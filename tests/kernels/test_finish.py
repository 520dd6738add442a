"""The one launch behind the look-ahead against the reference, on a host that runs its threads as coroutines.

On a GPU that has it ``test_decode.py`` and the others run it themselves.
"""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
import torch

from lamp_compile.launch_plan import LaunchPlan
from lamp_compile.runtime import guard
from lamp_compile.runtime.kernels import finish
from tests.kernels import calls
from tests.kernels.host_gpu import HostGpu
from tests.kernels.test_decode import CASES as EVERYWHERE
from tests.kernels.test_decode import check, normal

SHARED = (
    "one key", "lengths", "an empty sequence", "only empty sequences", "left padding", "window", "padding and window",
    "softcap", "sinks", "one sink for all heads", "balance", "no rotation", "bfloat16", "float16", "sharp",
    "nothing refined", "tau 0", "tau per sequence", "floor 1 of one head", "state 1 of one head",
)  # fmt: skip
"""Cases of ``test_decode.py`` that it serves."""
CASES = {
    **{name: EVERYWHERE[name] for name in SHARED},
    **{f"group {g}": {"heads": g * n, "kv_heads": n, "keys": 100} for g, n in ((1, 2), (2, 2), (3, 1), (4, 1))},
    "dim 128": {"dim": 128, "kv_heads": 1, "batch": 1, "tile": 128, "heads": 4},
    "wider keys": {"dim": 128, "value_dim": 64, "kv_heads": 1},
    "wider values": {"dim": 64, "value_dim": 128, "kv_heads": 1},
    "lengths of 32 bits": {"lengths": torch.tensor([150, 41], dtype=torch.int32)},
    "sinks in bfloat16": {"sinks": (normal(4) * 3).bfloat16()},
    "sinks of empty rows": {"sinks": normal(4).half(), "lengths": torch.tensor([0, 90])},
    "floor 1, lengths": {"floor": 1.0, "lengths": torch.tensor([0, 65])},
    "a budget that is passed": {"tau": calls.COLD, "budget": 1e-4},
    "many sub-tiles": {"batch": 1, "heads": 2, "kv_heads": 1, "keys": 5000, "share": 0.1, "sharpness": 2.0},
    "many sub-tiles, all refined": {"batch": 1, "heads": 2, "kv_heads": 1, "keys": 3000, "tau": 0.0},
}


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    return HostGpu(tmp_path_factory.mktemp("host_gpu"))


@pytest.fixture
def launches(host, triton_device, monkeypatch):
    """The host in place of a GPU, which all calls that it can serve go to."""
    if triton_device.type != "cpu":
        pytest.skip("a GPU runs it itself")
    monkeypatch.setattr(finish, "nvrtc", host)
    monkeypatch.setattr(finish, "THREADS", 128)
    monkeypatch.setattr(finish, "blocks_of", lambda call: 3)
    calls.use_launch(monkeypatch, programs=16, least_subtiles=1, most_finished=128)
    host.launches = 0
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # what is never written holds NaN
    yield host
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.mark.parametrize("name", CASES)
def test_it_is_the_reference(name, launches, triton_device):
    check(calls.make(**CASES[name]), triton_device)
    assert launches.launches == 1


@pytest.mark.parametrize("blocks", [1, 2, 7, 16])
def test_any_number_of_blocks(blocks, launches, triton_device, monkeypatch):
    monkeypatch.setattr(finish, "blocks_of", lambda call: blocks)
    check(calls.make(keys=900, share=0.2), triton_device)
    assert launches.launches == 1


def test_the_same_bits_again(launches, triton_device):
    call = calls.make(keys=700, share=0.3)
    first, second = (calls.by_kernels(call, triton_device).tensors() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    "given",
    [{"share": 0.2}, {"sharpness": 30.0, "tau": 0.0}, {"lengths": torch.tensor([900, 33]), "floor": 1.0}],
    ids=["some", "so sharp that sums are moved", "all"],
)
def test_it_agrees_with_the_launches_that_it_stands_for(given, launches, triton_device, monkeypatch):
    """Counts and decisions are the same; sums are in another order."""
    call = calls.make(keys=900, heads=8, kv_heads=2, **given)
    together = calls.by_kernels(call, triton_device)
    calls.use_launch(monkeypatch)
    apart = calls.by_kernels(call, triton_device)
    assert launches.launches == 1
    assert torch.equal(together.stats, apart.stats)
    assert torch.allclose(together.out, apart.out, atol=1e-5, rtol=1e-4)
    assert torch.allclose(together.certificate, apart.certificate, rtol=1e-4)


def poisoned(plane: int, at: tuple[int, ...], value: float) -> calls.Call:
    call = calls.make(keys=200, share=0.3, batch=1)
    planes = [x.clone() for x in call.planes]
    planes[plane][at] = value
    return replace(call, planes=tuple(planes))


@pytest.mark.parametrize("plane", [2, 5], ids=["key", "value"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("tau", [None, 0.0])
def test_a_number_that_is_none_reaches_its_head_alone(plane, value, tau, launches, triton_device):
    call = poisoned(plane, (0, 1, 77), value)
    if tau is not None:
        call = replace(call, hot=(torch.full((2,), tau), *call.hot[1:]))
    got = calls.by_kernels(call, triton_device)
    assert launches.launches == 1
    assert torch.isnan(got.out[:, 2:]).all()
    assert torch.isfinite(got.out[:, :2]).all()
    assert got.state[0, 1, 1] == 2
    assert got.state[0, 1, 3] == guard.NONFINITE + guard.EXACT_MISSING
    assert got.state[0, 0, 1] == 0
    assert got.stats[0, :, 6].tolist() == [0, 1]


UNSERVED = {
    "several tokens": {"tokens": 2, "causal": "bottom_right"},
    "five heads": {"heads": 5, "kv_heads": 1},
    "a mask": {"mask": torch.ones(2, 1, 1, 150, dtype=torch.bool)},
    "a bias": {"bias": normal(1, 4, 1, 150)},
    "dim 96": {"dim": 96},
    "sub-tiles of 64": {"tile": 64, "subtile": 64},
    "another rule": {"rule": "lamp_relaxed"},
}


@pytest.mark.parametrize("name", UNSERVED)
def test_what_it_cannot_do_stays_with_the_others(name, launches, triton_device):
    check(calls.make(**UNSERVED[name]), triton_device)
    assert launches.launches == 0


def test_settings_that_change_during_a_step(launches, triton_device, monkeypatch):
    """A controller writes tau whenever it likes: the launch goes by what it was when the step began."""
    from lamp_compile.runtime.kernels import decode

    call = calls.make(keys=600, batch=1, heads=2, kv_heads=1, share=0.2)
    wanted = calls.by_kernels(call, triton_device)
    arguments = call.arguments(triton_device)
    tau, floor = arguments[2][:2]
    real, late = decode.finish, []

    def refine_everything_from_here_on(*given):
        tau.zero_()
        floor.fill_(1.0)
        late.append(real(*given))
        return late[-1]

    monkeypatch.setattr(decode, "finish", refine_everything_from_here_on)
    assert torch.equal(decode.decode(*arguments).out.cpu(), wanted.out)
    assert late == [True]


def test_a_plan_may_do_without(launches, triton_device, monkeypatch):
    calls.use_launch(monkeypatch, most_finished=3)
    check(calls.make(batch=2, kv_heads=2), triton_device)
    assert launches.launches == 0
    assert LaunchPlan(most_finished=0).text() == '{"most_finished": 0}'
    check(calls.make(batch=1, kv_heads=2), triton_device)
    assert launches.launches == 1


def test_what_does_not_compile_is_not_used(launches, triton_device, monkeypatch):
    monkeypatch.setattr(launches, "why_not_compiled", lambda *given: "no compiler")
    check(calls.make(), triton_device)
    assert launches.launches == 0


def test_what_the_device_refuses_is_done_by_the_others(launches, triton_device, monkeypatch):
    monkeypatch.setattr(launches, "launch", lambda *given, **more: False)
    call = calls.make()
    check(call, triton_device)
    assert calls.by_kernels(call, triton_device).stats[..., 0].eq(1).all()
