"""The commands as a CI job calls them: exit codes, files, and what is said about wrong inputs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from lamp_compile import Plan, SitePlan, cli

PLAN = Plan(tuple(SitePlan(f"layers.{index}.attn") for index in range(3)))


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    PLAN.save(tmp_path / "a.json")
    replace(PLAN, sites=(replace(PLAN.sites[0], tau=0.02), *PLAN.sites[1:])).save(tmp_path / "b.json")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def call(capsys):
    def run(*arguments) -> tuple[int, str, str]:
        try:
            code = cli.main([str(a) for a in arguments])
        except SystemExit as stopped:
            code = int(stopped.code or 0)
        done = capsys.readouterr()
        return code, done.out, done.err

    return run


def test_exit_codes(call, files: Path) -> None:
    code, out, err = call("diff", "a.json", "a.json")
    assert (code, err) == (0, "")
    assert out == "- a.json\n+ a.json\nthe same (0 operations)\n"
    code, out, err = call("diff", "a.json", "b.json")
    assert (code, err) == (3, "")
    assert "  layer 0 (layers.0.attn): tau 0.01 -> 0.02 (refines less)\n" in out
    assert call("diff", "a.json", "b.json", "--allow", "precision#tau")[0] == 0
    code, _, err = call("diff", "a.json", "b.json", "--allow", "precision#tile")
    assert code == 1
    assert "nothing matched the rule 'precision#tile'" in err
    code, _, err = call("diff", "a.json", "b.json", "--allow", "precise")
    assert code == 2
    assert "no tier 'precise'" in err
    assert call("diff", "a.json")[0] == 2
    assert call("diff", "a.json", "b.json", "--format", "pdf")[0] == 2
    assert call("diff", "a.json", "b.json", "--limit", "-1")[0] == 2
    assert call("diff", "a.json", "b.json", "--numerics", "--size", "d0=0")[0] == 2


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["a.json", "missing.onnx"], "cannot read it: No such file"),
        (["a.json", "."], "cannot read it: Is a directory"),
        (["a.json", "empty.onnx"], "of no known kind: it is empty"),
        (["a.json", "words.txt"], "of no known kind: it begins with b'words"),
        (["a.json", "list.json"], "of no known kind"),
        (["a.json", "object.json"], "a JSON file that is no plan"),
        (["a.json", "graph.lamp.txt"], "nothing can be compared: one is plan, the other onnx"),
        (["graph.lamp.txt", "graph.lamp.txt", "--weights"], "this snapshot holds no values of parameters"),
        (["a.json", "old.lamp.txt"], "the first line is 'lamp-snapshot 99'"),
        (["a.json", "short.lamp.txt"], "broken snapshot"),
        (["a.json", "nested.lamp.txt"], "broken snapshot: more than 64 blocks in blocks"),
        (["a.json", "b.json", "--numerics"], "a plan or snapshot cannot be run"),
        (["a.json", "b.json", "--size", "d0=2"], "--size and --tolerance are for --numerics"),
        (["a.json", "b.json", "--json", "--format", "junit"], "--json next to --format junit"),
        (["a.json", "b.json", "--allow-file", "missing.txt"], "cannot read the rules"),
        (["a.json", "b.json", "-o", "no/such/folder.md"], "cannot write it: No such file"),
    ],
)
def test_wrong_inputs_get_three_lines(call, files: Path, arguments: list[str], says: str) -> None:
    for name, text in {
        "empty.onnx": "", "words.txt": "words", "list.json": "[1]", "object.json": "{}", "old.lamp.txt":
        "lamp-snapshot 99\n",
        "short.lamp.txt": "lamp-snapshot 1\nkind onnx\nblock graph() [\n  %a = Add(\n",
        "graph.lamp.txt": "lamp-snapshot 1\nkind onnx\nparam a.w float32[2]\n",
        "nested.lamp.txt": "lamp-snapshot 1\nkind onnx\n" + "block b() [\n%a = If()\n" * 90,
    }.items():  # fmt: skip
        (files / name).write_text(text)
    code, out, err = call("diff", *arguments)
    assert code == 1
    assert out == ""
    assert err.startswith("error: ")
    assert says in err
    assert "  where: " in err
    assert "  try:   " in err
    assert "Traceback" not in err


@pytest.mark.parametrize("name", ["text", "json", "markdown", "junit", "sarif"])
def test_reports_go_to_files(call, files: Path, name: str) -> None:
    code, out, _ = call("diff", "a.json", "b.json", "--format", name, "-o", f"report.{name}")
    assert code == 3
    assert out.endswith(f"\n1 difference\nwrote report.{name}\n")
    assert "tau 0.01 -> 0.02" in out, "a log has it as text"
    assert "layers.0.attn" in (files / f"report.{name}").read_text()


def test_json_is_one_object(call, files: Path) -> None:
    code, out, _ = call("diff", "a.json", "b.json", "--json")
    assert code == 3
    assert json.loads(out)["changes"][0]["subject"] == "tau"


def test_snapshots_are_written_and_checked(call, files: Path) -> None:
    code, text, _ = call("snapshot", "a.json")
    assert code == 0
    assert text.startswith("lamp-snapshot 1\n")
    code, _, err = call("snapshot", "--check", "a.json")
    assert code == 1
    assert "a.json has no snapshot" in err
    assert "lamp-compile snapshot --write a.json" in err
    code, out, _ = call("snapshot", "--write", "a.json", "b.json")
    assert code == 0
    assert out.splitlines() == ["wrote a.json.lamp.txt (0 operations)", "wrote b.json.lamp.txt (0 operations)"]
    assert (files / "a.json.lamp.txt").read_text() == text
    assert call("snapshot", "--check", "a.json", "b.json") == (0, "", "")
    (files / "b.json").write_text((files / "a.json").read_text())
    code, out, _ = call("snapshot", "--check", "a.json", "b.json")
    assert code == 3
    assert "tau 0.02 -> 0.01 (refines more)" in out
    assert "accept it with: lamp-compile snapshot --write b.json" in out
    code, out, _ = call("snapshot", "--check", "a.json", "b.json", "--json")
    assert [item["same"] for item in json.loads(out)["files"]] == [True, False]
    assert call("diff", "a.json.lamp.txt", "a.json")[0] == 0


def test_snapshot_options_exclude_each_other(call, files: Path) -> None:
    assert "exclude each other" in call("snapshot", "a.json", "--write", "--check")[2]
    assert "2 files to print" in call("snapshot", "a.json", "b.json")[2]
    assert call("snapshot")[0] == 2
    code, out, _ = call("snapshot", "a.json", "-o", "kept.lamp.txt", "--json")
    assert code == 0
    assert json.loads(out)["written"][0]["snapshot"] == "kept.lamp.txt"


def test_the_same_from_two_folders(call, files: Path) -> None:
    """Nothing of the path is in a snapshot."""
    (files / "deep").mkdir()
    (files / "deep" / "a.json").write_text((files / "a.json").read_text())
    assert call("snapshot", "a.json")[1] == call("snapshot", "deep/a.json")[1]
