"""How much longer the lamp backend takes to compile a model's forward than plain Inductor does.

    python benchmarks/compile_time.py MODEL --repeats 3 --out benchmarks/results/compile_time.json

MODEL is a local folder (safetensors). Each measurement is a process of its own with empty caches; the two backends take
turns. Compile time is the first call less a later one. Medians are compared; the least times are given too, because
another job on the machine only ever adds. With --limit it exits 1 when the ratio of the medians is above it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import _script
import torch

import lamp_compile
from lamp_compile.quality import load
from lamp_compile.quality.environment import environment, write_json

BACKENDS = ("inductor", "lamp")


def measure(model_folder: str, backend: str, context: int, device: str) -> dict[str, Any]:
    """Compile one forward in this process."""
    model = load.load_model(model_folder, device=device)
    vocabulary = model.config.vocab_size
    ids = torch.randint(vocabulary, (1, context), generator=torch.Generator().manual_seed(0)).to(device)
    chosen = lamp_compile.backend() if backend == "lamp" else backend
    compiled = torch.compile(model, backend=chosen, fullgraph=True)

    def call() -> float:
        began = time.perf_counter()
        with torch.no_grad():
            compiled(input_ids=ids, use_cache=False)
        if device != "cpu":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    first, later = call(), call()
    rewritten = len(chosen.reports[-1].rewritten) if backend == "lamp" else 0
    return {"seconds": first - later, "call_seconds": later, "rewritten": rewritten}


def measure_cold(args: argparse.Namespace, backend: str) -> dict[str, Any]:
    """Compile in a new process with empty caches."""
    with tempfile.TemporaryDirectory() as folder:
        empty = {"TORCHINDUCTOR_CACHE_DIR": folder, "TRITON_CACHE_DIR": f"{folder}/triton"}
        command = [sys.executable, __file__, args.model, "--context", str(args.context), "--device", args.device]
        done = subprocess.run(
            [*command, "--child", backend], env={**os.environ, **empty}, capture_output=True, text=True, check=False
        )
    if done.returncode:
        raise SystemExit(f"error: the {backend} run failed\n{done.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--limit", type=float, help="exit 1 when lamp takes more than this many times as long")
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    parser.add_argument("--child", choices=BACKENDS, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if args.child:
        print(json.dumps(measure(args.model, args.child, args.context, args.device)))
        return 0
    load.model_folder(args.model)
    runs: dict[str, list[dict[str, Any]]] = {backend: [] for backend in BACKENDS}
    for _ in range(args.repeats):
        for backend in BACKENDS:
            runs[backend].append(measure_cold(args, backend))
            last = runs[backend][-1]
            print(f"{backend:9s} {last['seconds']:6.1f} s, {last['rewritten']} sites rewritten", flush=True)
    if not runs["lamp"][0]["rewritten"]:
        raise SystemExit("error: the lamp backend rewrote nothing, so there is nothing to compare")
    median = {backend: statistics.median(run["seconds"] for run in runs[backend]) for backend in BACKENDS}
    least = {backend: min(run["seconds"] for run in runs[backend]) for backend in BACKENDS}
    ratio = median["lamp"] / median["inductor"]
    print(f"median: inductor {median['inductor']:.1f} s, lamp {median['lamp']:.1f} s: {ratio:.2f} times as long")
    print(f"least:  inductor {least['inductor']:.1f} s, lamp {least['lamp']:.1f} s")
    if args.out:
        data = {
            **environment(args.device),
            "model": Path(args.model).name,
            "context": args.context,
            "median_seconds": median,
            "least_seconds": least,
            "ratio": ratio,
            "runs": runs,
        }
        write_json(args.out, data)
    return 1 if args.limit is not None and ratio > args.limit else 0


if __name__ == "__main__":
    _script.run(main)
