"""When kernels run: a reason for every case they leave to the reference, and the same arguments for both."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch

from lamp_compile.errors import InputError
from lamp_compile.runtime import fused_ops, kernels
from tests.kernels import calls

OPTIONS = {"k_format": "nested8", "v_format": "nested8", "rule": "energy", "query_bits": 8, "subtile": 32}


def planes(dim: int = 128, value_dim: int = 128) -> list[torch.Tensor]:
    """Of two sequences, as if on a device with kernels."""
    k, v = torch.empty(2, 2, 4, 32, dim // 2), torch.empty(2, 2, 4, value_dim // 2, 32)
    scale = torch.empty(2, 2, 128)
    return [x.to("meta") for x in (k, k, scale, v, v, scale)]


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


@pytest.fixture
def any_device(monkeypatch) -> Iterator[None]:
    """As if kernels ran wherever tensors are."""
    monkeypatch.setattr(kernels, "why_not_device", lambda kind: None)
    with kernels.cpu.without_torch():
        yield


def why_not(q=None, stored=None, state=None, **options) -> str | None:
    q = meta(2, 8, 1, 128) if q is None else q
    state = meta(2, 2, 4, dtype=torch.float32) if state is None else state
    return kernels.why_not_attend(q, tuple(stored or planes()), state, {**OPTIONS, **options})


def test_other_devices_have_a_reason(monkeypatch):
    assert "this is meta" in str(kernels.why_not_device("meta"))
    assert "this is meta" in str(kernels.why_not_store(tuple(planes()), "nested8", "nested8"))
    assert "CUDA" in str(why_not())
    monkeypatch.setattr(kernels, "_TRITON", False)
    assert kernels.why_not_device("cuda") == "triton is not installed"
    monkeypatch.setattr(kernels, "_TRITON", True)
    assert kernels.why_not_device("cuda") is None


@pytest.mark.usefixtures("any_device")
def test_what_kernels_can_do_has_no_reason():
    assert kernels.why_not_store(tuple(planes()), "nested8", "nested8") is None
    assert why_not() is None
    for rule in ("energy", "lamp_strict", "lamp_relaxed"):
        assert why_not(rule=rule) is None
    for dtype in (torch.float16, torch.float32):
        assert why_not(q=meta(2, 8, 5, 256, dtype=dtype), stored=planes(256, 256)) is None


def not_contiguous(index: int) -> list[torch.Tensor]:
    stored = planes()
    stored[index] = stored[index].transpose(-1, -2).contiguous().transpose(-1, -2)
    return stored


REASONS = {
    "k_format": ({"k_format": "int8"}, "int8 and nested8"),
    "v_format": ({"v_format": "fp8"}, "nested8 and fp8"),
    "mass": ({"rule": "mass"}, "'mass' needs all sub-tiles"),
    "control": ({"rule": "static_tiles"}, "'static_tiles'"),
    "query as it is": ({"query_bits": 0}, "query_bits 0"),
    "query in bfloat16": ({"query_bits": 16}, "query_bits 16"),
    "sub-tile": ({"subtile": 16}, "subtile 16"),
    "float64": ({"q": meta(2, 8, 1, 128, dtype=torch.float64)}, "float64"),
    "shared state": ({"state": meta(1, 2, 4)}, "sequences share"),
    "wide keys": ({"stored": planes(320, 128)}, "head dimension of 320"),
    "wide values": ({"stored": planes(128, 512)}, "head dimension of 512"),
    "wide sub-tile": ({"subtile": 64}, "sub-tiles of 64 keys in storage tiles of 32"),
    "views of a state": ({"state": meta(2, 4, 2, dtype=torch.float32).transpose(1, 2)}, "state that is not contiguous"),
    "state of another dtype": ({"state": meta(2, 2, 4)}, "not contiguous float32"),
    "many heads": (
        {"q": meta(65536, 4, 1, 128), "state": meta(65536, 2, 4, dtype=torch.float32)},
        "more than 65535 sequences",
    ),
    "keys not contiguous": ({"stored": not_contiguous(0)}, "not contiguous"),
    "values not contiguous": ({"stored": not_contiguous(4)}, "not contiguous"),
}


@pytest.mark.usefixtures("any_device")
@pytest.mark.parametrize("name", REASONS)
def test_what_kernels_cannot_do_has_a_reason(name):
    arguments, reason = REASONS[name]
    assert reason in str(why_not(**arguments))
    if "stored" in arguments or "format" in name:
        formats = [arguments.get(key, "nested8") for key in ("k_format", "v_format")]
        assert reason in str(kernels.why_not_store(tuple(arguments.get("stored") or planes()), *formats))


def why_not_predicted(tokens=1, rule="energy", pages=4, rank=16, dtype=torch.float16) -> str | None:
    """Of a site with a network, its planes of 128 keys."""
    kept = (meta(2, 2, 16, rank, dtype=dtype), *(meta(2, 2, n, dtype=torch.float32) for n in (8, 7)))
    options = {**OPTIONS, "rule": rule, "pages": pages}
    return kernels.why_not_predicted(meta(2, 8, tokens, 128), tuple(planes()), kept, options)


def test_what_predicted_steps_cannot_do_has_a_reason():
    assert why_not_predicted() is None
    assert "5 new tokens" in str(why_not_predicted(tokens=5))
    assert "'lamp_strict'" in str(why_not_predicted(rule="lamp_strict"))
    assert "summaries of 64 keys" in str(why_not_predicted(pages=32))
    assert "rank 65" in str(why_not_predicted(rank=65))
    assert "not contiguous float16" in str(why_not_predicted(dtype=torch.float32))


def on_cpu(**given) -> tuple[calls.Call, tuple, tuple]:
    """(call, arguments of the operators, its state and statistics)."""
    call = calls.make(tokens=2, causal="bottom_right", lengths=torch.tensor([150, 70]), budget=1e-6, **given)
    hot = tuple(x.clone() for x in call.hot)
    return call, (call.q, *call.planes, *hot, call.balance, *call.seen), hot[3:]


@pytest.mark.usefixtures("reference_only")
def test_without_kernels_it_is_attention_and_two_copies():
    call, arguments, (state, stats) = on_cpu()
    wanted = torch.ops.lamp.attention.cached(*arguments, **call.options)
    assert not state.any()
    out = torch.ops.lamp.fused_attention(*arguments, **call.options)
    for one, other in zip((out, state, stats), wanted, strict=True):
        assert torch.equal(one, other)
    assert state[..., 1].eq(1).all()
    assert stats[..., 0].eq(1).all()


def test_where_there_are_kernels_both_operators_use_them(device):
    """The same bits by the kernels themselves, fused_attention and attention.cached."""
    if device == torch.device("cpu"):
        pytest.skip("operators on CPU tensors use the compiled core, not Triton's interpreter")
    call, arguments, (state, stats) = on_cpu()
    made = calls.by_kernels(call, device)
    if device.type == "cuda":
        q, stored, hot, balance, seen, _ = call.arguments(device)
        arguments, (state, stats) = (q, *stored, *hot, balance, *seen), hot[3:]
    cached = torch.ops.lamp.attention.cached(*arguments, **call.options)
    assert not state.any()
    out = torch.ops.lamp.fused_attention(*arguments, **call.options)
    for got in (cached, (out, state, stats)):
        for one, other in zip(got, (made.out, made.state, made.stats), strict=True):
            assert torch.equal(one.cpu(), other)
    by_reference = calls.by_reference(call, calls.levels_of(call))
    assert not torch.equal(made.out, by_reference.out)


@pytest.mark.usefixtures("any_device")
@pytest.mark.parametrize(
    ("index", "bad"),
    [(0, torch.zeros(2, 3, 1, 64)), (0, torch.zeros(1, 4, 1, 64)), (0, torch.zeros(2, 4, 1, 32)),
     (13, torch.zeros(2, 1, 1, 150)), (14, torch.zeros(2, 4, 2, 9))],
    ids=["heads", "batch", "head_dim", "mask dtype", "bias keys"],
)  # fmt: skip
def test_bad_input_is_refused_before_any_kernel(index, bad, monkeypatch):
    monkeypatch.setattr(kernels, "attend", lambda *args: pytest.fail("a kernel was launched"))
    call, arguments, _ = on_cpu()
    arguments = list(arguments)
    arguments[index] = bad
    with pytest.raises(InputError):
        torch.ops.lamp.fused_attention(*arguments, **call.options)


def test_opcheck_of_fused_attention():
    call, arguments, _ = on_cpu()
    torch.library.opcheck(torch.ops.lamp.fused_attention.default, arguments, call.options)


def test_settings_come_in_the_order_of_the_schema():
    arguments = torch.ops.lamp.fused_attention.default._schema.arguments[1:]
    tensors, settings = arguments[: fused_ops.TENSORS], arguments[fused_ops.TENSORS :]
    assert all("Tensor" in str(argument.type) for argument in tensors)
    assert tuple(argument.name for argument in settings) == fused_ops.SETTINGS


@pytest.mark.parametrize("launch", [{}, {"launch": "{}"}])
def test_settings_by_position_and_by_name_are_the_same(launch):
    call, arguments, (state, _) = on_cpu()
    _, others, (other_state, _) = on_cpu()
    options = {**call.options, **launch}
    settings = fused_ops.settings(options)
    by_name = torch.ops.lamp.fused_attention(*arguments, **options)
    assert torch.equal(torch.ops.lamp.fused_attention(*others, *settings), by_name)
    assert torch.equal(state, other_state)


def test_opcheck_of_append():
    call, _, _ = on_cpu()
    arguments = (call.k[:, :, :3], call.v[:, :, :3], *call.planes, None, torch.tensor([7, 150 - 3]), None)
    options = {name: call.options[name] for name in ("k_format", "v_format", "rotation", "site")}
    torch.library.opcheck(torch.ops.lamp.append.default, arguments, options)


@pytest.mark.usefixtures("any_device")
def test_settings_of_another_model_are_refused_not_read():
    """Kernels read settings by head: one number too few would be somebody else's."""
    call, arguments, _ = on_cpu()
    for index, name in ((7, "tau"), (8, "floor"), (9, "budget")):
        wrong = [*arguments]
        wrong[index] = wrong[index][:1]
        with pytest.raises(InputError, match=f"{name} has shape"):
            torch.ops.lamp.fused_attention(*wrong, **call.options)


