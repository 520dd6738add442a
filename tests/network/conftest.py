"""The nano model, its network, and networks that lie."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lamp_compile
from lamp_compile.quality import load, windows
from lamp_compile.runtime.network import files, gate


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """Nano is too small for more."""


@pytest.fixture(scope="session")
def model(nano: Path) -> Any:
    return load.load_model(nano)


@pytest.fixture(scope="session")
def ids(nano: Path, root: Path) -> Tensor:
    """Tokens of a real text ``[1, N]``."""
    return windows.token_ids(root / "examples" / "data" / "walden.txt", load.encoder(nano))[None]


@pytest.fixture(scope="session")
def packaged(nano: Path) -> Path:
    """The network that nano ships with."""
    return nano / "lookahead.safetensors"


@pytest.fixture
def lying(packaged: Path, tmp_path: Path) -> Callable[..., Path]:
    """The file of a network at every site, with its level shifted and what it says of itself changed."""

    def make(shift: float = 0.0, name: str = "lying.safetensors", **changes: Any) -> Path:
        read = files.load(packaged)
        gates = {}
        for site, old in read.gates.items():
            extra = old.extra.clone()
            extra[..., gate.OFFSET] += shift
            gates[site] = dataclasses.replace(old, extra=extra)
        layers = tuple(dataclasses.replace(layer, serves=True) for layer in read.about.layers)
        files.Network(dataclasses.replace(read.about, layers=layers, **changes), gates).save(tmp_path / name)
        return tmp_path / name

    return make


Forced = Callable[..., tuple[Tensor, list[dict[str, Any]]]]


@pytest.fixture
def forced(ids: Tensor) -> Forced:
    """``forced(fast, prompt, steps)``: log-probabilities ``[steps, V]`` of a text fed token by token after a prompt,
    and the cache's report."""

    def run(fast: Any, prompt: int, steps: int) -> tuple[Tensor, list[dict[str, Any]]]:
        cache, rows = fast.lamp.cache(prompt + steps), []
        with torch.no_grad():
            fast(ids[:, :prompt], past_key_values=cache, use_cache=True)
            for i in range(prompt, prompt + steps):
                rows.append(fast(ids[:, i : i + 1], past_key_values=cache, use_cache=True).logits[0, -1])
        return torch.stack(rows).log_softmax(-1), cache.guard_report()

    return run


def compiled(model: Any, path: Path | None, **options: Any) -> Any:
    """The model compiled in eager mode with this network."""
    return lamp_compile.compile(model, mode="eager", lookahead=path, **options)


def divergence(wanted: Tensor, got: Tensor) -> Tensor:
    """KL(wanted || got) per row."""
    return (wanted.exp() * (wanted - got)).sum(-1)
