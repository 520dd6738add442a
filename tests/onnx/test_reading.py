"""Files that are damaged, or made to hurt: each is refused with what, where and what to do, before anything is
allocated for it."""

from __future__ import annotations

import os
import re
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from lamp_compile.errors import InputError, LampError
from lamp_compile.frontends.onnx.files import reading
from lamp_compile.frontends.onnx.files.reading import Limits
from tests.onnx import fuzz, hostile
from tests.onnx.cases import attention_cases


def decoder() -> onnx.ModelProto:
    return onnx.load_model_from_string(hostile.decoder())


def refused(model: onnx.ModelProto | bytes, text: str, **options: object) -> InputError:
    data = model if isinstance(model, bytes) else model.SerializeToString()
    with pytest.raises(InputError, match=text) as caught:
        reading.parse(data, "file.onnx", **options)  # type: ignore[arg-type]
    assert caught.value.where.startswith("file.onnx")
    assert caught.value.fix
    return caught.value


def test_valid_models_are_read_unchanged() -> None:
    for data in hostile.seeds():
        assert reading.parse(data) == onnx.load_model_from_string(data)
    for name, case in attention_cases().items():
        assert reading.parse(case.model.SerializeToString(), name) == case.model


# Each takes the valid model and plants one fault.


def swap_nodes(m: onnx.ModelProto) -> None:
    first, second = onnx.NodeProto(), onnx.NodeProto()
    first.CopyFrom(m.graph.node[2])
    second.CopyFrom(m.graph.node[5])
    m.graph.node[2].CopyFrom(second)
    m.graph.node[5].CopyFrom(first)


def close_circle(m: onnx.ModelProto) -> None:
    next(n for n in m.graph.node if n.op_type == "MatMul").input[0] = "o"


def close_circle_through_branch(m: onnx.ModelProto) -> None:
    next(n for n in m.graph.node if n.op_type == "MatMul").input[0] = "out"


def recurse(m: onnx.ModelProto) -> None:
    m.functions[0].node.append(helper.make_node("Twice", ["x"], ["z"], domain="own"))


def scale_of_two(m: onnx.ModelProto) -> None:
    m.graph.initializer[0].dims.append(2)


def huge(m: onnx.ModelProto) -> None:
    m.graph.initializer[0].dims.extend([2**40, 2**40])


def overflowing(m: onnx.ModelProto) -> None:
    m.graph.initializer[0].dims.extend([2**40, 2**40, 0])


def negative(m: onnx.ModelProto) -> None:
    m.graph.initializer[0].dims.append(-1)


def input_of_other_shape(m: onnx.ModelProto) -> None:
    m.graph.initializer.append(numpy_helper.from_array(np.zeros((1, 4, 1, 8), np.float32), "q"))


def graph_in_number(m: onnx.ModelProto) -> None:
    m.graph.node[0].attribute[0].g.SetInParent()


def strange_parameter(m: onnx.ModelProto) -> None:
    m.functions[0].node[0].attribute[0].ref_attr_name = "nothing"


