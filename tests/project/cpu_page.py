"""The measured times of docs/cpu.md, from benchmarks/results. ``results_page`` writes them."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Any

from tests.project.decode_page import CASE, make_table, number_cells, targets_table

BEGIN = "<!-- cpu table: make golden -->"
NOTHING = "*No results of `benchmarks/cpu_decode.py` are committed yet.*\n"
ORDER = ("lamp", "sdpa_fp32", "sdpa_bf16", "matmul_bf16", "ort_fp32", "ort_int8", "ort_int4", "fp8")
PARTS = ("real", "attention", "prefill", "model")
STEP = "case ms ratio_to_sdpa ratio_to_best refined_share error"
WHOLE = "case ms tokens_per_s ratio_to_compiled kv_share_of_fp32 refined_share"


def page(results: Path) -> str:
    """What docs/cpu.md shows of the results in a folder."""
    return (
        "\n".join(_run(path.name, json.loads(path.read_text(encoding="utf-8"))) for path in _newest(results)) or NOTHING
    )


def _newest(results: Path) -> list[Path]:
    """The newest file of each machine."""
    paths = sorted(results.glob("*-cpu_decode-*.json"))
    return sorted({path.stem.partition("-cpu_decode-")[2]: path for path in paths}.values())


def _run(name: str, data: dict[str, Any]) -> str:
    machine, versions = data["machine"], data["versions"]
    packages = ", ".join(f"{key} {versions[key]}" for key in ("torch", "transformers", "onnxruntime") if versions[key])
    kernel = "the native kernel" if data["kernel"] == "native" else f"the reference ({data['kernel']})"
    head = (
        f"`{name}`: {machine['cpu'] or data['device']} ({', '.join(machine['isa'])}), {data['threads']} threads, a "
        f"cache of {machine['cache_mb']:.0f} MB, {packages}. lamp runs {kernel}."
    )
    parts = [textwrap.fill(head, 120)]
    rows = {part: [row for row in data["rows"] if row["part"] == part] for part in PARTS}
    if rows["attention"]:
        parts.append(_attention(data, rows["attention"]))
    if rows["real"]:
        said = ", ".join(f"{row['name']} {row['error']:.1e}" for row in rows["real"])
        parts.append(
            textwrap.fill(f"Median error of the output on the model's own queries, keys and values: {said}.", 120)
        )
    if rows["prefill"]:
        parts.append(_prefill(rows["prefill"]))
    if rows["model"]:
        parts.append(_model(data, rows["model"]))
    return "\n\n".join(part.rstrip("\n") for part in parts) + "\n" + targets_table(data)


def _attention(data: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    shape, read = data["shape"], [row["gb_per_s"] for row in rows if row["name"] == "read"]
    about = (
        f"Attention of one new token, {shape['kv_heads']} kv heads, groups of {shape['group']}, D {shape['dim']}; the "
        f"machine reads {min(read):.0f} to {max(read):.0f} GB/s; refined shares {data['shares_are']}."
    )
    shown = [row for row in rows if row["name"] not in ("lamp append", "read")]
    cases = list(dict.fromkeys(row["case"] for row in rows))
    shown.sort(key=lambda row: (cases.index(row["case"]), _place(row["name"])))
    cells = []
    for row in shown:
        if not row.get("ms") or row.get("failed"):
            cells.append([row["case"], f"`{row['name']}`", _why(row), *["-"] * 6])
            continue
        case, *numbers = number_cells(row, STEP)
        speed = [f"{row['gb_per_s']:.1f}", f"{row['bandwidth_share']:.0%}"]
        cells.append([case, f"`{row['name']}`", *(number.rstrip(".") for number in numbers), *speed])
    titles = [CASE, "way", "ms", "speed over SDPA", "over the best in floats", "refined", "error", "GB/s"]
    titles.append("of the bandwidth")
    return f"{textwrap.fill(about, 120)}\n\n{make_table(titles, cells)}"


def _prefill(rows: list[dict[str, Any]]) -> str:
    about = (
        "Prefill: keys and values of a prompt stored and attended by all of its tokens. Inputs are normal numbers, of "
        "which more is refined than of text."
    )
    cells = []
    for row in rows:
        ratio, share = row.get("ratio_to_sdpa"), row.get("refined_share")
        cells.append([row["case"], f"`{row['name']}`", f"{row['ms']:.1f}", f"{ratio:.2f}" if ratio else "-",
                      f"{share:.1%}" if share is not None else "-", f"{row['error']:.1e}"])  # fmt: skip
    titles = [CASE, "way", "ms", "speed over SDPA", "refined", "error"]
    return f"{textwrap.fill(about, 120)}\n\n{make_table(titles, cells)}"


def _model(data: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    cells = []
    for row in rows:
        if not row.get("ms"):
            cells.append([row["case"], f"`{row['name']}`", _why(row), *["-"] * 6])
            continue
        case, *numbers = number_cells(row, WHOLE)
        same = f"{row['same_tokens']} of {row['positions']}" if row["positions"] else "-"
        cells.append(
            [case, f"`{row['name']}`", *(number.rstrip(".") for number in numbers), f"{row['peak_mb']:.0f}", same]
        )
    titles = [CASE, "way", "ms a token", "tokens/s", "speed over compiled", "KV over float32's", "refined", "peak MB"]
    table = make_table([*titles, "same tokens"], cells)
    said = [
        f"- `{item['name']}`: {item['agreement']:.2%} ({item['low']:.2%} to {item['high']:.2%}) of "
        f"{item['positions']:,} tokens are the original's.\n"
        for item in data["agreement"]
        if item["name"] != "hf_eager"
    ]
    return f"Whole decode steps of model `{data['model']}`.\n\n{table}\n{''.join(said)}"


def _place(name: str) -> int:
    """Where a row stands within its case: fixed shares last."""
    return ORDER.index(name) if name in ORDER else len(ORDER)


def _why(row: dict[str, Any]) -> str:
    word = "skipped" if "skipped" in row else "failed"
    return f"{word}: {str(row[word]).splitlines()[0][:80]}".replace("|", "/")
