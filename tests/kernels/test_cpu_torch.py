"""The core as torch's own kernels on CPUs: it computes what the way by Python computes, takes the calls of a decode
step without it, and hands on what it does not serve."""

from __future__ import annotations

import ctypes
import gc
import threading
import weakref
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from lamp_compile.errors import InputError, LampError
from lamp_compile.runtime import fused_ops, guard, kernels
from lamp_compile.runtime.kernels import cpu
from lamp_compile.runtime.kernels.cpu import _library
from tests.kernels import calls
from tests.kernels.calls import Call
from tests.runtime import test_layout_lanes

pytestmark = pytest.mark.skipif(cpu.why_not() is not None, reason=f"{cpu.why_not()}")


HERE = calls.Native(cpu.instruction_set())


def run(call: Call) -> Tensor:
    out: Tensor = torch.ops.lamp.fused_attention(
        call.q, *call.planes, *call.hot, call.balance, *call.seen, **call.options
    )
    return out


def step(**given: Any) -> Call:
    return calls.make(**{"lengths": torch.tensor([150, 97]), "causal": "bottom_right", **given})


def test_every_torch_that_is_served_has_the_interface():
    """Without it all goes by Python, and nothing but its time would show it."""
    assert cpu.join_torch() is None


def both(call: Call) -> tuple[bool, Tensor, Tensor]:
    """Whether the core took the call, and the output; held against the way by Python, guard's state and all."""
    other = replace(call, hot=tuple(x.clone() for x in call.hot))
    before = cpu.served()
    out = run(call)
    taken = cpu.served() - before
    with cpu.without_torch():
        wanted = run(other)
    assert cpu.served() == before + taken, "switched off, it serves nothing"
    assert torch.equal(out, wanted)
    for mine, theirs in zip(call.hot[3:], other.hot[3:], strict=True):
        assert torch.equal(mine, theirs), "the guard's state or statistics"
    return bool(taken), out, wanted


SERVED: dict[str, Callable[[], Call]] = {
    "as it is": step,
    "balance": lambda: step(balance=torch.rand(2, 64) + 0.5),
    "balance of sequences": lambda: step(balance=torch.rand(2, 2, 64) + 0.5),
    "mask": lambda: step(mask=torch.rand(2, 1, 1, 150) > 0.3),
    "mask of strides": lambda: step(mask=(torch.rand(150, 2) > 0.3).T[:, None, None]),
    "mask of heads": lambda: step(mask=torch.rand(4, 1, 150) > 0.3),
    "bias": lambda: step(bias=torch.randn(1, 4, 1, 150)),
    "bias for the whole room": lambda: step(bias=torch.randn(2, 1, 1, 160)),
    "one bias": lambda: step(bias=torch.randn(1)),
    "sinks": lambda: step(sinks=torch.randn(4)),
    "sinks in bfloat16": lambda: step(sinks=torch.randn(4).bfloat16()),
    "sinks in float16": lambda: step(sinks=torch.tensor([1.5, 3e-7, -torch.inf, -0.0]).half()),
    "start": lambda: step(start=torch.randint(0, 90, (2,))),
    "lengths in 32 bits": lambda: step(lengths=torch.tensor([150, 97], dtype=torch.int32)),
    "lengths of strides": lambda: step(lengths=torch.tensor([150, 0, 97, 0])[::2]),
    "one length": lambda: step(lengths=torch.tensor([120])),
    "no lengths": lambda: step(lengths=None),
    "several tokens": lambda: step(tokens=5),
    "a window": lambda: step(window=40),
    "a cap": lambda: step(softcap=20.0),
    "a scale": lambda: step(scale=0.3),
    "tau of heads": lambda: replace(step(), hot=(torch.tensor([0.01, 0.2]), *step().hot[1:])),
    "no rotation": lambda: step(rotation="none"),
    "80 channels": lambda: step(dim=80),
    "96 and 64 channels": lambda: step(dim=96, value_dim=64),
    "strict": lambda: step(rule="lamp_strict"),
    "relaxed": lambda: step(rule="lamp_relaxed"),
    "budget": lambda: step(budget=1e-6),
    "everything refined": lambda: replace(step(), hot=(step().hot[0], torch.ones(2), *step().hot[2:])),
}


