"""Decoded tokens per second, eager and compiled, with and without lamp_compile, as they are.

    OMP_WAIT_POLICY=PASSIVE python benchmarks/decode_speed.py MODEL TEXT --context 1024 --out results.json

MODEL is a local folder (safetensors), TEXT a UTF-8 file or *.u16 token ids. A step's time is the median of the times
between tokens that a greedy ``generate`` streams, so that neither prefill nor compilation counts; the four ways take
turns. The compiled and the eager way must write the same tokens.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from pathlib import Path
from typing import Any

import _script
import torch
from transformers import CompileConfig

import lamp_compile
from lamp_compile.quality import load
from lamp_compile.quality.environment import environment, write_json

WAYS = ("uncompiled eager", "uncompiled Inductor", "lamp eager", "lamp Inductor")
"""The second is transformers' static cache with torch.compile."""


def settings(model: Any, way: str) -> tuple[Any, dict[str, Any]]:
    """The model that runs this way, and what its ``generate`` is given."""
    if way.startswith("lamp"):
        return lamp_compile.compile(model, mode="eager" if way.endswith("eager") else "default"), {}
    if way.endswith("eager"):
        return model, {}
    config = CompileConfig(mode="default", fullgraph=True)
    config._compile_all_devices = True
    return model, {"cache_implementation": "static", "compile_config": config}


class Clock:
    """A streamer of transformers that notes when each token came."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        """Called with the prompt, then with each token; tokens are on the CPU by then."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Called once at the end."""

    def steps(self) -> list[float]:
        """Seconds between tokens; the first one waits for the prefill and is left out."""
        return [later - earlier for earlier, later in itertools.pairwise(self.times[2:])]


def generate(model: Any, prompt: torch.Tensor, tokens: int, given: dict[str, Any]) -> tuple[list[float], list[int]]:
    """Seconds of each step, and the tokens, of one greedy generation of exactly ``tokens`` tokens."""
    clock = Clock()
    out = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False,
        pad_token_id=0, streamer=clock, **given,
    )  # fmt: skip
    return clock.steps(), out[0, prompt.shape[1] :].tolist()


def measure(model: Any, prompt: torch.Tensor, tokens: int, repeats: int) -> list[dict[str, Any]]:
    """One row per way."""
    ready = {way: settings(model, way) for way in WAYS}
    texts = {way: generate(fast, prompt, tokens, given)[1] for way, (fast, given) in ready.items()}  # warm
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(repeats):
        for way, (fast, given) in ready.items():
            seconds[way] += generate(fast, prompt, tokens, given)[0]
    rows = []
    for way in WAYS:
        step = statistics.median(seconds[way])
        same = sum(a == b for a, b in zip(texts[way], texts["uncompiled eager"], strict=True)) / tokens
        rows.append({"name": way, "ms_per_token": step * 1e3, "tokens_per_s": 1 / step, "same_tokens": same})
    if texts["lamp eager"] != texts["lamp Inductor"]:
        raise SystemExit("error: lamp writes other tokens compiled than eager")
    return rows


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("text")
    parser.add_argument("--context", type=int, default=512, help="prompt tokens")
    parser.add_argument("--tokens", type=int, default=34)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="write the rows as JSON")
    args = parser.parse_args(argv)
    if args.tokens < 4:
        parser.error("--tokens must be at least 4")
    model = load.load_model(args.model, device=args.device)
    prompt = load.load_windows(model, args.model, args.text, args.context, 1).to(args.device)
    rows = measure(model, prompt, args.tokens, args.repeats)
    head = environment(args.device)
    print(f"{Path(args.model).name}, {args.context} tokens of context on {head['device']}")
    for row in rows:
        print(f"{row['name']:20s} {row['ms_per_token']:8.2f} ms a token {row['tokens_per_s']:8.1f} tokens/s")
    if args.out:
        data = {**head, "model": Path(args.model).name, "context": args.context, "rows": rows}
        write_json(args.out, data)
    return 0


if __name__ == "__main__":
    _script.run(main)
