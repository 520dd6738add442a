"""Settings for all tests. Environment variables are for the test run only; the library reads none."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

# Workers of pytest-xdist share the cores: each has one thread. OpenMP reads this once, when torch is imported.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]

# Triton settles when it is first imported whether it interprets, and any test that touches Inductor may import it.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For tiny models: more threads gain nothing, and waiting for them is slow where other work runs."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def reference_only(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As on a device without kernels: the reference computes, and graphs keep its five nodes."""
    from lamp_compile.runtime import kernels

    monkeypatch.setattr(kernels, "why_not_device", lambda kind: "kernels are switched off for this test")
    with kernels.cpu.without_torch():
        yield


@pytest.fixture
def cpu_kernels() -> None:
    """The kernels for CPUs run on CPU tensors here."""
    from lamp_compile.runtime import kernels

    if reason := kernels.why_not_device("cpu"):
        pytest.skip(reason)


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture(scope="session")
def nano() -> Path:
    """The packaged nano model: a trained Llama with D 64."""
    return ROOT / "examples" / "models" / "nano"


@pytest.fixture(scope="session")
def small_model() -> Path:
    """A larger trained model (D 128, 4,096 tokens), where the run names one."""
    return _named("LAMP_TEST_MODEL")


@pytest.fixture(scope="session")
def text_data() -> Path:
    """Folder of texts, where the run names one."""
    return _named("LAMP_TEST_DATA")


def _named(variable: str) -> Path:
    value = os.environ.get(variable)
    if not value:
        pytest.skip(f"{variable} names no folder")
    folder = Path(value)
    if not folder.is_dir():
        pytest.fail(f"{variable}={value} is no folder")
    return folder
