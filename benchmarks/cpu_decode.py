"""Decoding on a CPU: the attention of one new token, and whole decode steps of a model, each against its rivals.

    python benchmarks/cpu_decode.py --model DIR --text FILE --out

Attention: lamp::append and lamp::fused_attention, as they are, against SDPA in float32 and bf16 (the fastest of several
calls), products in bf16, e4m3 keys and values (in plain torch: there for its error, no rival for speed), and ONNX
Runtime's GroupQueryAttention with float32, int8 and int4 caches where onnxruntime and onnx are installed. The refined
shares are those of the model's layers on the text, which take turns as layers do, and some fixed ones, imposed on
planted inputs (_planes.py). Every way goes through sets of inputs that the last-level cache does not hold together, as
the layers of a model do; a way's time is the median over rounds in which all ways take turns, and every timed output is
held against float64. Bytes are those that must be read; their share is of the bandwidth that the row "read" reaches,
which reads a buffer much larger than the cache and takes its turns with the others.

Prefill: the keys and values of a prompt stored and attended by all of its tokens, against SDPA over them as they are.

Model: every way decodes the text in a process of its own, and all take turns. A step is given the text's token, so that
what it would have written can be compared with the uncompiled model in float32: agreement is that of the timed steps.

What is not installed is skipped, and says so. With --targets it exits 1 when a target is missed.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import _cpu_attention
import _cpu_machine
import _cpu_model
import _cpu_ort
import _cpu_prefill
import _cpu_targets
import _real
import _script
import torch
from _cpu_ways import round_per_token
from _planes import Case, Shape
from _rivals import rounded_fp8
from decode_kernel import ASSUMED, default_out

import lamp_compile
from lamp_compile.quality import load
from lamp_compile.quality.environment import environment, write_json
from lamp_compile.runtime import kernels

ROOT = Path(__file__).resolve().parents[1]
MODEL, TEXT = ROOT / "examples" / "models" / "nano", ROOT / "examples" / "data" / "walden.txt"
PARTS = ("attention", "prefill", "model")
ROUNDED = {
    "fp8": round_per_token,
    "fp8 per head": rounded_fp8,
    "int8 per channel": _cpu_ort.round_per_channel(8),
    "int4 per channel": _cpu_ort.round_per_channel(4),
}
"""What is stored instead of bf16, for the errors on real data; attention over it is exact."""


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(MODEL), help="local folder (default: the packaged one)")
    parser.add_argument("--text", default=str(TEXT), help="UTF-8 file or *.u16 token ids")
    parser.add_argument("--parts", default=",".join(PARTS), help=f"which of {', '.join(PARTS)}")
    parser.add_argument("--cases", default="1x512,1x1024,1x4096,1x16384,1x65536", help="attention: BATCHxLENGTH")
    parser.add_argument("--fixed-at", default="1x512,1x4096,1x16384", help="cases that also run fixed shares")
    parser.add_argument("--rows", default=",".join(_cpu_attention.ROWS), help="attention: which rows")
    parser.add_argument("--shares", type=_real.parse_shares, help="refined shares to impose instead: 0.05,0.1")
    parser.add_argument("--context", type=int, default=4096, help="tokens read to measure shares and errors")
    parser.add_argument("--positions", type=int, default=16, help="decode steps measured in that")
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--group", type=int, default=4)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--prompts", default="128,512,1024,4096", help="prefill: tokens of a prompt")
    parser.add_argument("--contexts", default="512,1024,2048,4096", help="model: tokens of context")
    parser.add_argument("--model-rows", default=",".join(_cpu_model.ROWS), help="model: which rows")
    parser.add_argument("--steps", type=int, default=512, help="model: steps at most, and a quarter of the context")
    parser.add_argument("--no-generate", action="store_true", help="model: leave out what a token takes in generate()")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=0.15, help="attention: of one way in one round")
    parser.add_argument("--cache-mb", type=int, default=0, help="size of the last-level cache (default: as found)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--budget", type=float, default=1e9, help="seconds after which no case is begun")
    parser.add_argument("--targets", action="store_true", help="exit 1 when a target is missed")
    parser.add_argument("--out", nargs="?", const="", help="write JSON; without a name under results/")
    args = parser.parse_args(argv)
    for given, known in ((args.parts, PARTS), (args.rows, _cpu_attention.ROWS), (args.model_rows, _cpu_model.ROWS)):
        if unknown := {name for name in given.split(",") if name} - set(known):
            parser.error(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    return args


class Run:
    """One run: what it finds, written after every case."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.began = args, time.monotonic()
        torch.set_num_threads(args.threads)
        machine = _cpu_machine.describe()
        self.cache = args.cache_mb << 20 if args.cache_mb else _cpu_machine.cache_bytes()
        self.data: dict[str, Any] = environment("cpu")
        short = str(self.data["device"])
        self.data |= {"machine": machine, "threads": args.threads, "model": Path(args.model).name}
        self.data["kernel"] = kernels.why_not_device("cpu") or "native"
        self.data["package_mb"] = package_bytes() / 1e6
        self.out = None if args.out is None else Path(args.out) if args.out else default_out("cpu_decode", short)
        print(f"{machine['cpu']} ({', '.join(machine['isa'])}), {short}, cache {machine['cache_mb']:.0f} MB")
        print(", ".join(f"{name} {version}" for name, version in self.data["versions"].items() if version))
        print(f"lamp runs: {self.data['kernel']}; package {self.data['package_mb']:.2f} MB", flush=True)
        self.real: dict[str, Any] = {"rows": [], "layers": [], "shares": []}
        self.attention_rows: list[dict[str, Any]] = []
        self.prefill_rows: list[dict[str, Any]] = []
        self.model_rows: list[dict[str, Any]] = []

    def over(self, what: str) -> bool:
        """Whether the budget is spent."""
        if time.monotonic() - self.began <= self.args.budget:
            return False
        print(f"out of budget before {what}", flush=True)
        return True

    def limit(self) -> int:
        """Tokens that the model reads at once."""
        return int(load.load_model(self.args.model, device="cpu").config.max_position_embeddings)

    def measure_real(self, most: int) -> None:
        """Shares and errors on the model's own data."""
        args = self.args
        self.real = _real.measure_folder(
            args.model, args.text, min(args.context, most), 1, args.positions, torch.device("cpu"), ROUNDED
        )
        for row in self.real["rows"]:
            print(f"{row['case']:10s} {row['name']:17s} median error {row['error']:.2e}, mean {row['error_mean']:.2e}")

    def attention(self) -> None:
        """All cases of the attention step."""
        args = self.args
        reading = _cpu_machine.Reading(8 * self.cache)
        source = "given" if args.shares else "measured" if self.real["shares"] else "assumed"
        shares = args.shares or self.real["shares"] or ASSUMED
        self.data |= {
            "reading": {"by": reading.best, "tried": reading.tried, "bytes": reading.size},
            "shares": shares,
            "shares_are": source,
        }
        self.data |= {"shape": {"kv_heads": args.kv_heads, "group": args.group, "dim": args.dim}}
        print(f"shares ({source}): {', '.join(f'{share:.3f}' for share in shares)}\n{_cpu_attention.HEAD}", flush=True)
        bench = _cpu_attention.Bench(
            Shape(args.kv_heads, args.group, args.dim), shares, args.rounds, args.seconds, self.cache,
            reading, args.rows.split(","), args.fixed_at.split(","), self.attention_rows,
        )  # fmt: skip
        for case in dict.fromkeys(map(Case.parse, args.cases.split(","))):
            if self.over(case.name):
                break
            print("\n".join(map(_cpu_attention.line, bench.case(case))), flush=True)
            self.write()

    def prefill(self) -> None:
        """All prompts."""
        args = self.args
        print(_cpu_prefill.HEAD)
        for length in dict.fromkeys(map(int, args.prompts.split(","))):
            if self.over(f"a prompt of {length}"):
                break
            found = _cpu_prefill.rows(length, Shape(args.kv_heads, args.group, args.dim), args.rounds)
            print("\n".join(map(_cpu_prefill.line, found)), flush=True)
            self.prefill_rows += found
            self.write()

    def model(self, most: int) -> None:
        """All contexts of the whole decode step."""
        args = self.args
        config = load.load_model(args.model, device="cpu").config
        dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        per_token = 2 * 4 * config.num_hidden_layers * config.num_key_value_heads * dim
        task = _cpu_model.Task(args.model, args.text, args.threads, args.rounds, args.steps, not args.no_generate)
        bench = _cpu_model.Bench(task, per_token, args.model_rows.split(","), self.model_rows)
        print(f"{self.data['model']}, tokens of the text given\n{_cpu_model.HEAD}", flush=True)
        for length in dict.fromkeys(map(int, args.contexts.split(","))):
            if length > most:
                print(f"1x{length} is left out: the model reads {most} tokens", flush=True)
            elif not self.over(f"1x{length}"):
                print("\n".join(map(_cpu_model.line, bench.context(length))), flush=True)
                self.write()

    def write(self) -> None:
        """Everything so far."""
        rows = [{"part": "attention", **row} for row in self.attention_rows]
        rows += [{"part": "prefill", **row} for row in self.prefill_rows]
        rows += [{"part": "model", **row} for row in self.model_rows]
        known = [_cpu_model.agreement(self.model_rows, name) for name in _cpu_model.ROWS]
        self.data |= {
            "rows": [{"part": "real", **row} for row in self.real["rows"]] + rows,
            "real_layers": self.real["layers"],
            "agreement": [item for item in known if item],
            "break_even": _cpu_targets.break_even(self.attention_rows),
            "targets": _cpu_targets.targets(self.attention_rows, self.real["rows"], self.prefill_rows, self.model_rows),
        }
        if self.out:
            write_json(self.out, self.data)


def package_bytes() -> int:
    """Size of the package as installed, without what Python compiles."""
    folder = Path(lamp_compile.__file__).resolve().parent
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file() and "__pycache__" not in p.parts)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    before = torch.get_num_threads()
    try:
        with torch.no_grad():
            run, parts = Run(args), args.parts.split(",")
            most = run.limit()
            if "attention" in parts:
                run.measure_real(most)
                run.attention()
            if "prefill" in parts:
                run.prefill()
            if "model" in parts:
                run.model(most)
            run.write()
    finally:
        torch.set_num_threads(before)
    _cpu_targets.report(run.data)
    return 1 if args.targets and not all(item["met"] for item in run.data["targets"]) else 0


if __name__ == "__main__":
    _script.run(main)
