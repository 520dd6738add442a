"""Files of look-ahead networks: both ways, and every kind of damage refused before anything is built."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from lamp_compile.errors import PlanError
from lamp_compile.network_plan import NetworkPlan
from lamp_compile.plan import Plan, SitePlan
from lamp_compile.runtime.network import files, gate

NAMES = ("layers.0", "layers.1")


def network(**changes: Any) -> files.Network:
    layers = tuple(files.Layer(name, 4, 2, 16, True, "hadamard", {"recall": 0.9}) for name in NAMES)
    about = files.About(layers, "Llama", "abc", rank=8, group=8, subtile=32, ahead=2, trained=1024, text="a.txt",
                        text_sha256="0" * 64, seed=0)  # fmt: skip
    shapes = gate.shapes(4, 2, 16, 8, 2)
    gates = {name: gate.Gate(**{part: torch.rand(shape) + 0.1 for part, shape in shapes.items()}) for name in NAMES}
    return files.Network(dataclasses.replace(about, **changes), gates)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "lookahead.safetensors"
    network().save(path)
    return path


def rewritten(path: Path, change: Any) -> Path:
    """The file again, after ``change(header, tensors)``."""
    with safe_open(str(path), framework="pt") as opened:
        header = json.loads(opened.metadata()[files.HEADER])
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    change(header, tensors)
    save_file(tensors, str(path), metadata={files.HEADER: json.dumps(header)})
    return path


def test_both_ways(saved: Path) -> None:
    read = files.load(saved)
    made = network()
    assert read.about == made.about
    assert set(read.gates) == set(NAMES)
    assert read.gates["layers.1"].query.shape == (4, 16, 8)
    assert files.load(saved, read.sha256).sha256 == read.sha256


@pytest.mark.parametrize("kept", [0, 7, 100, -1, -200])
def test_truncated(saved: Path, kept: int) -> None:
    saved.write_bytes(saved.read_bytes()[:kept])
    with pytest.raises(PlanError, match="truncated or no safetensors"):
        files.load(saved)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda h, t: t["layers.0.query"].view(-1)[:1].fill_(torch.nan), "layers.0.query holds numbers that are none"),
        (lambda h, t: t["layers.1.age"].fill_(torch.inf), "layers.1.age holds numbers that are none"),
        (lambda h, t: t.pop("layers.0.key"), "lacks layers.0.key"),
        (lambda h, t: t.update({"layers.0.key": torch.zeros(2, 16, 4)}), r"layers.0.key is torch.float32 \(2, 16, 4\)"),
        (lambda h, t: t.update({"layers.0.age": torch.zeros(3, 4, 16, dtype=torch.int8)}), "is torch.int8"),
        (lambda h, t: t.update({"layers.7.key": torch.zeros(1)}), "belongs to no layer"),
        (lambda h, t: t["layers.0.limit"].zero_(), "limit or margin of layers.0"),
        (lambda h, t: h.update(version=2), "version 2, this release reads 1"),
        (lambda h, t: h.pop("version"), "header is damaged"),
        (lambda h, t: h.update(rank=-8), "impossible sizes"),
        (lambda h, t: h.update(rank=10**30), "impossible sizes"),
        (lambda h, t: h.update(group=5), "group 5"),
        (lambda h, t: h.update(ahead="three"), "ahead 'three'"),
        (lambda h, t: h.update(layers=3), "header is damaged"),
        (lambda h, t: h["layers"][0].update(kv_heads=3), "impossible layer"),
        (lambda h, t: h["layers"][0].pop("heads"), "header is damaged"),
    ],
)  # fmt: skip
def test_damage_is_named(saved: Path, change: Any, says: str) -> None:
    with pytest.raises(PlanError, match=says) as caught:
        files.load(rewritten(saved, change))
    assert caught.value.fix


def test_files_that_are_something_else(tmp_path: Path, saved: Path) -> None:
    with pytest.raises(PlanError, match="cannot read"):
        files.load(tmp_path / "none.safetensors")
    with pytest.raises(PlanError, match="cannot read"):
        files.load(tmp_path)
    other = tmp_path / "weights.safetensors"
    save_file({"weight": torch.zeros(3)}, str(other))
    with pytest.raises(PlanError, match="no look-ahead network"):
        files.load(other)
    with pytest.raises(PlanError, match="not the one the plan was made with"):
        files.load(saved, "f" * 64)
    flipped = bytearray(saved.read_bytes())
    flipped[-40] ^= 1
    wanted = files.load(saved).sha256
    saved.write_bytes(flipped)
    with pytest.raises(PlanError, match="not the one the plan was made with"):
        files.load(saved, wanted)


def test_a_plan_names_its_network() -> None:
    row = SitePlan(name="a", lookahead="network", skip=0.01)
    plan = Plan(sites=(row,), network=NetworkPlan("lookahead.safetensors", "0" * 64))
    assert Plan.from_json(plan.to_json()) == plan
    data = json.loads(plan.to_json())
    for change, says in (
        ({"network": None}, "the plan names none"),
        ({"network": {"file": "x", "sha256": "xyz"}}, "sha256 is 'xyz'"),
        ({"network": {"file": "", "sha256": "0" * 64}}, "file is ''"),
        ({"network": {"file": "x", "hash": "0"}}, "unknown field 'hash'"),
        ({"network": 3}, "expected an object"),
        ({"sites": [{"name": "a", "lookahead": "neural"}]}, "lookahead is 'neural'"),
        ({"sites": [{"name": "a", "skip": 0.1}]}, "skip is 0.1 without a network"),
        ({"sites": [{"name": "a", "lookahead": "network", "skip": 2}]}, "skip is 2"),
        ({"sites": [{"name": "a", "lookahead": "network", "rule": "mass"}]}, "energy rule's importance"),
    ):
        with pytest.raises(PlanError, match=says):
            Plan.from_json(json.dumps({**data, **change}))
