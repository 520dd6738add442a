"""From estimated error to agreement: measured on a model, fitted so that it lies above every row."""

from __future__ import annotations

import importlib.util
import json
import math

import pytest
import torch

import lamp_compile
from lamp_compile.control_plan import ControlPlan
from lamp_compile.errors import InputError
from lamp_compile.quality import relation
from lamp_compile.quality.relation import RelationRow
from tests.huggingface import reference


def row(estimate: float, disagreement: float) -> RelationRow:
    return RelationRow(0.1, estimate, 1 - disagreement, 1 - disagreement - 0.001, 0.0, 1000)


def test_fit_lies_above_every_row() -> None:
    rows = [row(0.04, 0.005), row(0.0401, 0.006), row(0.06, 0.02), row(0.1, 0.03), row(0.3, 0.09)]
    fitted = relation.fit(rows)
    for each in rows:
        assert relation.predict(fitted, each.estimate) >= 1 - each.agreement_low - 1e-12
    assert fitted[0] == pytest.approx(0.007)
    assert fitted[1] == 0.04
    limit = ControlPlan(quality=0.98, relation=fitted).error_limit
    assert relation.predict(fitted, limit) == pytest.approx(0.02)


def test_one_estimate_is_no_slope() -> None:
    for rows in ([], [row(0.04, 0.01)], [row(0.04, 0.01), row(0.041, 0.02)]):
        with pytest.raises(InputError, match="slope"):
            relation.fit(rows)


@pytest.mark.usefixtures("one_thread")
def test_measured_on_a_model() -> None:
    model = reference.build("Llama")
    fast = lamp_compile.compile(model, mode="eager", guard_window=1, guard_budget=math.inf)
    windows = torch.randint(3, 128, (2, 64), generator=torch.Generator().manual_seed(1))
    rows = list(relation.measure(model, fast, windows, taus=(0.0, 0.1, 1e3)))
    assert [each.positions for each in rows] == [128] * 3
    assert rows[0].estimate < rows[1].estimate < rows[2].estimate
    assert rows[0].kl < rows[2].kl
    assert fast.lamp.controls["model.layers.0.self_attn"].tau.tolist() == pytest.approx([0.01, 0.01])
    with pytest.raises(InputError, match="averages or acts"):
        next(relation.measure(model, lamp_compile.compile(model, mode="eager"), windows))


@pytest.mark.parametrize(
    ("name", "options", "rows"),
    [
        ("control_relation", ["--windows", "1", "--context", "64"], 7),
        ("controller", ["--context", "40", "--mode", "eager", "--pairs", "2", "--seconds", "0.05"], 3),
    ],
)
def test_benchmarks_run(name, options, rows, root, nano, tmp_path, one_thread, monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(root / "benchmarks"))
    spec = importlib.util.spec_from_file_location(f"lamp_benchmark_{name}", root / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    out = tmp_path / "out.json"
    assert module.main([str(nano), str(root / "examples/data/walden.txt"), *options, "--out", str(out)]) == 0
    data = json.loads(out.read_text())
    assert data["device"]
    assert len(data["rows"]) == rows
    assert all(math.isfinite(value) for each in data["rows"] for value in each.values() if isinstance(value, float))
