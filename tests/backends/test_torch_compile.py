"""``torch.compile(model, backend="lamp")`` and ``backend=lamp_compile.backend(...)``."""

from __future__ import annotations

import copy

import pytest
import torch
from torch._dynamo.exc import BackendCompilerFailed
from torch._dynamo.utils import counters

import lamp_compile
from lamp_compile.errors import ModelError, OptionError
from lamp_compile.runtime import guard
from tests.backends.modules import stack, tokens
from tests.passes.test_patterns import EXACT, close

pytestmark = pytest.mark.usefixtures("_fresh", "one_thread")


@pytest.fixture
def _fresh():
    torch._dynamo.reset()
    counters.clear()


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


def test_sites_have_the_same_names_on_all_routes():
    model, x = stack(), tokens(40)
    backend = lamp_compile.backend(lower="eager")
    torch.compile(model, backend=backend)(x)
    named = [site.name for site in backend.reports[0].sites]
    torch._dynamo.reset()
    assert [site.name for site in lamp_compile.explain(model, (x,)).sites] == named == ["layers.0", "layers.1"]


def test_found_by_name_and_lowered_to_inductor():
    assert "lamp" in torch.compiler.list_backends()
    model, x = stack(), tokens(40)
    fast = torch.compile(model, backend="lamp", fullgraph=True, options={**EXACT, "inductor.max_autotune": False})
    close(fast(x), model(x))
    assert graphs() == 1
    # Another output at a coarse setting: the rewrite did happen.
    torch._dynamo.reset()
    coarse = torch.compile(
        model, backend="lamp", fullgraph=True, options={"tau": 1e9, "query_bits": 0, "lower": "eager"}
    )
    assert (coarse(x) - model(x)).norm() > 1e-3 * model(x).norm()


@pytest.mark.parametrize("lower", ["eager", "inductor"])
def test_settings_are_hot(lower):
    model, x = stack(kv_heads=2), tokens(300)
    backend = lamp_compile.backend(lower=lower, query_bits=0)
    fast = torch.compile(model, backend=backend, fullgraph=True)
    with torch.no_grad():
        wanted = model(x)
    errors = []
    for settings in ({"tau": 1e9}, {"tau": 0.0}, {"floor": 1}, {"floor": 2}, {"floor": [2, 0]}):
        fast(x)
        backend.controls.set(**settings)
        errors.append(float((fast(x) - wanted).norm() / wanted.norm()))
    high, all_tau, both, exact, mixed = errors
    assert high > 5 * both > 0
    assert all_tau == pytest.approx(both)
    assert exact < 2e-5 < mixed
    assert graphs() == 1
    assert len(backend.reports) == 1
    assert list(backend.controls) == ["layers.0", "layers.1"]


def test_guard_state_is_written_at_every_call():
    model, x = stack(kv_heads=2), tokens(40)
    backend = lamp_compile.backend(lower="inductor", guard_budget=1e-6, guard_hold=5, tau=1e9)
    fast = torch.compile(model, backend=backend, fullgraph=True)
    for _ in range(3):
        fast(x)
    state, stats = backend.guard_state("layers.0")
    assert stats[0, :, guard.STEPS].tolist() == [3, 3]
    assert stats[0, :, guard.RAISED].tolist() == [2, 2]
    assert state[0, :, guard.FLOOR].tolist() == [2.0, 2.0]
    close(fast(x), model(x), 0.02)


@pytest.mark.parametrize("lower", ["eager", "inductor"])
def test_lengths_do_not_recompile(lower):
    model = stack(layers=1)
    backend = lamp_compile.backend(lower=lower, **EXACT)
    fast = torch.compile(model, backend=backend, fullgraph=True, dynamic=True)
    lengths = [130, 131, 200, 256, 257, 300, 512, 513]
    for length in lengths:
        close(fast(tokens(length)), model(tokens(length)))
    assert graphs() == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(dtype):
    model, x = stack().to(dtype), tokens(40).to(dtype)
    out = torch.compile(model, backend=lamp_compile.backend(lower="eager", **EXACT), fullgraph=True)(x)
    assert out.dtype == dtype
    close(out.double(), model(x).double(), {torch.float16: 2e-3, torch.bfloat16: 2e-2, torch.float64: 1e-6}[dtype])


