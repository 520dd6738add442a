"""What a KV cache of few bits costs where it is hard: `lamp_compile/quality/tasks`, and the build-up over layers.

    python benchmarks/hard_tasks.py MODEL TEXT --samples 8 --samples retrieval=32 --device cuda --out results.json

MODEL is a local folder (safetensors, with its tokenizer), TEXT a UTF-8 file or *.u16 token ids. Every row is one
forward per sample on the real cache and operators, compared with the uncompiled model in float32.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import _script

import lamp_compile
from lamp_compile.quality import hard, load, tasks, windows
from lamp_compile.quality.engine import CompiledEngine
from lamp_compile.quality.environment import environment, write_json
from lamp_compile.quality.tasks._base import Material


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("text")
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--samples", action="append", default=[], help="N for all tasks, or TASK=N")
    parser.add_argument("--tasks", nargs="+", default=list(tasks.all_tasks()), help="which (default: all)")
    parser.add_argument("--layer-windows", type=int, default=2, help="windows for the build-up over layers; 0: none")
    parser.add_argument("--preset", default="balanced")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="write the rows as JSON")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    counts: dict[str, int] = {"": 4}
    for given in args.samples:
        name, _, number = given.rpartition("=")
        counts[name] = int(number)
    chosen = [tasks.get(name) for name in args.tasks]
    model = load.load_model(args.model, device=args.device)
    encode = load.encoder(args.model)
    ids = windows.token_ids(args.text, encode, vocabulary=model.config.vocab_size)
    engine = CompiledEngine(lamp_compile.compile(model, mode="eager", preset=args.preset))
    data: dict[str, Any] = {
        **environment(args.device),
        "model": Path(args.model).resolve().name,
        "text": Path(args.text).name,
        "context": args.context,
        "preset": args.preset,
        "samples": {task.name: counts.get(task.name, counts[""]) for task in chosen},
        "rows": [],
        "layers": [],
    }
    for task in chosen:
        material = Material(model, ids, encode, args.context, data["samples"][task.name])
        rows = hard.measure(task, material, engine)
        print(hard.table(rows), flush=True)
        data["rows"] += [row.to_dict() for row in rows]
    if args.layer_windows:
        cut = windows.spread(ids, args.context, args.layer_windows, where=args.text)
        built_up = hard.layers(cut, model, engine)
        print(hard.layers_table(built_up), flush=True)
        data["layers"] = [row.to_dict() for row in built_up]
    if args.out:
        write_json(args.out, data)
    return 0


if __name__ == "__main__":
    _script.run(main)
