"""The measured decode times of docs/kernels.md and the README, from benchmarks/results.

``python -m tests.project.results_page --write`` renews them with the tables of quality.
"""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- decode table: make golden -->", "<!-- end -->"
NOTHING = "*No results of `benchmarks/decode_kernel.py` and `benchmarks/decode_model.py` are committed yet.*\n"
LARGE, WEAK = 64 * 1024, 1.7
"""Above so many cached tokens an FP8 rival below so many times bf16 is called weak."""
WAYS = {
    "lamp": "**lamp_compile**",
    "roofline": "bf16, near the roofline: static cache, compiled, unmasked SDPA",
    "roofline_joined": "the same, one product for the linear layers of each input",
    "hf_static": "bf16, transformers' static cache, compiled",
    "hf_eager": "bf16, transformers' dynamic cache, eager",
}
CASE = "batch x tokens"


def latest(results: Path, benchmark: str) -> list[tuple[str, dict[str, Any]]]:
    """Results of the newest day: file names and contents."""
    paths = sorted(results.glob(f"*-{benchmark}-*.json"))
    day = paths[-1].name[:10] if paths else ""
    return [(p.name, json.loads(p.read_text(encoding="utf-8"))) for p in paths if p.name.startswith(day)]


def page(results: Path) -> str:
    """What docs/kernels.md shows of the results in a folder."""
    parts = [_kernel(name, data) for name, data in latest(results, "decode_kernel")]
    parts += [_model(name, data) for name, data in latest(results, "decode_model")]
    return "\n".join(parts) or NOTHING


def readme(results: Path) -> str:
    """What the README shows: per case how many times the rivals, and whole decode steps."""
    parts = []
    for _, data in latest(results, "decode_kernel"):
        rows = [[*number_cells(row, "case refined_share ms ratio_to_bf16 ratio_to_fp8")] for row in _lamp(data)]
        shown = make_table([CASE, "refined", "ms", "speed over bf16 SDPA", "speed over FP8 KV"], rows)
        parts.append(f"Attention of one new token on {_device(data)}:\n\n{shown}{_weak(data)}")
    for _, data in latest(results, "decode_model"):
        keys = "case ms ratio_to_bf16 ratio_to_hf_eager joule_per_token peak_memory_gb"
        titles = [CASE, "ms a step", "speed over near-roofline bf16", "speed over transformers", "J a token", "peak GB"]
        shown = make_table(titles, [[*number_cells(row, keys)] for row in _lamp(data)])
        parts.append(f"A whole decode step, {_subject(data)}, on {_device(data)}:\n\n{shown}")
    return "\n".join(parts) or NOTHING


def filled(text: str, table: str, first: str = BEGIN) -> str:
    """A page with the table between its marks renewed."""
    begin, end = re.escape(first), re.escape(END)
    assert len(re.findall(begin, text)) == 1, f"one place for the decode table: {first}"
    return re.sub(f"(?<={begin}\n).*?(?={end})", lambda _: table, text, flags=re.DOTALL)


def _kernel(name: str, data: dict[str, Any]) -> str:
    shape, shares = data["shape"], data["shares"]
    head = (
        f"`{name}`: attention of one new token on {_device(data)}, {shape['kv_heads']} kv heads, groups of "
        f"{shape['group']}, D {shape['dim']}. Times are those of captured CUDA graphs over inputs larger than the "
        f"device's cache; the refined shares of layers are {data['shares_are']}"
        f"{' at tau ' + format(data['tau'], 'g') if data.get('tau') else ''}, {sum(shares) / len(shares):.1%} in the "
        "mean. *Time over its bytes'*: over that of copying as many bytes as "
        "are touched. *Error*: of the output against float64, relative."
    )
    titles = [CASE, "refined", "lamp, ms", "bf16 SDPA, ms", "fp8, ms", "speed over bf16", "over fp8"]
    titles += ["time over its bytes'", "error"]
    named = {(row["case"], row["name"]): row for row in data["rows"]}
    rows = []
    for row in data["rows"]:
        if row["name"] in ("lamp", "inputs") and row.get("failed"):
            rows.append([row["case"], f"failed: {_first_line(row['failed'])}", *[""] * 7])
        elif row["name"].startswith("lamp") and "layer" not in row["name"] and row.get("ms"):
            keys = "case refined_share ms ratio_to_bf16 ratio_to_fp8 ratio_to_floor error"
            case, share, ms, *ratios = number_cells(row, keys)
            rivals = [number_cells(named.get((case, rival), {}), "ms")[0] for rival in ("bf16", "fp8")]
            imposed = "" if row["name"] == "lamp" else " (imposed)"
            rows.append([case, share + imposed, ms, *rivals, *ratios])
    facts = "".join(f"- {fact}\n" for fact in _facts(data))
    return f"{textwrap.fill(head, 120)}\n\n{make_table(titles, rows)}\n{facts}{_weak(data)}{targets_table(data)}"


