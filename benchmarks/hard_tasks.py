"""What a KV cache of few bits costs where it is hard: `lamp_compile/quality/tasks`, and the build-up over layers.

    python benchmarks/hard_tasks.py MODEL TEXT --samples 8 --samples retrieval=32 --device cuda --out results.json

MODEL is a local folder (safetensors, with its tokenizer), TEXT a UTF-8 file or *.u16 token ids. Every row is one
forward per sample on the real cache and operators, compared with the uncompiled model in float32. With --lookahead the
same for a look-ahead network, which may skip (--skip) sub-tiles.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import _script

import lamp_compile
from lamp_compile.plan import Plan
from lamp_compile.quality import hard, load, tasks, windows
from lamp_compile.quality.engine import CompiledEngine
from lamp_compile.quality.environment import environment, write_json
from lamp_compile.quality.network import row as network_row
from lamp_compile.quality.rows import RowSpec
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
    parser.add_argument("--rows", nargs="+", default=[spec.name for spec in hard.ROWS], help="which (default: all)")
    parser.add_argument("--lookahead", type=Path, help="a network, for rows of its own")
    parser.add_argument("--skip", type=float, nargs="*", default=[], help="masses that rows of the network may skip")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="write the rows as JSON")
    return parser.parse_args(argv)


class Planned(CompiledEngine):
    """An engine whose plan is another one."""

    def __init__(self, fast: Any, plan: Plan) -> None:
        super().__init__(fast)
        self._plan = plan

    @property
    def plan(self) -> Plan:
        return self._plan


def networks(model: Any, args: argparse.Namespace) -> Iterator[tuple[RowSpec, Planned]]:
    """The network of the arguments, without skipping and with."""
    if args.lookahead is None:
        return
    fast = lamp_compile.compile(model, mode="eager", preset=args.preset, lookahead=args.lookahead)
    served = network_row.served(fast.lamp.plan)
    for skip in (0.0, *args.skip):
        sites = tuple(replace(site, skip=skip) if site.name in served else site for site in fast.lamp.plan.sites)
        name = network_row.NAME + (f", skip {skip:g}" if skip else "")
        yield RowSpec(name), Planned(fast, replace(fast.lamp.plan, sites=sites))


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
        rows = hard.measure(task, material, engine, [spec for spec in hard.ROWS if spec.name in args.rows])
        for spec, predicting in networks(model, args):
            rows += hard.measure(task, material, predicting, [spec])
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
