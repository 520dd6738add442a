"""ONNX files as they lie on a disk: external data, broken bytes, and a large one in bounded time."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest

onnx = pytest.importorskip("onnx", reason="ONNX files need the onnx package")

from onnx import numpy_helper  # noqa: E402

import lamp_compile  # noqa: E402
from lamp_compile.errors import LampError  # noqa: E402
from tests.diff import onnx_models as models  # noqa: E402

SECONDS = 10.0
"""Of processor time, for two snapshots and a comparison of 10,000 operations; about 3 on the machine it was written
on."""


def with_external(folder: Path, location: str = "model.data", value: float = 0.0) -> Path:
    """A model whose first weight lies in another file, and so does an unnamed constant."""
    model = models.decoder()
    tensor = model.graph.initializer[0]
    data = numpy_helper.to_array(tensor) + np.float32(value)
    (folder / "model.data").write_bytes(data.tobytes())
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, text in (("location", location), ("offset", "0"), ("length", str(data.nbytes))):
        entry = tensor.external_data.add()
        entry.key, entry.value = key, text
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def test_external_data(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    for folder in (a, b):
        folder.mkdir()
    first, second = with_external(a), with_external(b, value=1.0)
    assert lamp_compile.compare(first, second).same
    found = lamp_compile.compare(first, second, weights=True)
    assert [c.subject for c in found.changes] == ["parameter layers.0.attn.q.weight"]
    assert (
        lamp_compile.snapshot(models.decoder(), weights=True).params
        == lamp_compile.snapshot(first, weights=True).params
    )


@pytest.mark.parametrize("location", ["../outside.data", "/etc/passwd", "missing.data", "link.data"])
def test_external_data_stays_in_the_folder(location: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "outside.data").write_bytes(bytes(4096))
    (folder / "link.data").symlink_to(tmp_path / "outside.data")
    path = with_external(folder, location)
    with pytest.raises(LampError):
        lamp_compile.snapshot(path, weights=True)


def test_broken_files(tmp_path: Path) -> None:
    data = models.decoder().SerializeToString()
    path = tmp_path / "broken.onnx"
    for cut in (1, 7, len(data) // 3, len(data) - 1):
        path.write_bytes(data[:cut])
        with pytest.raises(LampError) as caught:
            lamp_compile.snapshot(path)
        assert caught.value.fix
    path.write_bytes(onnx.ModelProto(ir_version=10).SerializeToString())
    with pytest.raises(LampError):
        lamp_compile.snapshot(path)


def test_bytes_changed_anywhere(tmp_path: Path) -> None:
    """Whatever a byte becomes: a snapshot or an error in words."""
    rng = np.random.default_rng(0)
    data = bytearray(models.decoder().SerializeToString())
    path = tmp_path / "mutant.onnx"
    outcomes = {True: 0, False: 0}
    for _ in range(60):
        mutant = bytearray(data)
        for _ in range(3):
            mutant[rng.integers(len(mutant))] = rng.integers(256)
        path.write_bytes(mutant)
        try:
            found = lamp_compile.snapshot(path)
        except LampError:
            outcomes[False] += 1
        else:
            assert lamp_compile.diff.snapshot.Snapshot.parse(found.text()) == found
            outcomes[True] += 1
    assert min(outcomes.values()) > 3, outcomes


def test_ten_thousand_operations_in_bounded_time(tmp_path: Path) -> None:
    big = models.decoder(32, 8, more=303)
    assert len(big.graph.node) > 10_000
    a, b = tmp_path / "a.onnx", tmp_path / "b.onnx"
    a.write_bytes(big.SerializeToString())
    models.insert_early(big)
    for layer in range(32):
        big.graph.node[[n.output[0] for n in big.graph.node].index(f"h{layer}_s100")].op_type = "Max"
    b.write_bytes(big.SerializeToString())
    start = time.process_time()
    found = lamp_compile.compare(a, b)
    assert time.process_time() - start < SECONDS
    assert [c.text for c in found.changes].count("Mul became Max") == 32
    assert len(found.changes) == 32 + 3


def test_a_very_wide_and_a_very_deep_graph() -> None:
    """No recursion over nodes, no table over pairs of them."""
    node = models.node
    deep = [node("Relu", [f"v{i}"], [f"v{i + 1}"]) for i in range(2000)]
    wide = [node("Relu", ["v0"], [f"w{i}"]) for i in range(2000)] + [
        node("Sum", [f"w{i}" for i in range(2000)], ["v2000"])
    ]

    def model(nodes):
        value = onnx.helper.make_tensor_value_info
        graph = onnx.helper.make_graph(nodes, "g", [value("v0", 1, [4])], [value("v2000", 1, [4])])
        return onnx.helper.make_model(graph, opset_imports=models.OPSETS[:1], ir_version=10)

    start = time.process_time()
    assert lamp_compile.compare(model(deep), model(deep)).same
    assert lamp_compile.compare(model(wide), model(wide)).same
    assert not lamp_compile.compare(model(deep), model(wide)).same
    assert len(lamp_compile.compare(model([*deep[:-1], node("Tanh", ["v1999"], ["v2000"])]), model(deep)).changes) == 1
    assert time.process_time() - start < SECONDS