def test_a_gpu_that_kernels_are_not_compiled_for_is_refused(monkeypatch):
    """Asked once, ahead of graphs; the reference runs there."""
    old = type("Properties", (), {"major": 7, "minor": 0, "name": "Old"})()
    monkeypatch.setattr(kernels, "_TRITON", True)
    monkeypatch.setattr(kernels, "_refused", {})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: old)
    gpu = torch.device("cuda", 0)
    assert kernels.target_name(gpu) == ""
    kernels.prepare(gpu, "hadamard", 128)
    assert kernels._refused == {gpu: "kernels need compute capability 8.0, this is 7.0"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CPU tensors go to the compiled core, which has no device")
def test_launches_go_to_the_device_of_their_tensors(monkeypatch, triton_device):
    """Triton takes the current device, which may be another."""
    asked, device = [], triton_device

    def on(where):
        asked.append(where)
        return nullcontext()

    monkeypatch.setattr(kernels, "_on", on)
    call = calls.make()
    q, stored, hot, balance, seen, options = call.arguments(device)
    torch.ops.lamp.fused_attention(q, *stored, *hot, balance, *seen, **options)
    store = {name: options[name] for name in ("k_format", "v_format", "rotation", "site")}
    k, v = call.k[:, :, :1].to(device), call.v[:, :, :1].to(device)
    torch.ops.lamp.append(k, v, *stored, None, torch.zeros(1, dtype=torch.int64, device=device), None, **store)
    assert asked == [q.device, q.device]
