"""The CPU benchmark measures, checks and compares; what is missing is skipped, and targets can be missed."""

from __future__ import annotations

import importlib
import importlib.util
import json
import subprocess
import sys

import pytest
import torch

from tests.project import cpu_page
from tests.tolerances import STORAGE

TINY = ["--kv-heads", 2, "--group", 2, "--dim", 64, "--rounds", 2, "--seconds", 0.01, "--cache-mb", 1, "--threads", 1]


@pytest.fixture
def folder(root, monkeypatch):
    """The benchmarks can be imported."""
    monkeypatch.syspath_prepend(str(root / "benchmarks"))
    return root / "benchmarks"


@pytest.fixture
def cpu_decode(folder):
    return importlib.import_module("cpu_decode")


@pytest.fixture
def ways(folder):
    return importlib.import_module("_cpu_ways")


@pytest.fixture
def model(folder):
    return importlib.import_module("_cpu_model")


def _sources(ways, length=128, batch=1):
    from _planes import Case, Shape, make

    case, shape = Case(batch, length), Shape(2, 2, 64)
    return ways.Sources(case, shape, [make(case, shape, torch.device("cpu"), seed) for seed in range(2)], 1 << 10)


def _wanted(sources):
    from _rivals import references

    return [references(one) for one in sources.inputs]


def test_the_attention_part_times_checks_and_writes(cpu_decode, root, tmp_path, capsys):
    out = tmp_path / "results" / "2026-01-02-cpu_decode-cpu.json"
    arguments = [*TINY, "--parts", "attention", "--cases", "1x256,1x512", "--fixed-at", "1x512", "--context", 256]
    assert cpu_decode.main([str(a) for a in [*arguments, "--positions", 4, "--targets", "--out", out]]) == 1
    data = json.loads(out.read_text())
    assert len(data["shares"]) == len(data["real_layers"]) == 4
    real = {row["name"]: row["error"] for row in data["rows"] if row["part"] == "real"}
    assert real["bf16"] < real["lamp"] < real["fp8"] < real["int4 per channel"]
    rows = {(row["case"], row["name"]): row for row in data["rows"] if row["part"] == "attention"}
    assert not [row for row in rows.values() if "failed" in row]
    for case in ("1x256", "1x512"):
        sdpa = min(rows[case, name]["ms"] for name in ("sdpa_fp32", "sdpa_bf16"))
        assert rows[case, "lamp append"]["values_changed"] == 0
        for name in ("sdpa_fp32", "sdpa_bf16", "matmul_bf16", "fp8", "lamp"):
            row = rows[case, name]
            assert row["ratio_to_sdpa"] == sdpa / row["ms"]
            assert row["gb_per_s"] == pytest.approx(row["bytes"] / row["ms"] / 1e6)
            assert row["bandwidth_share"] == pytest.approx(row["gb_per_s"] / rows[case, "read"]["gb_per_s"])
            assert 0 < row["error"] <= row["error_largest"] < 0.2
            assert row["sets"] * row["bytes"] >= 3 << 20 or row["sets"] == 256, "more than the cache holds"
    assert rows["1x256", "sdpa_fp32"]["bytes"] == 2 * rows["1x256", "sdpa_bf16"]["bytes"] == 256 * 2 * 2 * 64 * 4
    fixed = [rows["1x512", f"lamp {share}"] for share in ("0%", "5%", "10%", "20%", "all refined")]
    assert [row["refined_share"] for row in fixed] == pytest.approx([0, 0.05, 0.1, 0.2, 1], abs=1 / 16)
    assert [row["error"] for row in fixed] == sorted((row["error"] for row in fixed), reverse=True)
    met = {item["target"]: item["met"] for item in data["targets"]}
    assert met["error on real data over that of fp8"]
    printed = capsys.readouterr().out
    assert "lamp runs: " in printed
    assert all(row["name"] in printed for row in data["rows"])
    assert str(root) not in out.read_text(), "no folder of this machine in a result"
    page = cpu_page.page(out.parent)
    assert f"| 1x512 | `lamp` | {rows['1x512', 'lamp']['ms']:#.3g}".rstrip(".") in page
    assert "| 1x512 | `lamp all refined` | " in page


def test_prefill_is_right_and_on_the_page(cpu_decode, tmp_path):
    out = tmp_path / "2000-01-01-cpu_decode-cpu.json"
    arguments = ["--parts", "prefill", "--prompts", "40,96", *map(str, TINY)]
    assert cpu_decode.main([*arguments, "--out", str(out)]) == 0
    rows = [row for row in json.loads(out.read_text())["rows"] if row["part"] == "prefill"]
    assert [(row["case"], row["name"]) for row in rows] == [
        (f"1x{length}", f"{way}_{dtype}")
        for length in (40, 96)
        for dtype in ("fp32", "bf16")
        for way in ("sdpa", "lamp")
    ]
    for sdpa, lamp in zip(rows[::2], rows[1::2], strict=True):
        assert sdpa["error"] < 1e-2
        assert lamp["error"] < STORAGE["nested8"].relative * 2
        assert lamp["ratio_to_sdpa"] == sdpa["ms"] / lamp["ms"]
        assert 0.5 < lamp["refined_share"] <= 1
    assert f"| 1x96 | `lamp_bf16` | {rows[-1]['ms']:.1f} |" in cpu_page.page(tmp_path)


