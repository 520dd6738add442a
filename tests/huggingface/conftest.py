"""Tiny decoders, compiled without Inductor unless a test is about it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

import lamp_compile
from tests.huggingface import reference


@pytest.fixture
def fresh_graphs() -> Iterator[None]:
    """No graph of another test, and counters from 0."""
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


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