def _model(name: str, data: dict[str, Any]) -> str:
    shares = "what the rule takes" if data.get("shares") is None else "imposed layer by layer"
    head = f"`{name}`: a whole decode step, {_subject(data)}, on {_device(data)}, refined shares {shares}."
    keys = "ms tokens_per_s ratio_to_bf16 joule_per_token peak_memory_gb kv_share_of_bf16"
    rows = []
    for row in data["rows"]:
        words = WAYS.get(row["name"], row["name"])
        cells = number_cells(row, keys) if row.get("ms") else [_first_line(row.get("failed") or "not run"), *[""] * 5]
        rows.append([row["case"], words, *cells])
    titles = [
        CASE,
        "way",
        "ms a step",
        "tokens/s",
        "speed over near-roofline",
        "J a token",
        "peak GB",
        "KV over bf16's",
    ]
    met = targets_table(data) if data["model"] == "8b" else ""
    return f"{textwrap.fill(head, 120)}\n\n{make_table(titles, rows)}{met}"


def _facts(data: dict[str, Any]) -> list[str]:
    found = []
    errors = {row["name"]: row["error"] for row in data["rows"] if row["case"].startswith("real") and "error" in row}
    if {"bf16", "lamp", "fp8"} <= set(errors):
        said = ", ".join(f"{name} {errors[name]:.1e}" for name in ("lamp", "fp8", "bf16"))
        found.append(f"Median error of the output on a trained model's own queries, keys and values: {said}.")
    for item in data.get("fits", []):
        lamp, bf16 = (item["ns_per_token"][name] for name in ("lamp", "bf16"))
        found.append(f"Batch {item['batch']}: one more cached token costs {lamp:.3g} ns, with bf16 {bf16:.3g} ns.")
    if data.get("break_even"):
        found.append(f"From {data['break_even']:,} cached tokens on, no measured case is slower than bf16.")
    else:
        found.append("In the largest of these cases bf16 is faster.")
    return found


def _weak(data: dict[str, Any]) -> str:
    """A rival that is none is named."""
    weak = [
        f"{row['case']} ({row['ratio_to_bf16']:.2f})"
        for row in data["rows"]
        if row["name"] == "fp8" and row.get("ratio_to_bf16") and _tokens(row) > LARGE and row["ratio_to_bf16"] < WEAK
    ]
    return f"\nThe FP8 rival is weak (below {WEAK} times bf16) at {', '.join(weak)}.\n" if weak else ""


def targets_table(data: dict[str, Any]) -> str:
    """Which targets were met; empty where there are none."""
    rows = []
    for item in data.get("targets", []):
        met = "not measured" if item["measured"] is None else "met" if item["met"] else "missed"
        measured = "-" if item["measured"] is None else f"{item['measured']:.4g}"
        rows.append([item["target"], f"{item['limit']:g}", measured, met])
    return "\n" + make_table(["target", "limit", "measured", ""], rows) if rows else ""


def _lamp(data: dict[str, Any]) -> list[dict[str, Any]]:
    return [row for row in data["rows"] if row["name"] == "lamp" and row.get("ms")]


def _subject(data: dict[str, Any]) -> str:
    return "Llama-3.1-8B's shape with random weights" if data["model"] == "8b" else f"model `{data['model']}`"


def _device(data: dict[str, Any]) -> str:
    versions = data["versions"]
    return f"{data['device']}, torch {versions['torch']}, triton {versions.get('triton') or 'none'}"


def _first_line(text: str) -> str:
    return (text.splitlines() or [""])[0][:80].replace("|", "/")


def _tokens(row: dict[str, Any]) -> int:
    batch, length = row["case"].split("x")
    return int(batch) * int(length)


FORMS = {
    "case": "", "ms": "#.3g", "tokens_per_s": ",.0f", "refined_share": ".1%", "kv_share_of_bf16": ".0%", "error": ".1e",
    "kv_share_of_fp32": ".1%",
    "joule_per_token": ".3f", "peak_memory_gb": ".1f",
}  # fmt: skip


def number_cells(row: dict[str, Any], keys: str) -> list[str]:
    """These numbers of a row as text; ratios have two digits behind the point."""
    return ["-" if row.get(k) is None else format(row[k], FORMS.get(k, ".2f")).rstrip(".") for k in keys.split()]


def make_table(titles: list[str], rows: Iterable[list[str]]) -> str:
    """A table in Markdown."""
    lines = [f"| {' | '.join(cells)} |\n".replace("|  |", "| |") for cells in (titles, *rows)]
    return "".join([lines[0], "|---" * len(titles) + "|\n", *lines[1:]])
