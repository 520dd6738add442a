"""Both sides run on the same seeded inputs: ONNX Runtime for ONNX, operators one by one for archives, modules in
memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lamp_compile
from lamp_compile.diff import numbers
from lamp_compile.errors import InputError, OptionError
from tests.diff.test_torch_programs import broken, rewritten, written


@pytest.fixture(scope="module")
def archive(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("numbers") / "rewritten.pt2"
    torch.export.save(rewritten(), path)
    return path


def test_inputs_follow_seed_and_name() -> None:
    found = lamp_compile.snapshot(written())
    one, again, other = (numbers.random_inputs(found, seed, {}) for seed in (0, 0, 1))
    assert {name: value.shape for name, value in one.items()} == {"x": (4, 40, 8), "z": (2,)}  # d0 is 4 at least
    assert all(np.array_equal(one[name], again[name]) for name in one)
    assert not any(np.array_equal(one[name], other[name]) for name in one)
    assert numbers.random_inputs(found, 0, {"d0": 5, "d1": 3})["x"].shape == (5, 3, 8)
    with pytest.raises(OptionError, match="no size 'd7'"):
        numbers.random_inputs(found, 0, {"d7": 2})
    with pytest.raises(OptionError, match=r"d0 = 65 is not in 4\.\.64"):
        numbers.random_inputs(found, 0, {"d0": 65})


def test_a_file_runs_as_the_program_does(archive: Path) -> None:
    """Bit for bit; and running leaves the program's buffers as they were."""
    program = rewritten()
    before = {name: tensor.clone() for name, tensor in program.state_dict.items()}
    found = lamp_compile.compare(program, archive, numerics=True, tolerance=0.0)
    assert found.same
    assert found.notes[-1] == "numbers: output output.0: largest difference 0, 0 of the largest value"
    assert all(torch.equal(before[name], tensor) for name, tensor in program.state_dict.items())


def test_a_difference_is_measured(archive: Path) -> None:
    coarse = rewritten(tau=1e9)
    found = lamp_compile.compare(coarse, archive, numerics=True)
    (change,) = [c for c in found.changes if c.tier == "numerics"]
    assert change.subject == "output.0"
    worst = float(change.text.split("largest difference ")[1].split(",")[0])
    assert 1e-4 < worst < 1
    loose = lamp_compile.compare(coarse, archive, numerics=True, tolerance=1.0)
    assert not [c for c in loose.changes if c.tier == "numerics"]
    assert loose.notes[-1].startswith("numbers: output output.0: largest difference")


def test_nan_on_one_side_is_a_difference() -> None:
    class Root(nn.Module):
        def __init__(self, fix: bool) -> None:
            super().__init__()
            self.fix = fix

        def forward(self, x: Tensor) -> Tensor:
            return x.abs().sqrt() if self.fix else x.sqrt()

    a, b = (torch.export.export(Root(fix).eval(), (torch.ones(64),)) for fix in (True, False))
    found = lamp_compile.compare(a, b, numerics=True, tolerance=10.0)
    assert any("NaN or infinite on one side only" in c.text for c in found.changes)


def test_other_inputs_cannot_be_compared(archive: Path) -> None:
    with pytest.raises(InputError, match="inputs are x, z and x"):
        lamp_compile.compare(written(), archive, numerics=True)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        (
            b"torch.ops.aten.linear.default",
            b"torch.ops.aten.from_file.default",
            "aten.from_file is not run from a file",
        ),
        (
            b"torch.ops.aten.linear.default",
            b"torch.ops.profiler._record_function_enter.default",
            "is not run from a file",
        ),
        (b"torch.ops.aten.linear.default", b"os.system", "os.system is not run from a file"),
        (b"torch.ops.aten.linear.default", b"_operator.attrgetter", "is not run from a file"),
        (b"torch.ops.aten.linear.default", b"torch.ops.aten.matmul.default", "does not run on these inputs"),
    ],
)
def test_a_file_runs_operators_and_nothing_else(
    old: bytes, new: bytes, says: str, archive: Path, tmp_path: Path
) -> None:
    path = broken(archive, tmp_path / "edited.pt2", lambda data: data.replace(old, new, 1))
    with pytest.raises(InputError, match=says):
        lamp_compile.compare(path, path, numerics=True)


def test_control_flow_in_a_file_is_refused_in_words(tmp_path: Path) -> None:
    path = tmp_path / "written.pt2"
    torch.export.save(written(), path)
    with pytest.raises(InputError, match=r"higher_order\.cond is not run from a file"):
        lamp_compile.compare(path, path, numerics=True)
    assert lamp_compile.compare(written(), written(), numerics=True).same


class TestOnnx:
    """On ONNX Runtime."""

    @pytest.fixture(autouse=True)
    def _needs(self) -> None:
        pytest.importorskip("onnx", reason="needs the onnx package")
        pytest.importorskip("onnxruntime", reason="needs ONNX Runtime (extra: onnx-cpu)")

    def test_models(self) -> None:
        from tests.diff import onnx_models as models

        sizes = {"d0": 1, "d1": 6}
        same = lamp_compile.compare(models.decoder(), models.edited(models.rename_all), numerics=True, sizes=sizes)
        assert same.same
        assert same.notes[-1] == "numbers: output y: largest difference 0, 0 of the largest value"
        found = lamp_compile.compare(models.decoder(), models.edited(models.change_weight), numerics=True, sizes=sizes)
        assert [(c.tier, c.subject) for c in found.changes] == [("numerics", "y")]

    def test_a_model_that_does_not_run(self) -> None:
        from tests.diff import onnx_models as models

        def edit(model) -> None:
            model.graph.node[-1].op_type, model.graph.node[-1].domain = "NoSuchOperator", "somebody"
            model.opset_import.append(models.onnx.helper.make_opsetid("somebody", 1))

        with pytest.raises(InputError, match="ONNX Runtime cannot run it"):
            lamp_compile.compare(models.edited(edit), models.edited(edit), numerics=True, sizes={"d0": 1, "d1": 6})