@pytest.mark.parametrize("name", SERVED)
def test_a_step_is_served_and_gives_the_same_bits(name):
    torch.manual_seed(3)
    laid = calls.layouts(SERVED[name](), HERE)
    assert len(laid) == 2 or name == "80 channels"
    for call in laid:
        taken, out, wanted = both(call)
        assert taken
        assert (out.device, out.dtype, out.stride()) == (wanted.device, wanted.dtype, wanted.stride())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("strided", [False, True])
def test_queries_of_any_dtype_and_strides(dtype, strided):
    call = step(tokens=3)
    q = call.q.to(dtype)
    if strided:
        q = q.transpose(1, 2).contiguous().transpose(1, 2)
    taken, out, _ = both(replace(call, q=q))
    assert taken
    assert out.dtype == dtype


@pytest.mark.parametrize("lanes", [False, True], ids=["rows", "lanes"])
def test_pages_of_a_pool(lanes):
    call = step(lengths=torch.tensor([90, 64]), lanes=lanes)
    planes = tuple(x[:1].repeat_interleave(2, 2) for x in call.planes)
    table = torch.tensor([[1, 4, 2, 0, 3], [3, 0, 5, 2, 9]], dtype=torch.int32)
    taken, *_ = both(replace(call, planes=planes, seen=(*call.seen[:5], table)))
    assert taken
    taken, *_ = both(replace(call, planes=planes, seen=(*call.seen[:5], table.long())))
    assert not taken, "a table in 64 bits is copied"


def by_lanes(call: Call, change: Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]] = tuple) -> Call:
    return replace(call, planes=change(calls.planes_by_lanes(call.planes)))


HANDED_ON: dict[str, Callable[[Call], Call]] = {
    "tau in float64": lambda c: replace(c, hot=(c.hot[0].double(), *c.hot[1:])),
    "tau turned": lambda c: replace(c, hot=(torch.tensor([[0.1, 1e9], [0.0, 0.05]]).t(), *c.hot[1:])),
    "bias in float64": lambda c: replace(c, seen=(None, torch.zeros(1, 1, 1, 150).double(), *c.seen[2:])),
    "one sink": lambda c: replace(c, seen=(*c.seen[:2], torch.zeros(1), *c.seen[3:])),
    "lengths of two axes": lambda c: replace(c, seen=(*c.seen[:4], torch.tensor([[150, 97]]), None)),
    "channels apart": lambda c: replace(c, q=torch.stack((c.q, c.q), 4)[..., 0]),
    "queries in float64": lambda c: replace(c, q=c.q.double()),
    "planes of strides": lambda c: replace(
        c, planes=(c.planes[0].transpose(3, 4).contiguous().transpose(3, 4), *c.planes[1:])
    ),
    "a balance in bfloat16": lambda c: replace(c, balance=torch.ones(2, 64).bfloat16()),
    "lanes of strides": lambda c: by_lanes(
        c, lambda planes: (planes[0].transpose(4, 5).contiguous().transpose(4, 5), *planes[1:])
    ),
}


@pytest.mark.parametrize("name", HANDED_ON)
def test_what_the_core_does_not_read_as_it_is_goes_by_python(name):
    taken, *_ = both(HANDED_ON[name](step()))
    assert not taken


@pytest.mark.parametrize("options", [{"rule": "mass"}, {"query_bits": 16}, {"subtile": 16}])
def test_settings_that_it_does_not_know_go_by_python(options):
    taken, *_ = both(step(**options))
    assert not taken


def of_wrong_sizes(name: str, call: Call) -> Call:
    return replace(call, planes=test_layout_lanes.wrong_planes(name, call))


