"""The decode times of docs/onnx.md, from benchmarks/results. ``python -m tests.project.results_page --write``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

BEGIN = "<!-- onnx table: make golden -->"
WAYS = {
    "plain": "the plain float32 export",
    "lamp_native": "**native operators**",
    "lamp_portable": "**bodies of standard operators**",
    "gqa_fp32": "GroupQueryAttention, float32",
    "gqa_int8": "GroupQueryAttention, int8 with static scales",
    "gqa_int4": "GroupQueryAttention, int4 with static scales",
    "torch": "torch, uncompiled",
}
MODELS = {
    "given": "The 25 M-parameter model of the quality table, real text",
    "wide": "4 layers, 2,048 wide, random weights, refined shares imposed",
}


def table(results: Path) -> str:
    """All rows of the newest results, and the targets."""
    path = sorted(results.glob("*-onnx_decode-*.json"))[-1]
    data = json.loads(path.read_text(encoding="utf-8"))
    versions = data["versions"]
    text = f"`{path.name}`: {data['device']}, onnxruntime {versions['onnxruntime']}, torch {versions['torch']}.\n"
    for model, words in MODELS.items():
        rows = [row for row in data["rows"] if row["model"] == model]
        cached = list(dict.fromkeys(row["cached"] for row in rows))
        text += f"\n{words}: times the speed of the plain export (ms a step), by cached tokens.\n\n"
        text += f"| | {' | '.join(f'{n:,}' for n in cached)} | KV memory |\n|---|{'---|' * (len(cached) + 1)}\n"
        for name, way in WAYS.items():
            found = {row["cached"]: row for row in rows if row["name"] == name}
            cells = [f"{found[n]['speed_over_plain']:.2f} ({found[n]['ms']:.1f})" for n in cached]
            text += f"| {way} | {' | '.join(cells)} | {found[cached[0]]['kv_share_of_fp32']:.1%} |\n"
    text += _prompts(data["prompts"])
    text += "\n| target | limit | measured | |\n|---|---|---|---|\n"
    for item in data["targets"]:
        word = "met" if item["met"] else "missed"
        text += f"| {item['target']} | {item['limit']:g} | {item['measured']:.3g} | {word} |\n"
    return text


def _prompts(rows: list[dict[str, Any]]) -> str:
    tokens = rows[0]["tokens"]
    text = f"\nA prompt of {tokens}, ms:\n\n| model | way | logits of all tokens | of the last |\n|---|---|---|---|\n"
    for row in rows:
        model = {"given": "25 M parameters", "wide": "2,048 wide"}[row["model"]]
        ms = f"{row['all_logits_ms']:.0f} | {row['last_logits_ms']:.0f}"
        text += f"| {model} | {WAYS[row['name']].strip('*')} | {ms} |\n"
    return text
