"""Artifacts that several tests load."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("onnx", reason="ONNX artifacts need the onnx package (extra: onnx-cpu)")
pytest.importorskip("onnxruntime", reason="needs ONNX Runtime (extra: onnx-cpu)")

from lamp_compile.runtime.ort import _library
from lamp_compile.runtime.ort.session import OrtSession
from tests.ort import toy


@pytest.fixture(scope="session")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy decoder as a file."""
    return toy.write(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="session")
def native_operators() -> None:
    """The native operators can be used here."""
    if reason := _library.why_not():
        pytest.skip(reason)


@pytest.fixture(scope="session")
def opened(artifact: Path) -> dict[str, OrtSession]:
    """Sessions by how they compute, opened when first asked for."""
    return {}


@pytest.fixture(params=["native", "portable"])
def session(request: pytest.FixtureRequest, artifact: Path, opened: dict[str, OrtSession]) -> OrtSession:
    """A session of each way of computing; its controls are those of the plan."""
    if request.param == "native":
        request.getfixturevalue("native_operators")
    if request.param not in opened:
        opened[request.param] = OrtSession(artifact, native=request.param == "native", threads=1)
    found = opened[request.param]
    found.controls.set(tau=0.01, floor=0, budget=0.25)
    return found