WRONG: dict[str, Callable[[Call], Call]] = {
    "batch": lambda c: replace(c, q=c.q[:1]),
    "heads": lambda c: replace(c, q=c.q[:, :3]),
    "channels": lambda c: replace(c, q=c.q[..., :32].contiguous()),
    "no tokens": lambda c: replace(c, q=c.q[:, :, :0]),
    "lengths in floats": lambda c: replace(c, seen=(*c.seen[:4], torch.tensor([1.0, 2.0]), None)),
    "mask in floats": lambda c: replace(c, seen=(torch.zeros(2, 1, 1, 150), *c.seen[1:])),
    "mask of other keys": lambda c: replace(c, seen=(torch.zeros(2, 1, 1, 99) > 0, *c.seen[1:])),
    "a table of pages alone": lambda c: replace(c, seen=(*c.seen[:5], torch.arange(5, dtype=torch.int32))),
    "tau of three heads": lambda c: replace(c, hot=(torch.zeros(3), *c.hot[1:])),
    "a scale too short": lambda c: replace(c, planes=(*c.planes[:5], c.planes[5][..., :-1].contiguous())),
    "a residual too short": lambda c: replace(
        c, planes=(*c.planes[:4], c.planes[4][:, :, :-1].contiguous(), c.planes[5])
    ),
    "a state of two numbers": lambda c: replace(c, hot=(*c.hot[:3], c.hot[3][..., :2].contiguous(), c.hot[4])),
    "statistics of two numbers": lambda c: replace(c, hot=(*c.hot[:4], c.hot[4][..., :2].contiguous())),
    "statistics of other heads": lambda c: replace(c, hot=(*c.hot[:4], c.hot[4][:, :1].contiguous())),
    "causal": lambda c: replace(c, options={**c.options, "causal": "sideways"}),
    "channels of planes by lanes": lambda c: replace(by_lanes(c), q=c.q[..., :32].contiguous()),
    "80 channels by lanes": lambda c: by_lanes(step(dim=80)),
    **{
        f"{name}={value}": (lambda c, name=name, value=value: replace(c, options={**c.options, name: value}))
        for name, value in (
            ("rotation", "zzz"),
            ("query_bits", 3),
            ("window", -5),
            ("keys", -1),
            ("softcap", -1.0),
            ("softcap", float("nan")),
            ("subtile", 0),
            ("subtile", 24),
            ("guard_window", 0),
            ("guard_hold", -1),
            ("hysteresis", float("nan")),
        )
    },
    "planes by lanes of one sequence": lambda c: by_lanes(c, lambda planes: tuple(x[:1] for x in planes)),
    **{f"planes by lanes, {name}": partial(of_wrong_sizes, name) for name in test_layout_lanes.WRONG},
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_refused_in_the_same_words(name):
    call = WRONG[name](step())
    settings = fused_ops.settings(call.options)
    arguments = (call.q, *call.planes, *call.hot, call.balance, *call.seen, *settings)
    before = [x.clone() for x in call.hot]
    with pytest.raises(InputError) as wanted:
        fused_ops._fused_attention(*arguments)
    for operator in (torch.ops.lamp.fused_attention, torch.ops.lamp.fused_attention.default):
        with pytest.raises(InputError) as found:
            operator(*arguments)
        assert str(found.value) == str(wanted.value)
        assert type(found.value) is type(wanted.value)
    assert all(torch.equal(x, y) for x, y in zip(call.hot, before, strict=True))
    both(step())  # and serves the next one


def test_other_errors_stay_what_they_are():
    """Of torch itself: the schema."""
    call = step()
    with pytest.raises(InputError):
        run(WRONG["batch"](call))
    with pytest.raises(RuntimeError, match="missing value for argument") as found:
        torch.ops.lamp.fused_attention(call.q)
    assert not isinstance(found.value, LampError)


def test_the_guard_goes_on_from_call_to_call():
    call = step(budget=1e-6)
    for _ in range(3):
        assert both(call)[0]
    assert int(call.hot[4][..., guard.RAISED].sum()) > 0


def test_threads_are_those_that_torch_is_told_to_use():
    call, before = step(), torch.get_num_threads()
    try:
        outs = []
        for count in (1, 2):
            torch.set_num_threads(count)
            outs.append(both(replace(call, hot=tuple(x.clone() for x in call.hot)))[1])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*outs)


