"""The decode step through torch.export, strict, planes as buffers: expanded, saved, loaded, decomposed, packaged."""

from __future__ import annotations

import io
import shutil
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import lamp_compile
from lamp_compile.errors import ModelError
from tests.huggingface import reference
from tests.tolerances import TIPPED_EIGHT

NODES = {
    "cpu_kernels": ("append", "fused_attention"),
    "reference_only": ("quantize", "look_ahead", "select", "attend", "guard"),
}


@pytest.fixture(autouse=True)
def _no_grad() -> Any:
    with torch.no_grad():
        yield


@pytest.fixture(params=list(NODES))
def where(request: pytest.FixtureRequest) -> str:
    """With kernels on the CPU and without."""
    request.getfixturevalue(request.param)
    name: str = request.param
    return name


@pytest.fixture
def program(where: str, fast: Any) -> Any:
    """One step of one sequence, rewritten and not yet run."""
    step = lamp_compile.DecodeStep(fast, capacity=64)
    exported = torch.export.export(step, (torch.tensor([[5]]),), strict=True)
    counts = Counter(
        str(node.target).removeprefix("lamp.") for node in exported.graph.nodes if "lamp." in str(node.target)
    )
    assert counts == {f"{NODES[where][0]}.default": 2, "attention.cached": 2}
    return lamp_compile.rewrite(exported)


def one_by_one(run: Callable[[Tensor], Tensor], ids: Tensor) -> Tensor:
    return torch.cat([run(token.reshape(1, 1)) for token in ids[0]], dim=1)


def wanted(fast: Any, ids: Tensor) -> Tensor:
    logits: Tensor = fast(ids, past_key_values=fast.lamp.cache()).logits
    return logits


def test_nodes_of_a_site_and_planes_as_buffers(where: str, program: Any) -> None:
    counts = Counter(str(node.target).split(".")[1] for node in program.graph.nodes if "lamp." in str(node.target))
    assert counts == dict.fromkeys(NODES[where], 2)
    assert program.graph_module.meta["lamp_report"].rewritten == (
        "model.layers.0.self_attn",
        "model.layers.1.self_attn",
    )
    kinds = {spec.kind.name for spec in program.graph_signature.input_specs}
    assert kinds == {"PARAMETER", "BUFFER", "USER_INPUT"}
    assert program.state_dict["layer1_v_high"].dtype == torch.uint8


def test_saved_loaded_and_decomposed_it_decodes_the_same(program: Any, fast: Any, ids: Tensor) -> None:
    ids = ids[:1, :12]
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file)
    decomposed = loaded.run_decompositions({})
    assert len(decomposed.graph_signature.buffers_to_mutate) == 18  # six planes, state, stats and length, two layers
    expected = wanted(fast, ids)
    for run in (program.module(), decomposed.module()):
        assert reference.relative(one_by_one(run, ids), expected) < TIPPED_EIGHT.relative


def test_floor_is_a_buffer_that_acts(program: Any, ids: Tensor) -> None:
    run = program.module()
    one_by_one(run, ids[:1, :20])
    seen = dict(run.named_buffers())
    before = int(seen["layer0_stats"][..., 2].sum())
    seen["layer0_floor"].fill_(1)
    run(torch.tensor([[7]]))
    live = seen["layer0_stats"][..., 1]
    assert int(live.sum()) > 0
    assert int(seen["layer0_stats"][..., 2].sum()) == before + live.shape[1]


@pytest.mark.skipif(shutil.which("g++") is None, reason="AOTInductor needs a C++ compiler")
@pytest.mark.skipif(
    torch.__version__.startswith("2.11") and torch.version.cuda is not None,
    reason="this build of torch crashes when it loads any AOTInductor package, that of a plain linear layer too",
)
def test_packaged_with_aot_inductor(program: Any, fast: Any, ids: Tensor, tmp_path: Any) -> None:
    ids = ids[:1, :6]
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "step.pt2"))
    run = torch._inductor.aoti_load_package(package)
    assert reference.relative(one_by_one(run, ids), wanted(fast, ids)) < TIPPED_EIGHT.relative


def test_what_cannot_be_exported() -> None:
    with pytest.raises(ModelError, match="no transformers decoder compiled"):
        lamp_compile.DecodeStep(torch.nn.Linear(2, 2))
    partly = lamp_compile.compile(reference.build("Llama"), mode="eager", fuel=1)
    with pytest.raises(ModelError, match="layer 1 keeps float"):
        lamp_compile.DecodeStep(partly)
