"""All ways of onnx_decode.py at one number of cached tokens: alive together, taking turns, held against torch."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import _cpu_model
import numpy as np
import torch

HERE = Path(__file__).resolve().parent
ROWS = ("torch", "plain", "gqa_fp32", "gqa_int8", "gqa_int4", "lamp_portable", "lamp_native")
ABOUT = {
    "torch": "transformers, eager, float32, dynamic cache",
    "plain": "transformers' ONNX export, float32, past and present joined by Concat",
    "gqa_fp32": "com.microsoft.GroupQueryAttention, float32 cache written in place",
    "gqa_int8": "the same with an int8 cache, static scales per channel of the very keys and values",
    "gqa_int4": "the same with int4",
    "lamp_portable": "export_onnx, its bodies of standard operators",
    "lamp_native": "export_onnx, native operators",
}


@dataclass(frozen=True)
class Task:
    """What every process is told."""

    folder: str
    tokens: str
    kv: str
    threads: int
    rounds: int
    burst: int
    share: float | None
    timeout: float = 600.0


class Worker(_cpu_model.Worker):
    """A process that decodes in one way."""

    def __init__(self, name: str, cached: int, task: Task, logits: Path) -> None:
        told = {**vars(task), "name": name, "cached": cached, "steps": task.burst * task.rounds, "logits": str(logits)}
        self.name, self.timeout, self.said, self.ms = name, task.timeout, {}, []
        self.noise = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115  (closed by end)
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "_onnx_worker.py"), json.dumps(told)], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=self.noise, text=True,
        )  # fmt: skip
        self._hear()


def context(cached: int, task: Task, names: list[str]) -> list[dict[str, Any]]:
    """A row for every way, with its ratio to the plain export and its outputs against torch's."""
    with tempfile.TemporaryDirectory() as folder:
        files = {name: Path(folder) / f"{name}.npy" for name in names}
        workers = [Worker(name, cached, task, files[name]) for name in names]
        for turn in range(task.rounds):
            for index in range(len(workers)):
                workers[(index + turn) % len(workers)].round()
        rows = [{"cached": cached, **worker.end()} for worker in workers]
        found = {name: np.load(file) for name, file in files.items() if file.exists()}
    compare(rows, found)
    return rows


def compare(rows: list[dict[str, Any]], logits: dict[str, Any]) -> None:
    """Ratios, and what every way put out in all its steps against the reference: torch, or the plain export."""
    named = {row["name"]: row for row in rows if "ms" in row}
    reference = next((logits[name] for name in ("torch", "plain") if name in logits), None)
    for name, row in named.items():
        row["speed_over_plain"] = named["plain"]["ms"] / row["ms"] if "plain" in named else None
        floats = next((named[n]["kv_bytes_per_token"] for n in ("plain", "torch", "gqa_fp32") if n in named), None)
        row["kv_share_of_fp32"] = row["kv_bytes_per_token"] / floats if floats else None
        if reference is None:
            continue
        got = logits[name]
        error = np.linalg.norm(got - reference, axis=1) / np.linalg.norm(reference, axis=1)
        row["logits_error"] = float(np.median(error))
        row["same_tokens"] = int((got.argmax(1) == reference.argmax(1)).sum())
        row["positions"] = len(reference)
        if name.startswith(("lamp", "gqa_int")) and not error.any():
            row["failed"] = "its outputs equal float32 bit for bit: nothing ran in low precision"


def keys_and_values(folder: Path, ids: np.ndarray, rows: int = 512) -> Path:
    """Of a text, by transformers in float32: ``[layers, 2, G, N, D]`` in a file."""
    from transformers import AutoModelForCausalLM, DynamicCache

    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32).eval()
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        for first in range(0, len(ids), rows):
            model.model(input_ids=torch.from_numpy(ids[None, first : first + rows]), past_key_values=cache)
    kept = np.stack([np.stack([layer.keys[0].numpy(), layer.values[0].numpy()]) for layer in cache.layers])
    file = folder / "kv.npy"
    np.save(file, kept)
    return file


HEAD = f"{'cached':>7s} {'name':14s} {'ms':>8s} {'x plain':>8s} {'KV':>7s} {'error':>9s} {'same':>9s} {'refined':>8s}"


def line(row: dict[str, Any]) -> str:
    """One row as printed."""
    head = f"{row['cached']:7d} {row['name']:14s}"
    if "ms" not in row:
        return f"{head} failed: {row.get('failed', row.get('skipped', ''))[:120]}"
    ratio = "-" if row["speed_over_plain"] is None else f"{row['speed_over_plain']:.2f}"
    share = "-" if row["refined_share"] is None else f"{row['refined_share']:.1%}"
    same = f"{row['same_tokens']}/{row['positions']}" if "positions" in row else "-"
    tail = f"  FAILED: {row['failed']}" if "failed" in row else ""
    return (
        f"{head} {row['ms']:8.2f} {ratio:>8s} {row['kv_share_of_fp32'] or 0:7.1%} {row.get('logits_error', 0):9.2e} "
        f"{same:>9s} {share:>8s}{tail}"
    )
