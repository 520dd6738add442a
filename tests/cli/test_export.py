"""lamp-compile export: the file, what is printed, exit codes."""

from __future__ import annotations

import json

import pytest

from lamp_compile import cli, onnx_export
from lamp_compile.errors import LimitError

pytest.importorskip("onnxruntime", reason="needs ONNX Runtime (extra: onnx-cpu)")
pytest.importorskip("onnxscript", reason="exporting needs onnxscript (extra: onnx-cpu)")
SHORT = ["--context", "64", "--max-tokens", "64"]


def test_export_writes_a_verified_file(nano, root, tmp_path, capsys, one_thread) -> None:
    text, file = root / "examples/data/walden.txt", tmp_path / "model.onnx"
    arguments = ["export", nano, "--text", text, "-o", file, *SHORT, "--guard", "select", "--set", "tau=0.02", "--json"]
    assert cli.main([str(item) for item in arguments]) == 0
    done = capsys.readouterr()
    said = json.loads(done.out)
    assert said["verification"]["passed"]
    assert said["guard"] == "select"
    assert {row["tau"] for row in said["plan"]["sites"]} == {0.02}
    assert said["verification"]["against_float"]["positions"] == 64
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.md", "model.onnx"]
    assert "64 given tokens" in (tmp_path / "model.md").read_text()


def test_a_limit_is_exit_code_3_and_linears_are_refused(nano, root, tmp_path, capsys, monkeypatch) -> None:
    def over(*args, **kwargs):
        raise LimitError("too far", where="here", fix="there")

    monkeypatch.setattr(onnx_export, "export_onnx", over)
    text = root / "examples/data/walden.txt"
    arguments = ["export", str(nano), "--text", str(text), "-o", str(tmp_path / "m.onnx"), *SHORT]
    assert cli.main(arguments) == 3
    assert "over the limit: too far" in capsys.readouterr().out
    assert cli.main([*arguments, "--linears", "int8"]) == 1
    assert "exported in float" in capsys.readouterr().err
