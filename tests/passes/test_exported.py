"""Programs of torch.export and plain FX graphs: rewritten to the same type, saved, loaded, decomposed, packaged."""

from __future__ import annotations

import io
import shutil

import pytest
import torch

from lamp_compile.driver import rewrite
from lamp_compile.runtime import guard
from tests.backends.modules import stack, tokens
from tests.passes.captured import lamp_counts
from tests.passes.test_patterns import EXACT, close

X = tokens(40)
LENGTH = torch.export.Dim("length", min=2, max=4096)


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def exported(dynamic: bool = False):
    shapes = {"x": {1: LENGTH}} if dynamic else None
    return torch.export.export(stack(), (X,), dynamic_shapes=shapes, strict=True)


class CalledInput(torch.nn.Module):
    """`input` is a builtin of Python: torch.fx gives copies of such nodes another name."""

    def __init__(self):
        super().__init__()
        self.inner = stack()

    def forward(self, input):
        return self.inner(input)


def test_inputs_named_like_builtins_keep_their_names():
    program = torch.export.export(CalledInput().eval(), (X,))
    made = rewrite(program, **EXACT)
    assert made.graph_signature.user_inputs == program.graph_signature.user_inputs == ("input",)
    close(made.module()(X), program.module()(X))
    file = io.BytesIO()
    torch.export.save(made, file)
    file.seek(0)
    close(torch.export.load(file).module()(X), program.module()(X))


@pytest.mark.parametrize("dynamic", [False, True])
def test_runs_saves_loads_and_decomposes(dynamic):
    program = exported(dynamic)
    made = rewrite(program, **EXACT)
    assert isinstance(made, torch.export.ExportedProgram)
    assert lamp_counts(made.graph) == dict.fromkeys(("quantize", "look_ahead", "select", "attend", "guard"), 2)
    assert not lamp_counts(program.graph)
    file = io.BytesIO()
    torch.export.save(made, file)
    file.seek(0)
    loaded = torch.export.load(file)
    for runnable in (made, loaded):
        for x in (X, tokens(300)) if dynamic else (X,):
            close(runnable.module()(x), stack()(x))
    # torch specialises sizes of 1, so a decomposed program stays on its example's side of one storage tile.
    close(made.run_decompositions({}).module()(X), stack()(X))
    notes = made.graph_module.meta["lamp_report"].notes
    assert any("one storage tile" in note for note in notes) == dynamic


def test_changeable_tensors_are_buffers_and_the_guard_writes_them():
    made = rewrite(exported(), tau=1e9, query_bits=0)
    module = made.module()
    wanted = stack()(X)
    coarse = (module(X) - wanted).norm()
    buffers = dict(module.named_buffers())
    assert buffers["lamp_layers_0_stats"][0, :, guard.STEPS].tolist() == [1] * 4
    assert buffers["lamp_layers_0_stats"][0, :, guard.REFINED].tolist() == [0] * 4
    for name in ("lamp_layers_0_floor", "lamp_layers_1_floor"):
        buffers[name].fill_(1)
    assert (module(X) - wanted).norm() < 0.2 * coarse
    mutated = set(made.run_decompositions({}).graph_signature.buffers_to_mutate.values())
    assert mutated == {f"lamp_layers_{i}_{field}" for i in range(2) for field in ("state", "stats")}


def test_non_strict_export_too():
    made = rewrite(torch.export.export(stack(), (X,), strict=False), **EXACT)
    assert made.graph_module.meta["lamp_report"].rewritten == ("layers.0", "layers.1")
    close(made.module()(X), stack()(X))


def test_decomposed_program_serves_all_longer_lengths():
    program = torch.export.export(stack(layers=1), (tokens(200),), dynamic_shapes={"x": {1: LENGTH}}, strict=True)
    module = rewrite(program, **EXACT).run_decompositions({}).module()
    for length in (129, 300):
        close(module(tokens(length)), stack(layers=1)(tokens(length)))


def test_rewriting_twice_changes_nothing_more():
    once = rewrite(exported(), **EXACT)
    twice = rewrite(once)
    assert twice.graph_module.meta["lamp_report"].rewritten == ()
    assert lamp_counts(twice.graph) == lamp_counts(once.graph)


def test_a_program_that_uses_our_buffer_names_keeps_its_own():
    model = stack()
    model.register_buffer("lamp_layers_0_tau", torch.ones(64))
    plain = model.forward
    model.forward = lambda x: plain(x) * model.lamp_layers_0_tau
    program = rewrite(torch.export.export(model, (X,)), **EXACT)
    assert {"lamp_layers_0_tau", "lamp_layers_0_tau_2"} <= set(program.state_dict)
    close(program.module()(X), model(X))


@pytest.mark.skipif(shutil.which("g++") is None, reason="AOTInductor needs a C++ compiler")
@pytest.mark.skipif(
    torch.__version__.startswith("2.11") and torch.version.cuda is not None,
    reason="this build of torch crashes when it loads any AOTInductor package, that of a plain linear layer too",
)
def test_aot_inductor_package(tmp_path):
    made = rewrite(exported(dynamic=True), **EXACT)
    package = torch._inductor.aoti_compile_and_package(made, package_path=str(tmp_path / "model.pt2"))
    loaded = torch._inductor.aoti_load_package(package)
    for x in (X, tokens(300)):
        close(loaded(x), stack()(x))


def test_fx_graph_keeps_its_type_and_its_lengths_free():
    traced = torch.fx.symbolic_trace(stack())
    before = traced.code
    made = rewrite(traced, example_inputs=(X,), **EXACT)
    assert isinstance(made, torch.fx.GraphModule)
    assert traced.code == before
    assert made.meta["lamp_report"].rewritten == ("layers.0", "layers.1")
    for x in (X, tokens(200)):
        close(made(x), stack()(x))
    assert made.get_parameter("layers.0.q.weight") is traced.get_parameter("layers.0.q.weight")
    assert "lamp_layers_0_tau" in made.state_dict()


def test_fx_graph_lowers_through_inductor():
    made = rewrite(torch.fx.symbolic_trace(stack()), example_inputs=(X,), **EXACT)
    torch._dynamo.reset()
    close(torch.compile(made, fullgraph=True)(X), stack()(X))
