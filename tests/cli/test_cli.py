"""The command line on the packaged model: what it prints, what it writes, and every exit code."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers

from lamp_compile import cli
from lamp_compile.plan import Plan
from lamp_compile.runtime import kernels
from lamp_compile.runtime.kernels import targets

SHORT = ["--context", "128", "--max-tokens", "128"]
ROWS = ["bf16", "fp8_kv", "all_high", "all_low", "lamp", "random_tiles", "static_tiles"]


@pytest.fixture
def text(root):
    return str(root / "examples/data/walden.txt")


@pytest.fixture
def call(capsys):
    """Run the command line; gives exit code, standard output, standard error."""

    def run(*arguments):
        code = cli.main([str(a) for a in arguments])
        done = capsys.readouterr()
        return code, done.out, done.err

    return run


def test_eval_prints_the_agreed_rows(call, nano, text):
    code, out, err = call("eval", nano, "--text", text, *SHORT, "--json")
    data = json.loads(out)
    assert code == 0
    assert err == "", "progress belongs on a terminal"
    plain, twins = [r for r in data["rows"] if "twin" not in r], [r for r in data["rows"] if "twin" in r]
    assert [row["name"] for row in plain] == ROWS
    assert {row["twin"] for row in twins} == {30.0}
    assert "lamp" in {row["name"] for row in twins}
    for row in data["rows"]:
        assert {"name", "kl", "agreement", "perplexity_ratio", "bits_per_value", "refined_share"} <= set(row)
        assert row["positions"] == 128
    by_name = {row["name"]: row for row in plain}
    assert by_name["all_high"]["kl"] < by_name["all_low"]["kl"] / 10
    assert data["context"] == 128


def test_eval_of_a_model_that_can_have_no_twin(call, text, nano, tmp_path):
    folder = tmp_path / "gpt2"
    config = transformers.GPT2Config(
        vocab_size=16384, n_embd=64, n_layer=1, n_head=4, n_positions=256, bos_token_id=0, eos_token_id=0
    )
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(nano) / name, folder)
    short = ("--context", "64", "--max-tokens", "64")
    code, out, _ = call("eval", folder, "--text", text, *short, "--json")
    assert code == 0
    data = json.loads(out)
    assert not [row for row in data["rows"] if "twin" in row]
    assert "q_proj" in data["notes"][0]
    code, _, err = call("eval", folder, "--text", text, *short, "--twin", "10")
    assert code == 1
    assert "q_proj" in err
    assert call("eval", folder, "--text", text, *short, "--no-twin", "--json")[0] == 0


def test_eval_compares_with_limits(call, nano, text):
    fine = call("eval", nano, "--text", text, *SHORT, "--max-kl", "0.01", "--min-agreement", "0.9")
    assert fine[0] == 0
    assert "over the limit" not in fine[1]
    assert all(name in fine[1] for name in ROWS)
    code, out, _ = call("eval", nano, "--text", text, *SHORT, "--max-kl", "1e-9", "--json")
    assert code == 3
    assert "--max-kl" in json.loads(out)["exceeded"][0]
    code, out, _ = call("eval", nano, "--text", text, *SHORT, "--min-agreement", "1", "--set", "tau=1e9")
    assert code == 3
    assert "--min-agreement" in out


def test_preset_and_settings_reach_the_plan(call, nano, text):
    shares = []
    for option in (["--preset", "aggressive"], ["--preset", "conservative"], ["--set", "tau=0"]):
        _, out, _ = call("eval", nano, "--text", text, *SHORT, "--json", *option)
        shares.append(next(r for r in json.loads(out)["rows"] if r["name"] == "lamp")["refined_share"])
    assert shares[0] < shares[1] < shares[2] == 1.0


def test_compile_writes_a_plan_that_the_other_commands_take(call, nano, text, tmp_path):
    path = tmp_path / "plan.json"
    code, out, _ = call("compile", nano, "-o", path, "--set", "tau=0.5", "--json")
    assert code == 0
    assert json.loads(out) == {"plan": str(path), "rewritten": [s.name for s in Plan.load(path).sites], "sites": 4}
    assert {site.tau for site in Plan.load(path).sites} == {0.5}
    _, out, _ = call("eval", nano, "--text", text, *SHORT, "--plan", path, "--json")
    assert {row["tau"] for row in json.loads(out)["rows"] if row["name"] == "lamp"} == {0.5}


@pytest.mark.parametrize(
    ("where", "nodes"),
    [
        ("cpu_kernels", ["fused_attention"]),
        ("reference_only", ["quantize", "look_ahead", "select", "attend", "guard"]),
    ],
)
def test_explain_shows_sites_and_one_before_and_after(where, nodes, call, nano, request):
    request.getfixturevalue(where)
    code, out, _ = call("explain", nano)
    assert code == 0
    assert "4 of 4 attention sites rewritten" in out
    before, after = out.split("one site before:")[1].split("one site after:")
    assert "lamp.look_ahead" not in before
    assert re.findall(r"lamp\.(\w+)\(", after) == nodes
    code, out, _ = call("explain", nano, "--json")
    assert len(json.loads(out)["rewritten"]) == 4


def test_run_prints_both_continuations(call, nano, tmp_path):
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("When I wrote the following pages, I lived alone in the woods, a mile from any neighbor,")
    options = ("run", nano, "--prompt-file", prompt, "--max-new-tokens", "12", "--mode", "eager")
    code, out, _ = call(*options, "--json")
    data = json.loads(out)
    plain, lamp = data["uncompiled"], data["lamp"]
    assert code == 0
    assert len(plain["ids"]) == len(lamp["ids"]) == 12
    same = next((i for i, (a, b) in enumerate(zip(plain["ids"], lamp["ids"], strict=True)) if a != b), None)
    assert data["first_difference"] == same
    # 8.25 bits a value in whole tiles of 128 tokens, 4 layers, 2 kv heads, K and V of 64
    assert lamp["kv_bytes"] == 128 * 4 * 2 * 2 * 64 * 8.25 / 8
    assert min(plain["tokens_per_s"], lamp["tokens_per_s"]) > 0
    code, out, _ = call(*options)
    assert "uncompiled: " in out
    assert "LAMP: " in out


def test_run_says_where_no_kernel_serves(call, nano, tmp_path):
    """Rather than being slow without a word."""
    prompt, plan = tmp_path / "prompt.txt", tmp_path / "plan.json"
    prompt.write_text("When I wrote")
    call("compile", nano, "-o", plan)
    made = Plan.load(plan)
    replace(made, sites=tuple(replace(site, query_bits=16) for site in made.sites)).save(plan)
    options = ("run", nano, "--prompt-file", prompt, "--max-new-tokens", "2", "--mode", "eager")
    for given, wanted in (((), 0), (("--plan", plan), 1)):
        code, out, _ = call(*options, *given)
        assert code == 0
        assert len(re.findall("^note: no kernel for .*the reference runs there, slowly", out, re.M)) == wanted
        assert len(json.loads(call(*options, *given, "--json")[1])["notes"]) == wanted


def test_bisect_names_a_planted_fault(call, nano, text, tmp_path):
    path = tmp_path / "plan.json"
    call("compile", nano, "-o", path)
    plan = Plan.load(path)
    hurt = plan.sites[2]
    bad = replace(plan, sites=tuple(replace(s, tau=1e9, rotation="none") if s == hurt else s for s in plan.sites))
    bad.save(path)
    options = ("bisect", nano, "--text", text, *SHORT, "--max-kl", "2e-3", "--plan", path)
    code, out, _ = call(*options)
    assert code == 3
    assert hurt.name in out
    code, out, _ = call(*options, "--json")
    assert json.loads(out)["culprit"] == hurt.name
    plan.save(path)
    code, out, _ = call(*options, "--json")
    assert code == 0
    assert json.loads(out)["culprit"] is None


def test_doctor_says_what_is_here(call):
    code, out, _ = call("doctor")
    assert code == 0
    assert "torch" in out
    code, out, _ = call("doctor", "--json")
    data = json.loads(out)
    assert "nested8" in next(f for f in data["features"] if f["name"] == "storage formats")["detail"]
    assert all(feature["detail"] for feature in data["features"])
    (providers,) = (f for f in data["features"] if f["name"] == "ONNX Runtime providers")
    if providers["available"]:
        assert "CPUExecutionProvider" in providers["detail"]
        assert "telemetry is switched off" in providers["detail"]
    assert any("native ai.lamp operators" in f["name"] for f in data["features"])


def gpu_kernels(call):
    (line,) = [line for line in call("doctor")[1].splitlines() if "GPU kernels" in line]
    return line


def test_doctor_says_what_the_kernels_lack(call, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(kernels, "_TRITON", True)
    assert gpu_kernels(call) == "no  GPU kernels: torch sees no device"
    monkeypatch.setattr(kernels, "_TRITON", False)
    line = gpu_kernels(call)
    assert line.startswith("no  GPU kernels: torch sees no device; triton is not installed: pip install")
    assert "lamp_compile[kernels]" in line


@pytest.mark.skipif(kernels.cpu.why_not() is not None, reason=f"{kernels.cpu.why_not()}")
def test_doctor_says_how_planes_lie_on_this_cpu(call, monkeypatch):
    for lanes, says in ((True, ", planes by lanes ("), (False, ", planes by rows; programs exported where")):
        monkeypatch.setattr(kernels.cpu, "by_lanes", lambda lanes=lanes: lanes)
        (line,) = [line for line in call("doctor")[1].splitlines() if "CPU kernels" in line]
        assert says in line


def test_doctor_names_the_target_of_each_device(call, monkeypatch):
    """And says which one is too old; all of them too old is a no."""
    names, capabilities = ["sm_90", "sm_70"], [(9, 0), (7, 0)]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(targets, "target_of", lambda device: SimpleNamespace(name=names[device.index]))
    monkeypatch.setattr(kernels, "_TRITON", True)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties",
        lambda device: SimpleNamespace(major=capabilities[device.index][0], minor=capabilities[device.index][1]),
    )  # fmt: skip
    line = gpu_kernels(call)
    assert line.startswith("yes GPU kernels: triton ")
    assert ", for sm_90, kernels need compute capability 8.0, this is 7.0; CUDA C++: " in line
    capabilities[0] = (7, 5)
    assert gpu_kernels(call).startswith("no  GPU kernels: triton ")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["explain", "{tmp}/nothing"], "is no folder"),
        (["explain", "{tmp}"], "no config.json"),
        (["eval", "{nano}", "--text", "{tmp}/missing.txt"], "cannot read the text"),
        (["eval", "{nano}", "--text", "{tmp}/empty.txt"], "is empty"),
        (["eval", "{nano}", "--text", "{tmp}/short.txt", "--context", "512"], "too few"),
        (["eval", "{nano}", "--text", "{text}", "--context", "4096"], "the model has 1024"),
        (["eval", "{nano}", "--text", "{text}", "--device", "cuda:99"], "device"),
        (["explain", "{nano}", "--set", "nonsense=1"], "unknown option 'nonsense'"),
        (["explain", "{nano}", "--set", "tau=-1"], "tau is -1"),
        (["explain", "{nano}", "--plan", "{tmp}/missing.json"], "cannot read the plan"),
        (["compile", "{nano}", "-o", "{tmp}/no/such/plan.json"], "cannot write the plan"),
        (["run", "{nano}", "--prompt-file", "{text}"], "the model was made for 1024"),
    ],
)
def test_errors_are_three_lines_and_exit_1(call, nano, text, tmp_path, arguments, says):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "short.txt").write_text("three short words")
    code, out, err = call(*(a.format(tmp=tmp_path, nano=nano, text=text) for a in arguments))
    assert code == 1
    assert out == ""
    lines = err.strip().splitlines()
    assert says in lines[0]
    assert lines[0].startswith("error: ")
    assert lines[1].startswith("  where: ")
    assert lines[2].startswith("  try:   ")
    assert "Traceback" not in err


def test_pickled_weights_are_refused(call, nano, tmp_path):
    (tmp_path / "config.json").write_text((nano / "config.json").read_text())
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n")
    code, _, err = call("explain", tmp_path)
    assert code == 1
    assert "only pytorch_model.bin" in err
    assert "run code when they are read" in err


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["nonsense"],
        ["eval", "M"],
        ["eval", "M", "--text", "T", "--preset", "nonsense"],
        ["eval", "M", "--text", "T", "--max-kl", "nan"],
        ["eval", "M", "--text", "T", "--context", "0"],
        ["explain", "M", "--set", "tau"],
        ["bisect", "M", "--text", "T"],
        ["eval", "M", "--text", "T", "--min-agreement", "98"],
        ["eval", "M", "--text", "T", "--twin", "0"],
    ],
)
def test_usage_errors_exit_2(arguments):
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2


def test_every_command_takes_json_and_states_the_exit_codes(capsys):
    for command in cli.COMMANDS:
        with pytest.raises(SystemExit) as caught:
            cli.main([command.NAME, "--help"])
        assert caught.value.code == 0
        help_text = capsys.readouterr().out
        assert "--json" in help_text
        assert "exit codes" in help_text


def test_any_character_can_be_printed(nano, tmp_path):
    """A terminal without Unicode gets escapes. The packaged model answers these quotes with quotes of its own."""
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("na\u00efve caf\u00e9 \u2014 \u201cquoted\u201d", encoding="utf-8")
    command = ["run", str(nano), "--prompt-file", str(prompt), "--max-new-tokens", "4", "--mode", "eager"]
    done = subprocess.run(
        [sys.executable, "-m", "lamp_compile.cli", *command],
        env={**os.environ, "PYTHONIOENCODING": "ascii"}, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "\\u201d" in done.stdout


def test_a_closed_pipe_is_no_traceback():
    """As `lamp-compile doctor | head -0` does it, in a process of its own."""
    code = "import sys; from lamp_compile.cli import main; sys.exit(main(['doctor']))"
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stderr is not None
    child.stdout.close()
    err = child.stderr.read()
    child.wait(timeout=120)
    assert "Traceback" not in err
    assert "Exception ignored" not in err