FAULTS: dict[Callable[[onnx.ModelProto], object], str] = {
    swap_nodes: "'\\w+' is used before it is defined",
    close_circle: "cycle through 'o'",
    close_circle_through_branch: "cycle through 'out'",
    recurse: "in a circle: own.Twice -> own.Double -> own.Twice|in a circle: own.Double -> own.Twice -> own.Double",
    scale_of_two: r"shape \[2\] needs 8 bytes, the tensor has 4",
    huge: "declares more than",
    overflowing: "declares more than",
    negative: "a dimension of -1",
    input_of_other_shape: r"shape \[1, 4, 1, 8\] under an input of shape \[None, 4, None, 16\]",
    graph_in_number: "its type says ints, it holds g",
    strange_parameter: "of a function that has none such",
    lambda m: m.graph.initializer[0].ClearField("data_type"): "data type 0",
    lambda m: m.graph.initializer[0].float_data.append(1.0): "both float_data and raw_data",
    lambda m: setattr(m.graph.node[0].attribute[0], "name", "values"): "has no attribute 'values'",
    lambda m: m.graph.initializer.append(m.graph.initializer[0]): "the name of another",
    lambda m: m.graph.input.append(m.graph.input[0]): "'q' is defined twice",
    lambda m: m.graph.node.append(m.graph.node[3]): "'vx' is defined twice",
    lambda m: m.graph.output.append(m.graph.output[0]): "listed twice",
    lambda m: m.graph.output.add(name="nowhere"): "'nowhere' is never computed",
    lambda m: m.functions.append(m.functions[0]): "two functions 'own.Double'",
    lambda m: m.opset_import.add(domain="evil.corp", version=1): "domain 'evil.corp' is unknown",
    lambda m: setattr(m.opset_import[0], "version", 99): "opset 99",
    lambda m: setattr(m.opset_import[0], "version", -1): "opset -1",
    lambda m: m.opset_import.add(domain="ai.onnx", version=19): "in two versions",
    lambda m: setattr(m, "ir_version", 99): "IR version 99",
    lambda m: setattr(m.graph.node[0], "domain", "com.other"): "domain 'com.other' is not imported",
    lambda m: setattr(m.graph.node[0], "op_type", "Exec"): "'Exec' does not exist in opset 20",
    lambda m: m.graph.node[2].input.append("k"): "3 inputs, Unsqueeze takes 2 to 2",
    lambda m: m.graph.node[0].attribute.append(m.graph.node[0].attribute[0]): "the name of another",
    lambda m: m.graph.ClearField("node"): "'out' is never computed",
    lambda m: m.ClearField("graph"): "no graph in it",
    lambda m: m.training_info.add(): "training",
    lambda m: setattr(m.graph.input[0].type.tensor_type, "elem_type", 77): "element type 77",
}


@pytest.mark.parametrize("plant", FAULTS, ids=[re.sub(r"\W+", " ", text)[:40] for text in FAULTS.values()])
def test_a_planted_fault_is_named(plant: Callable[[onnx.ModelProto], object]) -> None:
    model = decoder()
    plant(model)
    refused(model, FAULTS[plant])


def test_every_truncation_is_refused() -> None:
    data = hostile.decoder()
    whole = onnx.load_model_from_string(data)
    for length in range(len(data)):
        try:
            model = reading.parse(data[:length])
        except InputError:
            continue
        # A cut between two fields of the model itself leaves a smaller model, which may be one.
        assert model.graph == whole.graph


def test_other_formats_are_told_apart(tmp_path: Path) -> None:
    for content, text in (
        (b"", "empty"), (b"{}", "."), (b"\x80\x04K\x01.", "."), (b"\x1f\x8b\x08" + bytes(50), "."), (bytes(50), "."),
    ):  # fmt: skip
        refused(content, text)
    (tmp_path / "folder.onnx").mkdir()
    os.mkfifo(tmp_path / "pipe.onnx")
    for path, text in (
        ("folder.onnx", "no regular file|cannot be read"),
        ("pipe.onnx", "no regular file"),
        ("no", "No such file"),
    ):
        with pytest.raises(InputError, match=text):
            reading.load(tmp_path / path)
    with pytest.raises(InputError, match="no regular file"):
        reading.load("/dev/zero")
    (tmp_path / "model.onnx").write_bytes(hostile.decoder())
    assert reading.load(tmp_path / "model.onnx") == decoder()
    with pytest.raises(InputError, match="more than 100"):
        reading.load(tmp_path / "model.onnx", limits=Limits(file_bytes=100))


