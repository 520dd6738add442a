"""Providers and native operators: what is asked for is what runs, or an error."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch

import lamp_compile
from lamp_compile.errors import OptionError
from lamp_compile.runtime.ort import _library, providers
from lamp_compile.runtime.ort.session import OrtSession
from tests.huggingface import reference


def test_graphs_are_for_cuda(artifact: Path) -> None:
    with pytest.raises(OptionError, match="captures no graphs"):
        OrtSession(artifact, graph=True)


def test_a_missing_provider_is_an_error(artifact: Path) -> None:
    available = providers.onnxruntime().get_available_providers()
    for word, name in (("cuda", providers.CUDA), ("migraphx", providers.MIGRAPHX), ("amd", providers.MIGRAPHX)):
        if name not in available:
            with pytest.raises(OptionError, match=name):
                OrtSession(artifact, provider=word)
    with pytest.raises(OptionError, match="unknown provider"):
        OrtSession(artifact, provider="tpu")


def test_rocm_is_migraphx_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    ort = providers.onnxruntime()
    monkeypatch.setattr(ort, "get_available_providers", lambda: [providers.MIGRAPHX, providers.CPU])
    with pytest.warns(UserWarning, match="MIGraphX"):
        found = providers.resolve("rocm")
    assert (found.name, found.note != "") == (providers.MIGRAPHX, True)
    assert providers.resolve("amd").note == ""


@pytest.mark.parametrize("strict", [True, False])
def test_a_provider_that_does_not_come_up_is_an_error(
    artifact: Path, monkeypatch: pytest.MonkeyPatch, strict: bool
) -> None:
    """ONNX Runtime itself would warn and give a session on the CPU."""
    ort = providers.onnxruntime()
    if providers.CUDA in ort.get_available_providers():
        pytest.skip("this onnxruntime has the CUDA provider that the test needs to be without")
    monkeypatch.setattr(ort, "get_available_providers", lambda: [providers.CUDA, providers.CPU])
    with pytest.warns(UserWarning, match="available provider"), pytest.raises(OptionError, match=providers.CUDA):
        OrtSession(artifact, provider="cuda", strict=strict)


def test_native_is_an_error_where_it_cannot_be(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_library, "why_not", lambda: "none was compiled")
    with pytest.raises(OptionError, match="none was compiled"):
        OrtSession(artifact, native=True)
    with pytest.warns(UserWarning, match="portable body"):
        session = OrtSession(artifact)
    assert not session.native
    assert "portable body" in session.notes[0]


def test_what_a_provider_leaves_to_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shape arithmetic may stay there; anything else is named."""
    cuda = providers.Provider(providers.CUDA)
    found = {providers.CPU: {"Concat": 78, "Squeeze": 3}, providers.CUDA: {"MatMul": 5}}
    monkeypatch.setattr(providers, "placement", lambda session: found)
    providers._check_placement(None, cuda)
    found[providers.CPU] |= {"MatMulInteger": 2, "ai.lamp.Append": 1}
    with pytest.raises(OptionError, match=r"2 MatMulInteger, 1 ai\.lamp\.Append"):
        providers._check_placement(None, cuda)


@pytest.mark.parametrize("operator", ["Gather", "Where", "Expand", "Reshape", "Identity", "MatMul"])
def test_only_operators_seen_in_shape_arithmetic_may_stay(monkeypatch: pytest.MonkeyPatch, operator: str) -> None:
    """What moves planes and activations would be slow there, and goes by names that shape arithmetic has no need of."""
    monkeypatch.setattr(providers, "placement", lambda session: {providers.CPU: {operator: 1, "Concat": 2}})
    with pytest.raises(OptionError, match=f"left nodes to the CPU: 1 {operator}") as found:
        providers._check_placement(None, providers.Provider(providers.CUDA))
    assert "Concat" not in str(found.value)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("name", [providers.CUDA, providers.MIGRAPHX])
def test_who_sees_to_strictness(monkeypatch: pytest.MonkeyPatch, name: str, strict: bool) -> None:
    """ONNX Runtime itself, but for CUDA: its shape arithmetic must be let through to the CPU."""
    ort, asked = providers.onnxruntime(), {}

    class Session:
        def __init__(self, model: object, options: object, providers: list, **_: object) -> None:
            asked["names"] = [each if isinstance(each, str) else each[0] for each in providers]

        def get_providers(self) -> list[str]:
            return asked["names"]

        def get_provider_graph_assignment_info(self) -> list:
            return []

    class Options(dict):
        add_session_config_entry = dict.__setitem__

    monkeypatch.setattr(ort, "InferenceSession", Session)
    monkeypatch.setattr(ort, "preload_dlls", lambda: None, raising=False)
    options = Options()
    providers.make_session("model.onnx", providers.Provider(name), options, strict=strict)
    alone = strict and name == providers.MIGRAPHX
    assert options.get("session.disable_cpu_ep_fallback") == ("1" if alone else None)
    assert asked["names"] == ([name] if alone else [name, providers.CPU])


@pytest.mark.parametrize("guard", ["select", "if"])
def test_shape_arithmetic_of_our_artifacts_may_stay(guard: str, tmp_path: Path) -> None:
    """ONNX Runtime puts what is computed from shapes and constants alone on the CPU: no operator of it is refused."""
    text = torch.randint(3, 128, (2, 48), generator=torch.Generator().manual_seed(1))
    file = tmp_path / "model.onnx"
    lamp_compile.export_onnx(reference.build("Llama"), text, file, target="cuda", guard=guard)
    ort = providers.onnxruntime()
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(tmp_path / "flat.onnx")
    options.log_severity_level = 4
    ort.InferenceSession(str(file), options, providers=[providers.CPU])
    graph = onnx.load(str(tmp_path / "flat.onnx")).graph
    constants, shapes, operators = {tensor.name for tensor in graph.initializer}, set[str](), set[str]()
    for node in graph.node:
        given = [name for name in node.input if name]
        if node.op_type == "Constant":
            constants.update(node.output)
        elif node.op_type in ("Shape", "Size"):
            shapes.update(node.output)
        elif set(given) & shapes and set(given) <= shapes | constants:
            operators.add(node.op_type)
            shapes.update(node.output)
    assert len(operators) > 3
    assert operators <= providers.SHAPES
