"""A file as torch's exporter writes it today; ``benchmarks/onnx_rewrite.py`` has all families, opsets and exporters."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from tests import tolerances


def test_llama_with_sdpa(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Grouped heads, rotary embeddings, a mask that is computed, keys transposed with a rank that may vary."""
    monkeypatch.syspath_prepend(str(root / "benchmarks"))
    benchmark = importlib.import_module("onnx_rewrite")
    row = benchmark.measure("llama", benchmark.by_torch("llama", "sdpa", 20))
    assert (row["sites"], row["rewritten"], row["pattern"], row["stays"]) == (2, 2, "softmax", [])
    assert 0 < row["error_both_planes"] < tolerances.REWRITTEN.relative
    assert row["error_high_plane"] > tolerances.HIGH_OVER_BOTH * row["error_both_planes"]