def test_refusals_belong_to_their_thread():
    call, failures = step(), []

    def work(wrong: bool) -> None:
        for _ in range(50):
            try:
                run(WRONG["batch"](call) if wrong else replace(call, hot=tuple(x.clone() for x in call.hot)))
                failures.append("not refused") if wrong else None
            except InputError as error:
                if not wrong or "batch 1" not in str(error):
                    failures.append(str(error))

    workers = [threading.Thread(target=work, args=(wrong,)) for wrong in (True, False)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failures


KEPT: dict[str, Callable[[Call], Call]] = {
    "served": lambda c: c,
    "handed on": HANDED_ON["channels apart"],
    "refused": WRONG["batch"],
}


@pytest.mark.parametrize("kind", KEPT)
def test_nothing_is_kept_of_a_call(kind):
    """Every tensor is handed over with a reference of its own; nor does an error hold on to them."""
    call = step(balance=torch.rand(2, 64), mask=torch.rand(2, 1, 1, 150) > 0.3, sinks=torch.randn(4))
    call = KEPT[kind](call)
    tensors = [x for x in (call.q, *call.planes, *call.hot, call.balance, *call.seen) if x is not None]
    before = [x._use_count() for x in tensors]
    gc.disable()
    try:
        for _ in range(3):
            with suppress(InputError):
                run(call)
        assert [x._use_count() for x in tensors] == before
        gone = weakref.ref(call.q)
        del call, tensors
        assert gone() is None
    finally:
        gc.enable()


class Heap(ctypes.Structure):
    """``mallinfo2`` of glibc."""

    _fields_ = [(name, ctypes.c_size_t) for name in ["arena", "a", "b", "c", "d", "e", "f", "used", "free", "g"]]


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="needs glibc, which counts its heap")
@pytest.mark.parametrize("kind", KEPT)
def test_the_heap_does_not_grow_with_calls(kind):
    """Words, optional tensors and outputs made in place of others are freed, whatever becomes of a call."""
    used = ctypes.CDLL(None).mallinfo2
    used.restype = Heap
    call, times = KEPT[kind](step(balance=torch.rand(2, 64), start=torch.zeros(2, dtype=torch.int64))), 1500

    def calls_many() -> int:
        before = used().used
        for _ in range(times):
            with suppress(InputError):
                run(call)
        gc.collect()
        return int(used().used - before)

    calls_many()
    assert min(calls_many() for _ in range(3)) < 24 * times


def test_what_interrupts_python_interrupts_the_call(monkeypatch):
    """Ctrl-C in a reference that takes its time."""

    def interrupted(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(kernels, "attend", interrupted)
    call = HANDED_ON["channels apart"](step())
    with pytest.raises(KeyboardInterrupt):
        run(call)


def test_errors_without_words_keep_their_type(monkeypatch):
    def fails(*args: Any) -> None:
        raise MemoryError from ValueError("why")

    monkeypatch.setattr(kernels, "attend", fails)
    with pytest.raises(MemoryError) as found:
        run(HANDED_ON["channels apart"](step()))
    assert isinstance(found.value.__cause__, ValueError)
    assert found.traceback[-1].name == "fails", "where it was raised"


def test_a_checked_operator_called_by_itself_raises():
    call = WRONG["batch"](step())
    settings = fused_ops.settings({**call.options, "launch": ""})
    words = [ctypes.create_string_buffer(x.encode()) if isinstance(x, str) else None for x in settings]
    given = [x if word is None else ctypes.addressof(word) for x, word in zip(settings, words, strict=True)]
    with pytest.raises(InputError):
        torch.ops.lamp._fused_attention_checked(call.q, *call.planes, *call.hot, call.balance, *call.seen, *given)


def test_switched_off_twice_it_is_off_until_both_are_over():
    with cpu.without_torch():
        with cpu.without_torch():
            pass
        before = cpu.served()
        run(step())
        assert cpu.served() == before
    run(step())
    assert cpu.served() == before + 1


def test_without_torchs_interface_there_is_a_reason(monkeypatch):
    _library.join_torch.cache_clear()
    monkeypatch.setitem(_library.TORCH, "empty", "no_such_function")
    try:
        assert "no stable C interface" in str(_library.join_torch())
    finally:
        monkeypatch.undo()
        _library.join_torch.cache_clear()
        with pytest.MonkeyPatch.context() as patch:  # torch has the kernels already, and would warn of others
            patch.setattr(_library, "load", lambda: type("Core", (), {"lamp_join_torch": lambda *_: 0}))
            assert _library.join_torch() is None
