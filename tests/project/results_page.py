"""docs/quality.md and the tables of other pages and of the README, from benchmarks/results.

``python -m tests.project.results_page --write`` writes them.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from tests.project import calibration_page, cpu_page, decode_page, onnx_page, selection_page

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
PAGE, KERNELS, README = ROOT / "docs" / "quality.md", ROOT / "docs" / "kernels.md", ROOT / "README.md"
ONNX = ROOT / "docs" / "onnx.md"
CPU, SELECTION = ROOT / "docs" / "cpu.md", ROOT / "docs" / "selection.md"
BEGIN, END = "<!-- quality table: make golden -->", "<!-- end -->"

SHORT = [
    ("bf16", 0.0, "bf16"),
    ("fp8_kv", 0.0, "fp8 e4m3, one scale per token and head"),
    ("all_high", 0.0, "nested8, both planes everywhere"),
    ("lamp", 0.0, "**lamp_compile, default plan**"),
    ("random_tiles", 0.0, "as many tiles, drawn at random"),
    ("static_tiles", 0.0, "as many tiles: the first and the newest"),
    ("all_low", 0.0, "nested8, high plane only"),
    ("lamp", 30.0, "default plan, on a twin with 30-fold outlier key channels"),
    ("fp8_kv", 30.0, "fp8 on that twin"),
]
"""Rows of the README: name, twin scale, words."""

ABOUT = {
    "bf16": "keys, values and query in bf16",
    "fp8_kv": "fp8 e4m3 keys and values, one scale per token and head",
    "int8_kv": "int8 keys and values, one scale per token and head, no rotation",
    "all_high": "nested8, both planes everywhere, balance as the default plan decides",
    "all_high_balanced": "the same, balanced everywhere",
    "all_high_unbalanced": "the same, balanced nowhere",
    "all_low": "nested8, high plane only",
    "lamp": "the default plan of `compile()`",
    "random_tiles": "control: at least as many sub-tiles as `lamp`, drawn at random",
    "static_tiles": "control: at least as many sub-tiles as `lamp`, the first and the newest",
    "no_rotation_low": "nested8, high plane only, without the rotation",
}

HEAD = """\
# Quality, measured

Generated from `benchmarks/results/{file}` (`make golden`).
To repeat it, with a model folder and a file of token ids or text of your own:

```sh
python benchmarks/quality.py MODEL TEXT --windows {windows} --context {context} --targets --device cuda
```

Measured on {device}, torch {torch}, transformers {transformers}: a 25 M-parameter Llama (6 layers, 4 query and 2 kv
heads, D = 128, trained on 364 M tokens for tests like this one), held-out text, {windows} windows of {context} tokens
({positions} positions). Every row is one forward per window on the real cache and operators, in which each position
attends as a decode step would, against the uncompiled model in float32.

*bits* are read per stored value in a step, scales included; *refined* is the share of live sub-tiles of 32 keys
whose residual plane was read; agreement is that of the next token, with a 95 % Wilson interval. The *twin* computes
the same function in exact arithmetic, with three RoPE pairs per kv head of K scaled by 30 (any pairs, or the
slowest-turning only) and those of the queries by 1/30.

"""

COLUMNS = "| KV cache | bits | refined | KL | next-token agreement | perplexity ratio |\n|---|---|---|---|---|---|\n"


def latest() -> tuple[str, dict[str, Any]]:
    """The newest quality results: file name and content."""
    path = sorted(RESULTS.glob("*-quality-*.json"))[-1]
    return path.name, json.loads(path.read_text(encoding="utf-8"))


def cells(row: dict[str, Any], words: str) -> str:
    refined = f"{row['refined_share']:.1%}" if row["refined_share"] else "-"
    low, high = row["agreement_low"], row["agreement_high"]
    return (
        f"| {words} | {row['bits_per_value']:.2f} | {refined} | {row['kl']:.1e} | "
        f"{row['agreement']:.2%} ({low:.2%} to {high:.2%}) | {row['perplexity_ratio']:.5f} |\n"
    )


def short_table(data: dict[str, Any]) -> str:
    """The README's rows."""
    chosen = []
    for name, twin, words in SHORT:
        row = next(r for r in data["rows"] if r["name"] == name and r.get("twin", 0.0) == twin)
        chosen.append(cells(row, words))
    return COLUMNS + "".join(chosen)


def page() -> str:
    """The text of docs/quality.md."""
    name, data = latest()
    head = HEAD.format(
        file=name, windows=data["windows"], context=data["context"], device=data["device"],
        positions=f"{data['rows'][0]['positions']:,}", **{k: data["versions"][k] for k in ("torch", "transformers")},
    )  # fmt: skip
    rows = "".join(cells(row, _words(row)) for row in data["rows"])
    met = "".join(
        f"| {item['target']} | {item['limit']:g} | {item['measured']:.3g} | {'met' if item['met'] else 'missed'} |\n"
        for item in data["targets"]
    )
    checked = f"\n## Targets\n\n| target | limit | measured | |\n|---|---|---|---|\n{met}"
    return f"{head}{COLUMNS}{rows}{checked}{calibration_page.parts(RESULTS)}"


def readme() -> str:
    """The README with its tables renewed."""
    text = decode_page.filled(README.read_text(encoding="utf-8"), decode_page.readme(RESULTS))
    return re.sub(
        f"(?<={re.escape(BEGIN)}\n).*?(?={re.escape(END)})", lambda _: short_table(latest()[1]), text, flags=re.DOTALL
    )


def kernels() -> str:
    """docs/kernels.md with its table renewed."""
    return decode_page.filled(KERNELS.read_text(encoding="utf-8"), decode_page.page(RESULTS))


def cpu() -> str:
    """docs/cpu.md with its table renewed."""
    return decode_page.filled(CPU.read_text(encoding="utf-8"), cpu_page.page(RESULTS), cpu_page.BEGIN)


def onnx() -> str:
    """docs/onnx.md with its table renewed."""
    return decode_page.filled(ONNX.read_text(encoding="utf-8"), onnx_page.table(RESULTS), onnx_page.BEGIN)


def selection() -> str:
    """docs/selection.md with its tables renewed."""
    text = decode_page.filled(
        SELECTION.read_text(encoding="utf-8"), selection_page.curves(RESULTS), selection_page.CURVES
    )
    return decode_page.filled(text, selection_page.tasks(RESULTS), selection_page.TASKS)


def _words(row: dict[str, Any]) -> str:
    name = row["name"]
    rule = re.fullmatch(r"(energy|lamp_strict|lamp_relaxed|mass)_([\d.]+)(_balanced)?", name)
    if rule:
        about = f"rule `{rule[1]}`, tau {rule[2]}" + (", balanced everywhere" if rule[3] else "")
    else:
        about = f"`{name}`: {ABOUT[name]}"
    return about + (f" (twin, {row['pairs']} pairs)" if row.get("twin") else "")


if __name__ == "__main__":
    if "--write" in sys.argv:
        PAGE.write_text(page(), encoding="utf-8")
        README.write_text(readme(), encoding="utf-8")
        KERNELS.write_text(kernels(), encoding="utf-8")
        CPU.write_text(cpu(), encoding="utf-8")
        ONNX.write_text(onnx(), encoding="utf-8")
        SELECTION.write_text(selection(), encoding="utf-8")
    else:
        sys.stdout.write(page())
