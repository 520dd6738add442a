"""Where kernels run in these tests: on the device where there is one, in Triton's interpreter where there is none."""

from __future__ import annotations

from importlib.metadata import version
from importlib.util import find_spec

import pytest
import torch


def _missing() -> str | None:
    """Why no kernel can run here, or None."""
    if find_spec("triton") is None:
        return "triton is not installed"
    numbers = [tuple(map(int, version(name).split(".")[:2])) for name in ("triton", "numpy")]
    if not torch.cuda.is_available() and numbers[0] < (3, 7) and numbers[1] >= (2, 4):
        return "the interpreter of triton before 3.7 does not work with numpy 2.4"
    return None


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The kernels' device: "cpu" is the interpreter."""
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
