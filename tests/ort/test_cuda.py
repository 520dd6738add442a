"""On ONNX Runtime's CUDA provider: sessions give what they give on the CPU, captured or not. Skipped elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

import lamp_compile
from lamp_compile.runtime.ort import providers
from lamp_compile.runtime.ort.session import OrtSession
from tests.huggingface import reference
from tests.tolerances import DEVICES

pytestmark = pytest.mark.skipif(
    providers.CUDA not in onnxruntime.get_available_providers(), reason="needs ONNX Runtime's CUDA provider"
)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama exported for CUDA."""
    path = tmp_path_factory.mktemp("cuda") / "model.onnx"
    text = torch.randint(3, 128, (2, 48), generator=torch.Generator().manual_seed(1))
    lamp_compile.export_onnx(reference.build("Llama"), text, path, target="cuda")
    return path


def decode(session: OrtSession) -> np.ndarray:
    """Prompts of two lengths, steps over which the planes grow, a crop, another order, other settings."""
    prompts = [np.arange(3, 60), np.arange(20, 33)]
    session.start(2)
    found = [session.prefill(prompts, rows=24)]
    found += [session.step([[token], [token + 1]]) for token in range(5, 60)]
    session.crop([50, 20])
    session.reorder([1, 0])
    found += [session.step([[token], [token + 3]]) for token in (7, 8)]
    session.controls.set(floor=1)
    found.append(session.step([[9], [9]]))
    return np.stack(found)


@pytest.mark.parametrize("graph", [False, True], ids=["nodes", "graph"])
def test_it_gives_what_the_cpu_gives(file: Path, graph: bool) -> None:
    sides: list[Any] = [OrtSession(file, provider="cpu", native=False), OrtSession(file, provider="cuda", graph=graph)]
    for side in sides:
        side.controls.set(floor=1)  # no sub-tile at the threshold that falls on either side
    wanted, got = (decode(side) for side in sides)
    assert np.linalg.norm(got - wanted) / np.linalg.norm(wanted) < DEVICES.relative
    one, two = (side.statistics() for side in sides)
    for site, seen in one.items():
        assert np.array_equal(seen.steps, two[site].steps), "recording a graph is no step"
        assert np.array_equal(seen.live, two[site].live)
    assert providers.CUDA in sides[1].placement()


def test_addresses_stay(file: Path) -> None:
    session = OrtSession(file, provider="cuda", graph=True)
    session.start(1, capacity=128)
    session.prefill([np.arange(3, 60)])
    site = session.artifact.planes[0].name
    before = {name: value.data_ptr() for name, value in session.planes(site).items()}
    for token in range(5, 20):
        session.step([[token]])
    assert before == {name: value.data_ptr() for name, value in session.planes(site).items()}