def test_every_way_is_right(ways, folder):
    sources = _sources(ways)
    made = [
        ways.floats("sdpa_fp32", sources, torch.float32, ways.SDPA),
        ways.floats("sdpa_bf16", sources, torch.bfloat16, ways.SDPA),
        ways.fp8(sources),
        ways.Lamp(sources).at("lamp all refined", [1.0]),
    ]
    rows = ways.measure(made, _wanted(sources), 2, 0.001)
    limits = [1e-5, 2e-2, STORAGE["fp8"].relative, 5e-2]
    for row, limit in zip(rows, limits, strict=True):
        assert row["error_largest"] < limit, row["name"]
    assert set(rows[0]["tried_ms"]) == set(ways.SDPA)


def test_every_call_of_sdpa_is_right(ways):
    q, k, v = torch.randn(2, 6, 1, 32), *torch.randn(2, 2, 3, 40, 32)
    for name, attend in {**ways.SDPA, **ways.PRODUCTS}.items():
        torch.testing.assert_close(attend(q, k, v), ways.SDPA["enable_gqa"](q, k, v), msg=name)


def test_wrong_and_failing_ways_are_rows_that_say_so(ways):
    sources = _sources(ways, 64)

    def broken():
        raise RuntimeError("out of something")

    def wrong():
        return torch.ones(1, 4, 1, 64)

    made = [ways.Way("broken", [broken], 1.0), ways.Way("wrong", [wrong], 1.0)]
    rows = ways.measure(made, _wanted(sources), 2, 0.001)
    assert rows[0]["failed"] == "RuntimeError: out of something"
    assert "wrong output" in rows[1]["failed"]


def test_onnx_runtime_is_right_or_skipped(ways, folder):
    ort = importlib.import_module("_cpu_ort")
    sources = _sources(ways)
    if importlib.util.find_spec("onnxruntime") is None or importlib.util.find_spec("onnx") is None:
        with pytest.raises(ImportError):
            ort.way("ort_int8", sources)
        return
    made = [ort.way(name, sources) for name in ort.BITS]
    errors = [row["error_largest"] for row in ways.measure(made, _wanted(sources), 1, 0.001)]
    several = _sources(ways, batch=2)
    (row,) = ways.measure([ort.way("ort_int8", several)], _wanted(several), 1, 0.001)
    assert row["error_largest"] < 0.1
    assert errors[0] < 1e-5
    for bits, found in zip((8, 4), errors[1:], strict=True):
        emulated = ort.round_per_channel(bits)
        inputs = sources.inputs[0]
        k, v = emulated(inputs.k[0], inputs.v[0])
        from _rivals import error, exact, references

        rounding = error(exact(inputs.q[0, :, 0], k, v)[None, :, None], references(inputs))
        assert found == pytest.approx(rounding, rel=1.0)


def test_the_machine_is_described(folder, tmp_path):
    machine = importlib.import_module("_cpu_machine")
    for index, size in enumerate(("32K", "1024K", "48M")):
        (tmp_path / f"index{index}").mkdir()
        (tmp_path / f"index{index}" / "size").write_text(size + "\n")
    assert machine.cache_bytes(tmp_path) == 48 << 20
    assert machine.cache_bytes(tmp_path / "nothing") == machine.CACHE
    info = tmp_path / "cpuinfo"
    info.write_text("model name\t: Some CPU\nflags\t\t: fpu avx2 avx512_vnni\n")
    assert machine.describe(info)["cpu"] == "Some CPU"
    assert machine.describe(info)["isa"] == ["avx2", "avx512_vnni"]
    assert machine.describe(tmp_path / "none")["isa"] == []
    reading = machine.Reading(1 << 20, 3)
    assert reading.tried[reading.best] == max(reading.tried.values()) > 0.1
    assert len(reading.calls()) == 3


def test_the_model_part_decodes_in_processes_that_take_turns(cpu_decode, root, nano, tmp_path, capsys):
    out = tmp_path / "2026-01-02-cpu_decode-cpu.json"
    arguments = ["--parts", "model", "--contexts", "128,4096", "--model-rows", "hf_eager,hf_quanto,lamp_linears"]
    arguments += ["--rounds", "2", "--steps", "16", "--threads", "1", "--no-generate", "--out", str(out)]
    assert cpu_decode.main(arguments) == 0
    data = json.loads(out.read_text())
    rows = {row["name"]: row for row in data["rows"]}
    eager = rows["hf_eager"]
    assert eager["same_tokens"] == eager["positions"] == 6 + 2 * 5
    assert eager["kv_share_of_fp32"] == pytest.approx(1.0, abs=0.02)
    assert eager["peak_mb"] >= eager["loaded_mb"] > 50
    assert eager["tokens_per_s"] == pytest.approx(1e3 / eager["ms"])
    if importlib.util.find_spec("optimum") is None:
        assert "quanto" in rows["hf_quanto"]["skipped"]
    assert "ms" in rows["lamp_linears"] or "linears" in rows["lamp_linears"]["skipped"]
    assert "1x4096 is left out" in capsys.readouterr().out
    assert f"| 1x128 | `hf_eager` | {eager['ms']:#.3g}".rstrip(".") in cpu_page.page(tmp_path)


