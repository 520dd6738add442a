"""Numbers that the README and the docs quote are those of the committed results."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lamp_compile.control_plan import RELATION
from lamp_compile.quality.relation import predict
from tests.project import control_page, decode_page, results_page


def test_quality_page_and_readme_quote_the_committed_results() -> None:
    assert results_page.PAGE.read_text(encoding="utf-8") == results_page.page(), "run `make golden`"
    assert results_page.README.read_text(encoding="utf-8") == results_page.readme(), "run `make golden`"
    assert results_page.KERNELS.read_text(encoding="utf-8") == results_page.kernels(), "run `make golden`"
    assert results_page.ONNX.read_text(encoding="utf-8") == results_page.onnx(), "run `make golden`"
    assert results_page.SELECTION.read_text(encoding="utf-8") == results_page.selection(), "run `make golden`"
    assert results_page.CPU.read_text(encoding="utf-8") == results_page.cpu(), "run `make golden`"


def test_control_page_quotes_the_committed_results() -> None:
    assert control_page.PAGE.read_text(encoding="utf-8") == control_page.page(), "run `make golden`"
    assert control_page.BEGIN in control_page.page()


def test_the_default_relation_is_cautious_where_it_was_measured() -> None:
    for model in control_page.MODELS:
        for row in control_page.latest(model)["rows"]:
            assert predict(RELATION, row["estimate"]) >= 1 - row["agreement"], (model, row["tau"])


def test_all_quality_targets_are_met() -> None:
    _, data = results_page.latest()
    assert len(data["targets"]) >= 12
    assert [item["target"] for item in data["targets"] if not item["met"]] == []


def test_results_say_where_they_come_from() -> None:
    for path in results_page.RESULTS.glob("*.json"):
        data = json.loads(path.read_text(encoding="utf-8"))
        assert data["device"], path
        assert data["versions"]["torch"], path
        assert data.get("rows") or data.get("runs"), path


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of both decode benchmarks, of small cases."""
    folder = tmp_path_factory.mktemp("results")
    tiny = {
        "decode_kernel": "--cases 1x256,2x256 --fixed-at 2x256 --kv-heads 2 --dim 64 --repeats 1 --shares 0.05,0.1",
        "decode_model": "--shape tiny --cases 2x256 --rows roofline,lamp --seconds 0.01 --windows 1 --shares 0.1",
    }
    for name, options in tiny.items():
        out = folder / f"2026-01-02-{name}-cpu.json"
        command = [sys.executable, f"benchmarks/{name}.py", *options.split(), "--device", "cpu", "--out", str(out)]
        done = subprocess.run(command, cwd=results_page.ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
    return folder


def test_decode_tables_show_what_was_measured(samples: Path) -> None:
    page, short = decode_page.page(samples), decode_page.readme(samples)
    data = json.loads((samples / "2026-01-02-decode_kernel-cpu.json").read_text())
    rows = [row for row in data["rows"] if row["name"].startswith("lamp") and "layer" not in row["name"]]
    assert sum(line.startswith(("| 1x256 |", "| 2x256 |")) for line in page.splitlines()) == len(rows) + 2
    (row,) = (row for row in rows if (row["case"], row["name"]) == ("1x256", "lamp"))
    (milliseconds,) = decode_page.number_cells(row, "ms")
    shown = f"| 1x256 | {row['refined_share']:.1%} | {milliseconds} | "
    assert shown in page
    assert f"{shown}{row['ratio_to_bf16']:.2f} | {row['ratio_to_fp8']:.2f} |\n" in short
    assert "| 2x256 | **lamp_compile** | " in page
    assert "A whole decode step, model `tiny`" in short
    assert page.count("not measured") == len(data["targets"])
    for text in (page, short):
        for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
            assert len({line.count("|") for line in block.splitlines()}) == 1, block


def test_numbers_have_three_digits_and_no_bare_point() -> None:
    shown = [decode_page.number_cells({"ms": ms}, "ms") for ms in (0.30, 9.84, 156.8)]
    assert shown == [["0.300"], ["9.84"], ["157"]]


def test_only_the_newest_results_are_shown(samples: Path, tmp_path: Path) -> None:
    old = json.loads((samples / "2026-01-02-decode_kernel-cpu.json").read_text())
    new = {**old, "device": "NVIDIA Something"}
    failed = {"case": "1x512", "name": "lamp", "failed": "OutOfMemoryError: no room\nat all"}
    new["rows"] = [*(row for row in old["rows"] if row["case"] == "2x256"), failed]
    (tmp_path / "2026-01-02-decode_kernel-cpu.json").write_text(json.dumps(old))
    (tmp_path / "2026-01-03-decode_kernel-something.json").write_text(json.dumps(new))
    page, short = decode_page.page(tmp_path), decode_page.readme(tmp_path)
    assert "1x256" not in page + short
    assert "on NVIDIA Something" in page
    assert "| 1x512 | failed: OutOfMemoryError: no room | |" in page


def test_a_weak_rival_is_named(tmp_path: Path) -> None:
    rows = [
        {"case": "32x32768", "name": name, "ms": 1.0, "error": 0.1, "ratio_to_bf16": 1.5} for name in ("fp8", "lamp")
    ]
    data = {"device": "a", "versions": {"torch": "b"}, "shape": {"kv_heads": 1, "group": 1, "dim": 64}, "rows": rows}
    (tmp_path / "2026-01-03-decode_kernel-a.json").write_text(
        json.dumps({**data, "shares": [1], "shares_are": "given"})
    )
    for text in (decode_page.page(tmp_path), decode_page.readme(tmp_path)):
        assert "The FP8 rival is weak (below 1.7 times bf16) at 32x32768 (1.50)." in text


def test_without_results_the_place_says_so(tmp_path: Path) -> None:
    text = f"before\n{decode_page.BEGIN}\nold\n{decode_page.END}\nafter\n"
    filled = decode_page.filled(text, decode_page.page(tmp_path))
    assert filled == text.replace("old\n", decode_page.NOTHING)
    with pytest.raises(AssertionError, match="one place"):
        decode_page.filled("no place", "")