def nested(depth: int) -> onnx.ModelProto:
    """A graph in a branch of a graph, and so on."""
    graph = helper.make_graph([helper.make_node("Neg", ["x"], [f"y{depth}"])], "g", [], [_value(f"y{depth}")])
    for level in reversed(range(depth)):
        branches = {"then_branch": graph, "else_branch": helper.make_graph(
            [helper.make_node("Abs", ["x"], [f"z{level}"])], "h", [], [_value(f"z{level}")])}  # fmt: skip
        graph = helper.make_graph(
            [helper.make_node("If", ["c"], [f"y{level}"], **branches)], "g", [], [_value(f"y{level}")]
        )
    graph.input.extend([_value("x"), helper.make_tensor_value_info("c", TensorProto.BOOL, [])])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def _value(name: str) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, [1])


def test_nesting_is_bounded_before_it_is_parsed() -> None:
    reading.parse(nested(15).SerializeToString())
    refused(nested(25), "nested more than 64 deep")
    data = b""  # a type of sequences of sequences ..., 20,000 deep, written backwards
    for _ in range(20_000):
        if len(data) > 2_000_000:
            break
        data = b"\x0a" + _varint(len(data)) + data
        data = b"\x22" + _varint(len(data)) + data
    for number in (2, 11, 7):  # type of an input of a graph
        data = bytes([number << 3 | 2]) + _varint(len(data)) + data
    refused(data, "nested more than 64 deep")


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def test_a_file_of_empty_messages_is_not_unfolded() -> None:
    nodes = b"\x0a\x00" * 300_000
    data = b"\x3a" + _varint(len(nodes)) + nodes
    tracemalloc.start()
    begun = time.process_time()
    refused(data, "more than 100,000 protobuf messages", limits=Limits(messages=100_000))
    assert time.process_time() - begun < 5
    assert tracemalloc.get_traced_memory()[1] < 10 * len(data)
    tracemalloc.stop()


def test_functions_that_double_at_each_call_are_counted_not_inlined() -> None:
    model = decoder()
    for level in range(40):
        callee = "Double" if level == 0 else f"F{level - 1}"
        nodes = [helper.make_node(callee, [a], [b], domain="own") for a, b in (("x", "h"), ("h", "y"))]
        opsets = [helper.make_opsetid("", 20), helper.make_opsetid("own", 1)]
        model.functions.append(helper.make_function("own", f"F{level}", ["x"], ["y"], nodes, opsets))
    model.graph.node.append(helper.make_node("F39", ["o"], ["bomb"], domain="own"))
    refused(model, r"4.4e\+12 nodes once function calls are replaced")


def test_sparse_tensors_are_held_against_their_indices() -> None:
    model = decoder()
    values = numpy_helper.from_array(np.ones(2, np.float32), "sparse")
    indices = numpy_helper.from_array(np.array([0, 2**39], np.int64), "")
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [2**40]))
    reading.parse(model.SerializeToString())
    model.graph.sparse_initializer[0].dims.append(2**20)
    refused(model, "more than")
    model.graph.sparse_initializer[0].dims[:] = [8]
    model.graph.sparse_initializer[0].indices.dims[:] = [1]
    refused(model, "needs 8 bytes, the tensor has 16")


# External data


def with_data(folder: Path, **entries: str) -> Path:
    model = decoder()
    tensor = model.graph.initializer[2]
    data = tensor.raw_data
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in {"location": "weights.bin", **entries}.items():
        tensor.external_data.add(key=key, value=value)
    folder.mkdir(exist_ok=True)
    (folder / "weights.bin").write_bytes(bytes(16) + data)
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    return folder / "model.onnx"


def test_external_data_is_referred_to_and_read_on_request(tmp_path: Path) -> None:
    path = with_data(tmp_path / "m", offset="16", length="64")
    tensor = reading.load(path).graph.initializer[2]
    assert tensor.data_location == TensorProto.EXTERNAL
    assert reading.read_external(tensor, reading.Folder(path), "") == np.ones(16, np.float32).tobytes()
    assert reading.load(path, external_data=True).graph == decoder().graph
    (tmp_path / "m" / "link.bin").symlink_to("weights.bin")
    reading.load(with_data(tmp_path / "m", location="link.bin", offset="16"))