@pytest.mark.slow
def test_lamp_decodes_in_one_graph(model, root, nano):
    text = root / "examples" / "data" / "walden.txt"
    task = model.Task(str(nano), str(text), 1, 2, 32)
    rows = {
        row["name"]: row
        for row in model.Bench(task, 2 * 4 * 4 * 2 * 64, ("hf_eager", "compiled_fp32", "lamp")).context(256)
    }
    assert rows["compiled_fp32"]["same_tokens"] == rows["compiled_fp32"]["positions"]
    assert rows["lamp"]["graph_breaks"] == rows["lamp"]["recompiles"] == 0
    assert rows["lamp"]["graphs"] == 1
    assert rows["lamp"]["generate_ms"] > 0
    assert rows["lamp"]["ratio_to_compiled"] == rows["compiled_fp32"]["ms"] / rows["lamp"]["ms"]


def test_a_process_that_dies_is_a_row_that_says_why(model, monkeypatch, nano, tmp_path):
    task = model.Task(str(nano), str(tmp_path / "missing.txt"), 1, 2, 16)
    worker = model.Worker("hf_eager", 128, task)
    worker.round()
    assert worker.end()["failed"].startswith("InputError")
    monkeypatch.setattr(sys, "executable", "/bin/true")
    assert "the process ended" in model.Worker("hf_eager", 128, task).end()["failed"]


def test_bytes_of_nested_tensors_are_counted(folder):
    worker = importlib.import_module("_cpu_worker")
    assert worker.held_bytes((torch.zeros(3), {"scale": torch.zeros(2, dtype=torch.int8), "shape": (3, 1)}, None)) == 14
    assert worker.peak_mb() > 10


def _good():
    rows = [
        {"case": f"1x{length}", "name": "lamp", "ms": 1.0, "ratio_to_sdpa": ratio, "bandwidth_share": 0.7}
        for length, ratio in ((512, 1.1), (4096, 2.2), (16384, 3.0))
    ]
    real = [{"name": "lamp", "error": 0.01}, {"name": "fp8", "error": 0.03}]
    whole = [
        {"case": f"1x{length}", "name": name, "ms": 1.0, "ratio_to_compiled": ratio, "kv_share_of_fp32": 0.254,
         "kv_share_of_bf16": 0.508, "same_tokens": 499, "positions": 500, "graph_breaks": 0, "recompiles": 0}
        for length, name, ratio in ((512, "lamp", 1.0), (4096, "lamp", 1.4), (4096, "lamp_linears", 2.1))
    ]  # fmt: skip
    prompts = [{"name": "lamp_fp32", "ratio_to_sdpa": 1.0}, {"name": "sdpa_fp32"}]
    return rows, real, prompts, whole


def test_targets_can_be_met_and_missed(folder):
    check = importlib.import_module("_cpu_targets")
    assert [item["target"] for item in check.targets(*_good()) if not item["met"]] == []
    assert not any(item["met"] for item in check.targets([], [], [], []))
    rows, real, prompts, whole = _good()
    whole[0]["ratio_to_compiled"] = 0.9
    missed = [item["target"] for item in check.targets(rows, real, prompts, whole) if not item["met"]]
    assert missed == ["any length: times compiled float32"]
    prompts[0]["ratio_to_sdpa"] = 0.9
    assert "prefill of any length: times SDPA" in [
        item["target"] for item in check.targets(rows, real, prompts, whole) if not item["met"]
    ]
    prompts[0]["ratio_to_sdpa"] = 1.0
    rows[1]["failed"] = "wrong output"
    assert len([item for item in check.targets(rows, real, prompts, whole) if not item["met"]]) == 2
    assert check.break_even(_good()[0]) == 512
    rows[2]["ratio_to_sdpa"] = 0.9
    assert check.break_even(rows) is None


def test_agreement_counts_all_contexts(model):
    rows = [{"name": "lamp", "same_tokens": same, "positions": 100} for same in (100, 98)]
    found = model.agreement(rows, "lamp")
    assert (found["agreement"], found["positions"]) == (0.99, 200)
    assert found["low"] < 0.99 < found["high"]
    assert model.agreement(rows, "hf_eager") is None


def test_unknown_rows_are_refused(cpu_decode, capsys):
    with pytest.raises(SystemExit):
        cpu_decode.main(["--rows", "sdpa_fp64"])
    assert "sdpa_fp64" in capsys.readouterr().err


def test_help_of_the_script(root):
    done = subprocess.run(
        [sys.executable, "benchmarks/cpu_decode.py", "--help"], cwd=root, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "--budget" in done.stdout


def test_the_page_without_results_says_so(tmp_path):
    assert cpu_page.page(tmp_path) == cpu_page.NOTHING
