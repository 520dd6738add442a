"""What other repositories take from this one: the composite action's script and the pre-commit hook, as they lie."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from lamp_compile import Plan, SitePlan, cli

yaml = pytest.importorskip("yaml", reason="needs PyYAML")
PLAN = Plan((SitePlan("layers.0.attn"), SitePlan("layers.1.attn")))
DEFAULTS = {
    "ALLOW": "",
    "ALLOW_FILE": "",
    "FORMAT": "sarif",
    "OUTPUT": "out.sarif",
    "WEIGHTS": "false",
    "NUMERICS": "false",
}


@pytest.fixture
def action(root: Path) -> dict:
    return yaml.safe_load((root / ".github" / "actions" / "diff" / "action.yml").read_text())


@pytest.fixture
def job(action: dict, tmp_path: Path):
    """Run the action's second step as a runner would."""
    PLAN.save(tmp_path / "a.json")
    replace(PLAN, sites=(replace(PLAN.sites[0], tau=0.5), PLAN.sites[1])).save(tmp_path / "b $(touch gone).json")
    binary = tmp_path / "bin" / "lamp-compile"
    binary.parent.mkdir()
    binary.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m lamp_compile.cli "$@"\n')
    binary.chmod(0o755)
    script = action["runs"]["steps"][1]["run"]

    def run(**inputs: str) -> tuple[int, str, str, str]:
        for name in ("summary.md", "outputs.txt"):
            (tmp_path / name).write_text("")
        given = {"A": "a.json", "B": "b $(touch gone).json", "FAIL": "true", **DEFAULTS, **inputs}
        environment = {
            **os.environ, **given, "PATH": f"{binary.parent}{os.pathsep}{os.environ['PATH']}", "RUNNER_TEMP":
            str(tmp_path),
            "GITHUB_STEP_SUMMARY": str(tmp_path / "summary.md"), "GITHUB_OUTPUT": str(tmp_path / "outputs.txt"),
        }  # fmt: skip
        command = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", script]
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=False
        )
        summary, outputs = (tmp_path / "summary.md").read_text(), (tmp_path / "outputs.txt").read_text()
        return done.returncode, summary, outputs, done.stdout + done.stderr

    return run


def test_the_action_fails_on_a_difference(job, tmp_path: Path) -> None:
    code, summary, outputs, printed = job()
    assert code == 3
    assert outputs == "same=false\n"
    assert "layer 0 (layers.0.attn): tau 0.01 -\\> 0.5 (refines less)" in summary
    assert "layer 0 (layers.0.attn): tau 0.01 -> 0.5 (refines less)" in printed
    assert '"version": "2.1.0"' in (tmp_path / "out.sarif").read_text()
    assert not (tmp_path / "gone").exists(), "inputs are no shell"


def test_the_action_obeys_its_inputs(job) -> None:
    assert job(FAIL="false")[0] == 0
    code, summary, outputs, _ = job(ALLOW="precision@layers.0*#tau\n\n")
    assert (code, outputs) == (0, "same=true\n")
    assert "1 allowed difference" in summary
    code, summary, outputs, printed = job(ALLOW="precision#tile")
    assert (code, summary, outputs) == (1, "", "")
    assert "nothing matched the rule" in printed
    assert job(B="missing.json", FAIL="false")[0] == 1


def test_the_action_hands_inputs_over_as_variables(action: dict) -> None:
    """Inputs in the text of a script would be run by it."""
    for step in action["runs"]["steps"]:
        assert "${{" not in step["run"]
        for name in step["env"].values():
            assert name.removeprefix("${{ inputs.").removesuffix(" }}") in action["inputs"]


def test_the_hook_is_a_command_that_exists(root: Path) -> None:
    (hook,) = yaml.safe_load((root / ".pre-commit-hooks.yaml").read_text())
    words = shlex.split(hook["entry"])
    assert words[0] == "lamp-compile"
    assert cli.parser().parse_args([*words[1:], "a.onnx", "b.onnx"]).check
