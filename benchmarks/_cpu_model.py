"""Whole decode steps on a CPU: a process for every way, all of one context alive together, taking turns."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lamp_compile.quality.metrics import wilson

HERE = Path(__file__).resolve().parent
ROWS = (
    "hf_eager", "hf_static", "compiled_fp32", "compiled_bf16", "lamp", "lamp_frozen", "lamp_linears", "hf_quanto",
    "hf_hqq",
)  # fmt: skip
ORIGINAL = "hf_eager"
"""The uncompiled model, whose tokens the others are held against."""
RIVALS = ("compiled_fp32", "hf_static")
"""Compiled in float32; the faster one counts."""
WARM_STEPS = 6


@dataclass(frozen=True)
class Task:
    """What every process of a run is told."""

    model: str
    text: str
    threads: int
    rounds: int
    most: int = 512
    """Steps at most, of which there are fewer at short contexts."""
    generate: bool = True
    timeout: float = 600.0

    def steps(self, length: int) -> tuple[int, int]:
        """Steps of a round, and steps that the cache must have room for, at this context."""
        burst = max(1, (min(self.most, length // 4) - WARM_STEPS) // self.rounds)
        return burst, burst * self.rounds + WARM_STEPS


class Worker:
    """A process that decodes in one way."""

    def __init__(self, name: str, length: int, task: Task) -> None:
        burst, steps = task.steps(length)
        told = {**vars(task), "name": name, "length": length, "burst": burst, "steps": steps}
        self.name, self.timeout = name, task.timeout
        self.said: dict[str, Any] = {}
        self.ms: list[list[float]] = []
        self.noise = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115  (closed by end)
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "_cpu_worker.py"), json.dumps(told)], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=self.noise, text=True,
        )  # fmt: skip
        self._hear()

    @property
    def alive(self) -> bool:
        """Whether it takes part in the rounds."""
        return not {"failed", "skipped"} & set(self.said)

    def round(self) -> None:
        """One burst of steps."""
        if self.alive:
            self._ask("round")
            if self.alive:
                self.ms.append(self.said.pop("ms"))

    def end(self) -> dict[str, Any]:
        """The row."""
        if self.alive:
            self._ask("end")
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self.process.kill()
        self.noise.close()
        if not self.alive:
            return {"name": self.name, **{k: v for k, v in self.said.items() if k in ("failed", "skipped")}}
        bursts = [statistics.median(burst) for burst in self.ms]
        ms = statistics.median(bursts)
        self.said.pop("ready", None)
        return {"name": self.name, "ms": ms, "tokens_per_s": 1e3 / ms, "rounds_ms": bursts, **self.said}

    def _ask(self, word: str) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(word + "\n")
            self.process.stdin.flush()
        except OSError:  # it has ended: the answer that is missing says so
            pass
        self._hear()

    def _hear(self) -> None:
        assert self.process.stdout is not None
        timer = threading.Timer(self.timeout, self.process.kill)
        timer.start()
        line = self.process.stdout.readline()
        timer.cancel()
        if line:
            self.said |= json.loads(line)
            return
        self.noise.seek(0)
        last = [text for text in self.noise.read().splitlines() if text.strip()][-1:]
        self.said["failed"] = f"the process ended: {' '.join(last)[:300]}"


@dataclass
class Bench:
    """What all contexts share."""

    task: Task
    float_bytes: int
    """Bytes of the keys and values of one token in float32, all layers."""
    names: Sequence[str] = ROWS
    rows: list[dict[str, Any]] = field(default_factory=list)

    def context(self, length: int) -> list[dict[str, Any]]:
        """All rows of one context."""
        workers = [Worker(name, length, self.task) for name in self.names]
        for turn in range(self.task.rounds):
            for index in range(len(workers)):
                workers[(index + turn) % len(workers)].round()
        rows = [{"case": f"1x{length}", **worker.end()} for worker in workers]
        compare(rows, self.float_bytes * length)
        self.rows += rows
        return rows


def compare(rows: list[dict[str, Any]], float_bytes: int) -> None:
    """Ratios to the rivals, shares of a float cache, and agreement with the original's tokens, within a context."""
    named = {row["name"]: row for row in rows if "ms" in row}
    rival = min((named[name]["ms"] for name in RIVALS if name in named), default=None)
    original = named.get(ORIGINAL, {}).get("tokens")
    for row in named.values():
        row["ratio_to_compiled"] = rival and rival / row["ms"]
        row["ratio_to_hf_eager"] = named[ORIGINAL]["ms"] / row["ms"] if ORIGINAL in named else None
        row["kv_share_of_fp32"], row["kv_share_of_bf16"] = (
            row["kv_bytes"] / float_bytes,
            2 * row["kv_bytes"] / float_bytes,
        )
        row["same_tokens"] = row["positions"] = None
        if original is not None:
            row["same_tokens"] = sum(a == b for a, b in zip(original, row["tokens"], strict=True))
            row["positions"] = len(original)
    for row in named.values():
        row.pop("tokens")


def agreement(rows: list[dict[str, Any]], name: str) -> dict[str, Any] | None:
    """Over all contexts: the share of positions where this way and the original write the same token, and its
    95 % interval."""
    counted = [row for row in rows if row["name"] == name and row.get("positions")]
    positions = sum(row["positions"] for row in counted)
    if not positions:
        return None
    same = sum(row["same_tokens"] for row in counted)
    low, high = wilson(same, positions)
    return {"name": name, "agreement": same / positions, "low": low, "high": high, "positions": positions}


HEAD = (
    f"{'case':8s} {'name':14s} {'ms':>8s} {'tokens/s':>9s} x comp. x eager {'KV MB':>8s} of fp32 of bf16 peak MB  same"
    "      refined"
)


def line(row: dict[str, Any]) -> str:
    """One row as printed."""
    head = f"{row['case']:8s} {row['name']:14s}"
    if "ms" not in row:
        return f"{head} {'skipped' if 'skipped' in row else 'failed'}: {(row.get('skipped') or row['failed'])[:110]}"
    ratios = [f"{row[key]:7.2f}" if row[key] else "      -" for key in ("ratio_to_compiled", "ratio_to_hf_eager")]
    same = "-" if row["positions"] is None else f"{row['same_tokens']}/{row['positions']}"
    share = "" if row["refined_share"] is None else f"{row['refined_share']:.1%}"
    tail = f"graphs {row['graphs']}, breaks {row['graph_breaks']}, recompiles {row['recompiles']}"
    tail += f", generate {row['generate_ms']:.2f} ms" if row["generate_ms"] else ""
    tail += {True: ", fused", False: ", not fused", None: ""}[row["fused"]]
    return (
        f"{head} {row['ms']:8.2f} {row['tokens_per_s']:9.1f} {' '.join(ratios)} {row['kv_bytes'] / 1e6:8.2f} "
        f"{row['kv_share_of_fp32']:7.1%} {row['kv_share_of_bf16']:7.1%} {row['peak_mb']:7.0f}  {same:9s} {share:>7s}  "
        f"{tail}"
    )