def test_autocast_keeps_the_output_dtype():
    model, x = stack(), tokens(40)
    fast = torch.compile(model, backend=lamp_compile.backend(lower="eager", **EXACT), fullgraph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, wanted = fast(x), model(x)
    assert out.dtype == wanted.dtype
    close(out.float(), wanted.float(), 2e-2)


def test_inference_only_and_training_is_refused():
    x = tokens(40).requires_grad_()
    out = torch.compile(stack(), backend="lamp", options={"lower": "eager"})(x)
    assert not out.requires_grad
    layer = torch.nn.TransformerEncoderLayer(64, 4, 96, batch_first=True).train()
    with pytest.raises(BackendCompilerFailed, match=r"model\.eval\(\)") as caught:
        torch.compile(layer, backend="lamp")(tokens(8))
    assert isinstance(caught.value.inner_exception, ModelError)


def test_unknown_options_are_refused_at_once_by_name():
    for wrong in ("tua", "inductor.max_autotuna"):
        with pytest.raises(OptionError, match=wrong):
            lamp_compile.backend(**{wrong: 1})
    with pytest.raises(OptionError, match="sideways"):
        lamp_compile.backend(mode="sideways")
    with pytest.raises(OptionError, match="max_autotune"):
        lamp_compile.backend(lower="eager", **{"inductor.max_autotune": True})
    with pytest.raises(BackendCompilerFailed, match="'tua'"):
        torch.compile(stack(), backend="lamp", options={"tua": 1})(tokens(8))


def test_no_attention_runs_as_it_was_and_says_so():
    model, x = torch.nn.Linear(8, 8), torch.randn(2, 8)
    backend = lamp_compile.backend(lower="eager")
    assert torch.equal(torch.compile(model, backend=backend)(x), model(x))
    assert "no attention" in backend.reports[0].text()


def test_one_backend_for_two_models_is_refused():
    backend = lamp_compile.backend(lower="eager")
    torch.compile(stack(kv_heads=4), backend=backend)(tokens(8))
    with pytest.raises(BackendCompilerFailed, match=r"one lamp_compile\.backend"):
        torch.compile(stack(kv_heads=2), backend=backend)(tokens(8))


def test_copies_share_their_settings():
    backend = lamp_compile.backend()
    assert copy.deepcopy(backend) is backend


def test_non_finite_inputs_are_flagged():
    x = tokens(40).clone()
    x[0, 3, 0] = torch.nan
    backend = lamp_compile.backend(lower="eager")
    out = torch.compile(stack(layers=1), backend=backend)(x)
    assert out.isnan().any()
    state, stats = backend.guard_state("layers.0")
    assert (state[0, :, guard.FLAGS] % 2 == 1).all()
    assert (stats[0, :, guard.BAD] == 1).all()


def test_no_process_wide_setting_changes():
    import torch._inductor.config as config

    before = config.save_config_portable()
    torch.compile(stack(layers=1), backend="lamp", options={"inductor.max_autotune": True})(tokens(8))
    assert config.save_config_portable() == before


@pytest.mark.parametrize("lower", ["eager", "inductor"])
def test_gradients_stay_off_where_the_model_switches_them(lower):
    class Switching(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = stack(layers=1)

        def forward(self, x):
            with torch.no_grad():
                x = x * 1.0
            return self.inner(x)

    model, x = Switching(), tokens(40)
    out = torch.compile(model, backend=lamp_compile.backend(lower=lower, **EXACT), fullgraph=True)(x)
    assert torch.is_grad_enabled()
    assert not out.requires_grad
    close(out, model(x))
