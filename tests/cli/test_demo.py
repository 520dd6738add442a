"""The demo as `make demo` runs it, shortened; and every reason for which it must fail."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace

import pytest

from lamp_compile.plan import Plan
from lamp_compile.quality.evaluate import Row
from lamp_compile.report import Report, SiteSummary


@pytest.fixture(scope="module")
def demo(root):
    spec = importlib.util.spec_from_file_location("lamp_demo", root / "examples/demo.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.WINDOWS, module.CONTEXT, module.NEW_TOKENS = 2, 512, 6
    return module


@pytest.fixture(scope="module")
def done(demo, root, nano, tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")
    arguments = ["--model", nano, "--text", root / "examples/data/walden.txt", "--mode", "eager", "--out", out]
    code = demo.main([str(a) for a in arguments])
    return code, out


def test_it_succeeds_and_leaves_its_files(done):
    code, out = done
    data = json.loads((out / "demo.json").read_text())
    assert code == 0
    assert data["failed"] == []
    assert len(data["rewritten"]) == 4
    assert [row["name"] for row in data["rows"]] == ["bf16", "fp8_kv", "lamp"]
    assert all(row["tokens_per_second"] > 0 for row in data["rows"])
    assert Plan.load(out / "plan.json").sites[0].k_format == "nested8"


def test_the_guard_falls_back_and_recovers_before_the_readers_eyes(done):
    faults = json.loads((done[1] / "demo.json").read_text())["faults"]
    steps = faults["steps"]
    assert max(steps[4]["floor"]) == 0, "healthy before the fault"
    assert steps[5]["refined"] == 0, "the fault: the rule refines nothing"
    assert any(max(s["floor"]) == 1 for s in steps[5:17]), "the floor rises"
    assert max(s["refined"] for s in steps[6:17]) > 0.9, "and both planes are read although the rule would not"
    assert steps[14]["kl"] < steps[5]["kl"] / 10, "which mends the output"
    assert max(steps[35]["floor"]) == 0, "it sinks again once the threshold is mended"
    assert max(steps[36]["floor"]) == 2, "a NaN calls for the highest level"
    assert faults["bad_steps"] > 0
    assert any("NaN" in flag for flag in faults["flags"])


@pytest.fixture
def healthy():
    row = Row(
        name="lamp",
        kl=1e-4,
        agreement=0.99,
        agreement_low=0.98,
        agreement_high=1.0,
        perplexity_ratio=1.0,
        max_dlogp=0.1,
        positions=1000,
        bits_per_value=5.0,
        refined_share=0.2,
        kv_bytes=12800,
        tau=0.01,
        seconds=1.0,
    )
    site = SiteSummary("a", "huggingface", 1, 1, 64, 64, "float32")
    report = Report((site,), (), (), Plan(()), ("a",))
    faults = {"fell_back": True, "recovered": True, "bad_steps": 2, "flags": ["a NaN"]}
    return {"report": report, "measured": [row], "context": 100, "faults": faults}


def test_nothing_to_complain_about(demo, healthy):
    bytes_at_the_claim = int(2 * 64 * 100 * 8.25 / 8)
    healthy["measured"] = [replace(healthy["measured"][0], kv_bytes=bytes_at_the_claim)]
    assert demo.complaints(**healthy) == []


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda h: h.update(report=replace(h["report"], rewritten=())), "no attention site"),
        (lambda h: h.update(measured=[replace(h["measured"][0], agreement=0.979)]), "below 98 %"),
        (lambda h: h.update(measured=[replace(h["measured"][0], agreement=float("nan"))]), "below 98 %"),
        (
            lambda h: h.update(measured=[replace(h["measured"][0], kv_bytes=14400)]),
            "the claim is 8.250",
        ),
        (lambda h: h["faults"].update(fell_back=False), "did not raise the floor"),
        (lambda h: h["faults"].update(recovered=False), "did not lower it"),
        (lambda h: h["faults"].update(flags=[]), "NaN was not flagged"),
    ],
)
def test_each_reason_to_fail_makes_it_fail(demo, healthy, change, says):
    change(healthy)
    assert any(says in line for line in demo.complaints(**healthy))
