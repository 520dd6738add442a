"""``lamp-compile run artifact.onnx``."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from lamp_compile import cli
from lamp_compile.runtime.ort.session import OrtSession


@pytest.fixture
def prompt(tmp_path: Path) -> Path:
    file = tmp_path / "prompt.u16"
    np.array([4, 5, 6, 7], "<u2").tofile(file)
    return file


def test_run(artifact: Path, prompt: Path, session: OrtSession, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["run", str(artifact), "--prompt-file", str(prompt), "--max-new-tokens", "5"]
    assert cli.main([*options, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    (wanted,) = session.generate([4, 5, 6, 7], max_new_tokens=5)
    assert said["ids"] == wanted[4:].tolist()
    assert said["provider"] == "CPUExecutionProvider"
    assert len(said["guard"]) == 2
    assert cli.main(options) == 0
    assert "tokens/s, KV cache" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--set", "tau=0.1"], "--set with an artifact"),
        (["--provider", "tpu"], "unknown provider"),
        (["--tokenizer", "nowhere"], "is no folder"),
    ],
)
def test_what_does_not_go_together(
    artifact: Path, prompt: Path, options: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["run", str(artifact), "--prompt-file", str(prompt), *options]) == 1
    assert says in capsys.readouterr().err


def test_text_needs_a_tokenizer(artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "prompt.txt").write_text("words")
    assert cli.main(["run", str(artifact), "--prompt-file", str(tmp_path / "prompt.txt")]) == 1
    assert "no tokenizer" in capsys.readouterr().err


def test_options_of_artifacts(nano: Path, prompt: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["run", str(nano), "--prompt-file", str(prompt), "--provider", "cpu"]) == 1
    assert "belongs to an .onnx artifact" in capsys.readouterr().err
