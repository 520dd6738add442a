"""What a decode step costs with the controller beside it, with retries asked for, and with shadow steps, over the plain
one, in one run.

    OMP_WAIT_POLICY=PASSIVE python benchmarks/controller.py MODEL TEXT --context 4096 --out results.json

Blocks of decode steps over one cache, plain and the other way in turns; the cache is cropped after each, so that all
have the same context. ``ratio`` is the median over pairs of blocks, with the 95 % interval of that median by order
statistics. The controller's tau is held fast by its limits: what is measured is its readings, not what it decides.
``thread_share`` is the processor time of its thread over the time. Exit code 1 with ``--targets`` where the
controller costs more than 0.5 %, or blocks were too short for a reading.
"""

from __future__ import annotations

import argparse
import math
import statistics
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import _script
import torch

import lamp_compile
from lamp_compile.quality import load
from lamp_compile.quality.environment import environment, write_json
from lamp_compile.runtime.controller_thread import ControllerThread

MOST = 1.005
"""Ratio that the controller may cost."""
PINNED = 1e-6
WAYS = {"plain": {}, "controller": {}, "retry": {"guard_retry": True}, "shadow 1 %": {"shadow": 0.01}}


class Way:
    """One way to decode: a compiled model, its step, a filled cache, and what is switched on around a block."""

    def __init__(self, name: str, fast: Any, prompt: torch.Tensor, room: int) -> None:
        self.name, self.fast, self.context = name, fast, prompt.shape[1]
        self.token = prompt[:, -1:]
        self.cache = fast.lamp.cache(self.context + room)
        self.cache.unpadded = True
        config = fast.lamp.compile_config
        self.step: Callable[..., Any] = fast if config is None else fast.get_compiled_call(config)
        with torch.no_grad():
            fast(input_ids=prompt, past_key_values=self.cache, use_cache=True)

    def around(self) -> AbstractContextManager[Any]:
        """The controller, where this is its way."""
        if self.name != "controller":
            return nullcontext()
        tau = float(next(iter(self.fast.lamp.plan.sites)).tau)
        limits = {"tau_least": tau * (1 - PINNED), "tau_most": tau * (1 + PINNED)}
        control: AbstractContextManager[Any] = self.fast.lamp.control(error_budget=0.1, **limits)
        return control

    def block(self, steps: int) -> float:
        """Seconds of one step, over a block."""
        with torch.no_grad(), self.around():
            self._run(3)
            self._wait()
            began = time.perf_counter()
            self._run(steps)
            self._wait()
            seconds = (time.perf_counter() - began) / steps
        self.fast.lamp.controller = None  # a step looks after no controller then
        self.cache.crop(self.context)
        return seconds

    def _run(self, steps: int) -> None:
        for _ in range(steps):
            self.step(input_ids=self.token, past_key_values=self.cache, use_cache=True)

    def _wait(self) -> None:
        if self.token.device.type == "cuda":
            torch.cuda.synchronize()


class Watched:
    """Adds up the processor time that controller threads take."""

    def __init__(self) -> None:
        self.seconds, self.readings = 0.0, 0
        self._tick, self._lock = ControllerThread.tick, threading.Lock()

    def __enter__(self) -> Watched:
        watched, tick = self, self._tick

        def timed(thread: ControllerThread) -> bool:
            began = time.thread_time()
            try:
                return tick(thread)
            finally:
                with watched._lock:
                    watched.seconds += time.thread_time() - began
                    watched.readings += 1

        ControllerThread.tick = timed  # type: ignore[method-assign]
        return self

    def __exit__(self, *error: object) -> None:
        ControllerThread.tick = self._tick  # type: ignore[method-assign]


def interval(ratios: list[float]) -> tuple[float, float]:
    """95 % interval of the median, by order statistics."""
    ordered, n = sorted(ratios), len(ratios)
    reach = 1.96 * math.sqrt(n) / 2
    low, high = max(0, math.floor(n / 2 - reach)), min(n - 1, math.ceil(n / 2 + reach))
    return ordered[low], ordered[high]


def measure(model: Any, prompt: torch.Tensor, args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per way."""
    made = {}
    for name in args.ways:
        fast = lamp_compile.compile(model, mode=args.mode, **WAYS[name])
        made[name] = Way(name, fast, prompt, args.most_steps + 8)
        made[name].block(3)  # compiles
    plain = made["plain"]
    steps = max(4, min(args.most_steps, round(args.seconds / min(plain.block(16) for _ in range(3)))))
    rows = []
    for name in args.ways:
        if name == "plain":
            continue
        pairs = []
        with Watched() as watched:
            for turn in range(args.pairs):
                order = (plain, made[name]) if turn % 2 else (made[name], plain)
                times = {way.name: way.block(steps) for way in order}
                pairs.append((times["plain"], times[name]))
        ratios = [other / one for one, other in pairs]
        low, high = interval(ratios)
        busy = sum(other for _, other in pairs) * steps
        rows.append(
            {
                "name": name,
                "ms_plain": statistics.median(one for one, _ in pairs) * 1e3,
                "ms": statistics.median(other for _, other in pairs) * 1e3,
                "ratio": statistics.median(ratios),
                "ratio_low": low,
                "ratio_high": high,
                "steps": steps,
                "pairs": args.pairs,
                "readings": watched.readings,
                "thread_share": watched.seconds / busy,
            }
        )
        row = rows[-1]
        print(
            f"{name:12s} {row['ms_plain']:8.3f} -> {row['ms']:8.3f} ms a step, ratio {row['ratio']:.4f} "
            f"({low:.4f} to {high:.4f}), thread {row['thread_share']:.3%}, {row['readings']} readings",
            flush=True,
        )
    return rows


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("text")
    parser.add_argument("--context", type=int, default=1024, help="cached tokens")
    parser.add_argument("--mode", default="auto", help="as of lamp_compile.compile")
    parser.add_argument("--pairs", type=int, default=21)
    parser.add_argument("--seconds", type=float, default=1.0, help="of a block")
    parser.add_argument("--most-steps", type=int, default=1024)
    parser.add_argument("--ways", default=",".join(WAYS), type=lambda text: text.split(","))
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--targets", action="store_true", help="exit with 1 where the controller costs more than 0.5 %%"
    )
    parser.add_argument("--out", type=Path, help="write the rows as JSON")
    args = parser.parse_args(argv)
    if "plain" not in args.ways or not set(args.ways) <= set(WAYS):
        parser.error(f"--ways: plain, and any of {', '.join(WAYS)}")
    model = load.load_model(args.model, device=args.device)
    prompt = load.load_windows(model, args.model, args.text, args.context, 1).to(args.device)
    head = environment(args.device)
    print(f"{Path(args.model).name}, {args.context} tokens of context on {head['device']}")
    rows = measure(model, prompt, args)
    missed = [
        row["name"] for row in rows if row["name"] == "controller" and not (row["ratio"] <= MOST and row["readings"])
    ]
    if args.out:
        data = {**head, "model": Path(args.model).name, "context": args.context, "mode": args.mode, "rows": rows}
        write_json(args.out, {**data, "targets": [{"target": f"controller <= {MOST}", "met": not missed}]})
    return 1 if args.targets and missed else 0


if __name__ == "__main__":
    _script.run(main)
