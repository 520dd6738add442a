"""Tiny decoders, compiled without Inductor unless a test is about it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import lamp_compile
from tests.huggingface import reference


@pytest.fixture
def model() -> Any:
    """A Llama with grouped queries, D 16."""
    return reference.build("Llama")


@pytest.fixture
def fast(model: Any) -> Any:
    """The same, compiled in eager mode with the default plan."""
    return lamp_compile.compile(model, mode="eager")


@pytest.fixture
def ids() -> torch.Tensor:
    """Token ids ``[2, 40]``."""
    return torch.randint(3, 128, (2, 40), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def greedy() -> dict[str, Any]:
    """Arguments of a greedy generation of twelve tokens."""
    return dict(reference.GREEDY)
