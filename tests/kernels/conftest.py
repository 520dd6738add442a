"""Where kernels run in these tests: Triton's on a device, or in its interpreter where there is none; the compiled
core with every instruction set that this machine has."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import version
from importlib.util import find_spec

import pytest
import torch

from lamp_compile.runtime.kernels import cpu
from lamp_compile.runtime.kernels.cpu import _library
from tests.kernels.calls import Native, Where

TRITON = "triton"
INSTRUCTION_SETS = cpu.instruction_sets() or ("portable",)
"""Of this machine; without a core the tests skip and say why."""


def _missing() -> str | None:
    """Why no kernel can run here, or None."""
    if find_spec("triton") is None:
        return "triton is not installed"
    numbers = [tuple(map(int, version(name).split(".")[:2])) for name in ("triton", "numpy")]
    if not torch.cuda.is_available() and numbers[0] < (3, 7) and numbers[1] >= (2, 4):
        return "the interpreter of triton before 3.7 does not work with numpy 2.4"
    return None


def _triton() -> torch.device:
    if reason := _missing():
        pytest.skip(reason)
    if torch.cuda.is_available():
        return torch.device("cuda")
    import triton
    import triton.language as tl

    # tests/conftest.py has asked for it; a triton that was imported earlier would not know.
    assert triton.knobs.runtime.interpret, "TRITON_INTERPRET is not set"
    assert type(tl.sum).__name__ == "InterpretedFunction", "triton was imported before TRITON_INTERPRET was set"
    return torch.device("cpu")


def _native(name: str) -> Iterator[Native]:
    if reason := cpu.why_not():
        pytest.skip(reason)
    before = cpu.instruction_set()
    assert _library.load().lamp_use(name.encode()) == 0
    yield Native(name)
    _library.load().lamp_use(before.encode())


@pytest.fixture(params=INSTRUCTION_SETS)
def native(request: pytest.FixtureRequest) -> Iterator[Native]:
    """The compiled core, with each instruction set."""
    yield from _native(request.param)


@pytest.fixture
def triton_device() -> torch.device:
    """Where Triton's kernels run: "cpu" is the interpreter."""
    return _triton()


@pytest.fixture(params=[TRITON, *INSTRUCTION_SETS])
def device(request: pytest.FixtureRequest) -> Iterator[Where]:
    """Every place where kernels run: a torch.device of Triton's, or the compiled core."""
    if request.param == TRITON:
        yield _triton()
    else:
        yield from _native(request.param)