@pytest.mark.parametrize(
    ("entries", "text"),
    [
        ({"location": "../secret"}, "no plain relative path"),
        ({"location": "/etc/passwd"}, "no plain relative path"),
        ({"location": "C:\\secret"}, "no plain relative path"),
        ({"location": "a/../../secret"}, "no plain relative path"),
        ({"location": "..\\secret"}, "no plain relative path"),
        ({"location": "nul\0byte"}, "no plain relative path"),
        ({"location": ""}, "no plain relative path"),
        ({"location": "."}, "no regular file"),
        ({"location": "missing"}, "No such file"),
        ({"location": "leads_out"}, "leads out of the folder"),
        ({"location": "folder_out/secret"}, "leads out of the folder"),
        ({"location": "circle"}, "Too many levels|No such file"),
        ({"location": "model.onnx"}, "the model file itself"),
        ({"location": "same.onnx"}, "the model file itself"),
        ({"length": "63", "offset": "16"}, "needs 64 bytes, external data has 63"),
        ({"length": "99999999999999", "offset": "16"}, "needs 64 bytes"),
        ({"offset": "17"}, "ends at 80"),
        ({"offset": "99999999999999999"}, "ends at 80"),
        ({"offset": "-1"}, "offset '-1'"),
        ({"offset": "9" * 5000}, "offset '999"),
        ({"offset": "٣"}, "offset '"),
        ({"execute": "rm"}, "unknown key 'execute'"),
    ],
)  # fmt: skip
def test_external_data_stays_in_its_folder_and_size(tmp_path: Path, entries: dict[str, str], text: str) -> None:
    (tmp_path / "secret").write_bytes(bytes(1000))
    path = with_data(tmp_path / "m", **entries)
    links = {"leads_out": "../secret", "folder_out": "..", "circle": "circle", "same.onnx": "model.onnx"}
    for name, target in links.items():
        (path.parent / name).symlink_to(target)
    with pytest.raises(InputError, match=text) as caught:
        reading.load(path)
    assert "bias" in caught.value.where
    assert len(str(caught.value)) < 600


def test_bytes_alone_have_no_external_data(tmp_path: Path) -> None:
    refused(with_data(tmp_path / "m", offset="16").read_bytes(), "the model has no folder")


# Fuzzing; `make fuzz-onnx` does 100,000


def test_damaged_models_are_answered_or_refused() -> None:
    outcome = fuzz.run(seed=0, cases=2500)
    assert outcome.accepted > 100, "the faults are all too coarse: nothing gets past the first checks"
    assert outcome.refused > 1000


def test_the_fuzzer_notices_what_breaks_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lamp_compile.frontends.onnx.files.reading.scan", lambda *_: None)  # the walk over the bytes
    with pytest.raises(AssertionError, match=r"case \d+ of seed 0: "):
        fuzz.run(seed=0, cases=2500)


_messages = st.recursive(
    st.binary(max_size=12),
    lambda inner: st.lists(
        st.tuples(st.sampled_from([1, 2, 5, 7, 8, 9, 11, 12, 13, 20, 25]), st.one_of(st.integers(0, 2**64 - 1), inner)),
        max_size=4,
    ).map(lambda fields: b"".join(_encoded(*field) for field in fields)),
    max_leaves=12,
)


def _encoded(number: int, value: int | bytes) -> bytes:
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    return _varint(number << 3 | 2) + _varint(len(value)) + value


@settings(max_examples=400, deadline=None)
@given(_messages)
def test_any_message_is_answered_or_refused(data: bytes) -> None:
    try:
        reading.parse(data)
    except LampError as error:
        caught = error
    else:
        return
    assert caught.where and caught.fix  # noqa: PT018
