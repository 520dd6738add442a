"""Decoding with ONNX Runtime on a CPU: LAMP artifacts against the plain export, GroupQueryAttention and torch.

    python benchmarks/onnx_decode.py --model DIR --text FILE --out

Two models: the one given, on a text, and one of four layers of 2,048 channels with random weights over planted keys
and values, whose tau is set so that as many sub-tiles are refined as a trained model refines (--share). Every way
starts from the same keys and values, is a process of its own, and takes its turn in rounds of a few steps; its time is
the median over rounds, and the logits of every timed step are held against torch's. A step appends one token.

GroupQueryAttention's int8 and int4 caches have static scales per channel, taken from the very keys and values that they
round: a control, better than a calibration, without look-ahead. With --targets it exits 1 when a target is missed.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import _cpu_machine
import _onnx_models
import _onnx_prompt
import _onnx_rows
import numpy as np
import torch
from decode_kernel import default_out

from lamp_compile.quality import load, windows
from lamp_compile.quality.environment import environment, write_json

ROOT = Path(__file__).resolve().parents[1]
MODEL, TEXT = ROOT / "examples" / "models" / "nano", ROOT / "examples" / "data" / "walden.txt"
PROMPT = 512
"""Tokens of the prompt."""
LONG = 4096
"""Cached tokens from which the native operators must pay."""
TARGETS = {
    "native from 4,096 cached tokens: times the plain export": 1.5,
    "native at any length: times the plain export": 0.95,
    "portable at any length: times the plain export": 0.6,
    "KV memory over float32's": 0.3,
}


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(MODEL), help="local folder (default: the packaged one)")
    parser.add_argument("--text", default=str(TEXT), help="UTF-8 file or *.u16 token ids")
    parser.add_argument("--models", default="given,wide", help="which of given, wide")
    parser.add_argument("--cached", default="512,1024,4096,8192", help="cached tokens, of the given model")
    parser.add_argument("--wide-cached", default="1024,4096,16384", help="of the wide one")
    parser.add_argument("--rows", default=",".join(_onnx_rows.ROWS), help="which rows")
    parser.add_argument("--share", type=float, default=0.1, help="refined share imposed on the wide model")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--burst", type=int, default=8, help="steps of a round")
    parser.add_argument("--folder", help="where artifacts are kept; a temporary one when left out")
    parser.add_argument("--out", nargs="?", const="", help="JSON; a name is made up when left out")
    parser.add_argument("--targets", action="store_true", help="exit 1 when a target is missed")
    return parser.parse_args(argv)


def run(args: argparse.Namespace, folder: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """All rows of all models, and those of a prompt."""
    names, found, prompts = args.rows.split(","), [], []
    for which in args.models.split(","):
        source = args.model if which == "given" else "wide"
        place = folder / which
        _onnx_models.make(source, place, names)
        lengths = [int(n) for n in (args.cached if which == "given" else args.wide_cached).split(",")]
        steps = args.rounds * args.burst + 64
        tokens, kv = place / "tokens.u16", ""
        if which == "given":
            encode = None if args.text.endswith(".u16") else load.encoder(args.model)
            ids = windows.token_ids(args.text, encode).numpy()[: max(lengths) + steps]
            lengths = [n for n in lengths if n + steps <= len(ids)]
            kv = str(_onnx_rows.keys_and_values(place, ids[: max(lengths)]))
        else:
            ids = np.random.default_rng(1).integers(0, _onnx_models.WIDE["vocab_size"], max(lengths) + steps)
        ids.astype("<u2").tofile(tokens)
        share = None if which == "given" else args.share
        task = _onnx_rows.Task(str(place), str(tokens), kv, args.threads, args.rounds, args.burst, share)
        print(f"\n{which}: {'text' if kv else f'planted, {args.share:.0%} refined'}\n{_onnx_rows.HEAD}", flush=True)
        for cached in lengths:
            for row in _onnx_rows.context(cached, task, names):
                print(_onnx_rows.line(row), flush=True)
                found.append({"model": which, **row})
        timed = _onnx_prompt.rows(place / "lamp.onnx", ids[:PROMPT].astype(np.int64), args.threads, names)
        prompts += [{"model": which, **row} for row in timed]
    return found, prompts


def targets(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each target with what was measured: the worst case counts."""

    def worst(name: str, key: str, least: int = 0) -> list[float]:
        return [row[key] for row in rows if row["name"] == name and row["cached"] >= least and row.get(key)]

    native, portable = "lamp_native", "lamp_portable"
    measured = [
        min(worst(native, "speed_over_plain", LONG), default=None),
        min(worst(native, "speed_over_plain"), default=None),
        min(worst(portable, "speed_over_plain"), default=None),
        max(worst(native, "kv_share_of_fp32") + worst(portable, "kv_share_of_fp32"), default=None),
    ]
    made = []
    for (name, limit), value in zip(TARGETS.items(), measured, strict=True):
        met = value is not None and (value <= limit if "memory" in name else value >= limit)
        made.append({"target": name, "limit": limit, "measured": value, "met": met})
    return made


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    torch.set_num_threads(args.threads)
    began, load_before = time.monotonic(), os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as temporary:
        rows, prompts = run(args, Path(args.folder or temporary))
    checked = targets(rows)
    for item in checked:
        value = "-" if item["measured"] is None else f"{item['measured']:.3g}"
        print(f"{'met   ' if item['met'] else 'missed'} {item['target']}: {value} (limit {item['limit']})")
    if args.out is not None:
        file = Path(args.out) if args.out else default_out("onnx_decode", "cpu")
        data = {
            **environment("cpu"), "machine": _cpu_machine.describe(), "threads": args.threads,
            "load_before": load_before, "load_after": os.getloadavg()[0], "about": _onnx_rows.ABOUT,
            "options": {k: v for k, v in vars(args).items() if k not in ("model", "text", "folder", "out")},
            "rows": rows, "prompts": prompts, "targets": checked, "seconds": round(time.monotonic() - began),
        }  # fmt: skip
        write_json(file, data)
    failed = any("failed" in row for row in rows)
    return 1 if failed or (args.targets and not all(item["met"] for item in checked)) else 0


if __name__ == "__main__":
    sys.exit(main())
