"""A whole decode step: transformers' two ways, a near-roofline in bf16, and lamp, in one run.

    python benchmarks/decode_model.py --shape 8b --shares-from results/DATE-decode_kernel-DEVICE.json --out
    python benchmarks/decode_model.py --model DIR --text FILE --cases 16x4096 --out

Of each case BATCHxLENGTH the caches have room for LENGTH tokens and are full but for the last steps, which are timed. A
shape has random weights and random planes, on which the given shares of refined sub-tiles are imposed layer by layer; a
model with a text reads the text and keeps the default tau. Rows: hf_eager (DynamicCache, SDPA), hf_static (StaticCache,
torch.compile), roofline (the same with unmasked SDPA and no repeated heads), roofline_joined (that with one product for
the linear layers of each input, which lamp has by default on CUDA), lamp (and what a token takes in generate() itself).
With --targets it exits 1 when a target is missed.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from pathlib import Path
from typing import Any

import _models
import _real
import _script
import torch
from _models import Decoder, Size
from _planes import Case
from _timing import Energy, release, synchronize
from decode_kernel import ASSUMED, attempt, default_out
from torch._dynamo.utils import counters

from lamp_compile.options import JOIN
from lamp_compile.quality import load
from lamp_compile.quality.environment import environment, write_json
from lamp_compile.runtime import guard

ROWS = ("roofline", "lamp", "roofline_joined", "hf_eager", "hf_static")
# Weights that a row has joined stay where they lie. The rows after it, and all of the next case, read them there as
# separate products: the same work over slices of one tensor.
MOST_STEPS = 128
WARM_STEPS = 6
ROOM = {"lamp": 0.52, "roofline": 1.0, "roofline_joined": 1.0, "hf_eager": 1.03, "hf_static": 1.12}
"""Memory of a row's keys and values over those of bf16, to leave out what cannot fit."""


class Bench:
    """What all rows share."""

    def __init__(self, args: argparse.Namespace, device: torch.device, shares: list[float]) -> None:
        self.args, self.device, self.shares = args, device, shares
        self.model = _models.build(args.shape, args.model, device)
        self.energy = Energy(device)
        self.rows: list[dict[str, Any]] = []

    def row(self, case: Case, name: str) -> dict[str, Any]:
        """Build, warm, measure, forget."""
        torch._dynamo.reset()
        release(self.device)
        if lack := self.lack(case, name):
            return {"name": name, "failed": lack}
        counters.clear()
        before = 0
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        size = Size(case.batch, case.length, case.length - min(MOST_STEPS, case.length // 4))
        began = time.monotonic()
        with torch.no_grad():
            decoder = self.decoder(name, size)
            shared = _models.UNMASKED if name.startswith("roofline") else "sdpa"
            with _models.attention(self.model, shared):
                if name == "lamp" and not self.args.text:
                    impose(decoder, self.shares)
                made = self.measure(decoder)
        kv = cache_bytes(decoder.cache)
        made |= {"name": name, "kv_gb": kv / 1e9, "kv_share_of_bf16": kv / self.kv_bytes(case), "error": None}
        if self.device.type == "cuda":
            made["peak_memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
        if name == "lamp":
            made["generate_ms"] = generated(decoder)
            made["fused"] = "fused_attention" in decoder.model.lamp.report().after
        made |= {
            "gb_before": before / 1e9,
            "cudagraph_skips": int(counters["inductor"]["cudagraph_skips"]),
            "graphs": int(counters["stats"]["unique_graphs"]),
            "graph_breaks": sum(counters["graph_break"].values()),
            "row_seconds": round(time.monotonic() - began, 1),
        }
        return made

    def decoder(self, name: str, size: Size) -> Decoder:
        """The way to decode called ``name``, with a filled cache."""
        text, mode = self.text(size), self.args.mode
        if name == "lamp":
            return _models.lamp(self.model, size, text, mode, self.args.join)
        if name == "roofline_joined":
            return _models.joined(self.model, size, text, mode)
        if name == "hf_eager":
            return _models.eager(self.model, size, text)
        return _models.static(self.model, size, text, mode, masked=name == "hf_static")

    def text(self, size: Size) -> torch.Tensor | None:
        """Windows of the text, one per sequence."""
        if not self.args.text:
            return None
        return load.load_windows(self.model, self.args.model, self.args.text, size.length, size.batch).to(self.device)

    def measure(self, decoder: Decoder) -> dict[str, Any]:
        """Median time and energy of a step over windows of steps."""
        decoder.begin()
        for _ in range(min(WARM_STEPS, decoder.size.steps)):
            decoder.step()
        synchronize(self.device)
        decoder.begin()
        began = time.perf_counter()
        decoder.step()
        synchronize(self.device)
        steps = min(decoder.size.steps, max(2, math.ceil(self.args.seconds / (time.perf_counter() - began))))
        reset_statistics(decoder)
        seconds, joules = [], []
        for _ in range(self.args.windows):
            decoder.begin()
            synchronize(self.device)
            used, began = self.energy.joules(), time.perf_counter()
            for _ in range(steps):
                decoder.step()
            synchronize(self.device)
            seconds.append((time.perf_counter() - began) / steps)
            if used is not None:
                joules.append(((self.energy.joules() or used) - used) / steps / decoder.size.batch)
        step = statistics.median(seconds)
        shares = layer_shares(decoder)
        return {
            "ms": step * 1e3,
            "tokens_per_s": decoder.size.batch / step,
            "joule_per_token": statistics.median(joules) if joules else None,
            "refined_share": statistics.fmean(shares) if shares else None,
            "layer_shares": [round(share, 4) for share in shares],
            "steps": steps,
            "ms_of_windows": [s * 1e3 for s in seconds],
        }

    def kv_bytes(self, case: Case) -> int:
        """Bytes of keys and values in bf16."""
        config = self.model.config
        dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return 4 * config.num_hidden_layers * config.num_key_value_heads * dim * case.tokens

    def lack(self, case: Case, name: str) -> str:
        """Why a row cannot fit into the device's memory; empty if it can."""
        if self.device.type != "cuda":
            return ""
        total = torch.cuda.get_device_properties(self.device).total_memory
        weights = sum(p.numel() * p.element_size() for p in self.model.parameters())
        needed = weights + self.kv_bytes(case) * ROOM[name]
        return f"needs about {needed / 1e9:.0f} GB, the device has {total / 1e9:.0f}" if needed > 0.97 * total else ""


def generated(decoder: Decoder) -> float | None:
    """Milliseconds that one more token of ``generate`` itself takes: a longer generation less a shorter one."""
    few, many = decoder.size.steps // 4, decoder.size.steps - 1

    def run(tokens: int) -> float:
        decoder.begin()
        synchronize(decoder.ids.device)
        began = time.perf_counter()
        decoder.model.generate(
            decoder.ids, attention_mask=torch.ones_like(decoder.ids), past_key_values=decoder.cache,
            max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0,
        )  # fmt: skip
        synchronize(decoder.ids.device)
        return time.perf_counter() - began

    try:
        run(few)
        return (run(many) - run(few)) / (many - few) * 1e3
    except Exception as problem:  # noqa: BLE001  (the steps were measured all the same)
        print(f"generate failed: {type(problem).__name__}: {str(problem)[:300]}", flush=True)
        return None


def nested(decoder: Decoder) -> list[Any]:
    """The cache layers that hold planes."""
    return [layer for layer in decoder.cache.layers if hasattr(layer, "stats")]


def reset_statistics(decoder: Decoder) -> None:
    """Count refined sub-tiles from here on."""
    for layer in nested(decoder):
        layer.stats.zero_()


def layer_shares(decoder: Decoder) -> list[float]:
    """Share of live sub-tiles refined since, per layer."""
    counts = [layer.stats.sum((0, 1)).tolist() for layer in nested(decoder)]
    return [count[guard.REFINED] / max(1, count[guard.LIVE]) for count in counts]


def impose(decoder: Decoder, shares: list[float], rounds: int = 14) -> None:
    """Bisect tau of every layer at once, until layer i refines share ``i`` modulo their number."""
    layers = nested(decoder)
    low, high = [math.log(1e-7)] * len(layers), [0.0] * len(layers)
    for _ in range(rounds):
        middle = [(a + b) / 2 for a, b in zip(low, high, strict=True)]
        for layer, value in zip(layers, middle, strict=True):
            decoder.model.lamp.controls.set(tau=math.exp(value), sites=layer.name)
        decoder.begin()
        reset_statistics(decoder)
        for _ in range(2):
            decoder.step()
        for index, share in enumerate(layer_shares(decoder)):
            if share > shares[index % len(shares)]:
                low[index] = middle[index]
            else:
                high[index] = middle[index]


def cache_bytes(cache: Any) -> int:
    """Bytes of keys and values, scales included, as allocated."""
    if hasattr(cache, "nbytes"):
        return int(cache.nbytes)
    return sum(x.numel() * x.element_size() for layer in cache.layers for x in (layer.keys, layer.values))


def compare(rows: list[dict[str, Any]]) -> None:
    """Ratios of lamp and the others to each other, within a case."""
    named = {(row["case"], row["name"]): row["ms"] for row in rows if "ms" in row}
    for row in rows:
        if "ms" not in row:
            continue
        for name in ("roofline", "roofline_joined", "hf_eager", "hf_static"):
            other = named.get((row["case"], name))
            row[f"ratio_to_{'bf16' if name == 'roofline' else name}"] = other and other / row["ms"]
        row["ratio_to_fp8"] = None


def targets(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The project's targets for a whole step of the 8B shape; nothing measured is nothing met."""
    named = {row["case"]: row for row in rows if row["name"] == "lamp" and "ms" in row}
    large, short = named.get("16x32768", {}), named.get("32x8192", {})
    found: list[dict[str, Any]] = []

    def check(text: str, measured: float | None, limit: float, at_most: bool = True) -> None:
        met = measured is not None and (measured <= limit if at_most else measured >= limit)
        found.append({"target": text, "measured": measured, "limit": limit, "met": met})

    check("16x32768: ms a step", large.get("ms"), 11.0)
    check("32x8192: times the near-roofline", short.get("ratio_to_bf16"), 1.5, False)
    check("32x8192: times hf_eager", short.get("ratio_to_hf_eager"), 5.0, False)
    check("32x8192: times hf_static", short.get("ratio_to_hf_static"), 5.0, False)
    check("16x32768: peak memory, GB", large.get("peak_memory_gb"), 55.0)
    check("16x32768: J a token", large.get("joule_per_token"), 0.50)
    check("16x32768: KV memory over bf16's", large.get("kv_share_of_bf16"), 0.52)
    skips = [row["cudagraph_skips"] for row in named.values()]
    check("lamp: CUDA graphs skipped", max(skips, default=None), 0)
    return found


def line(row: dict[str, Any]) -> str:
    """One row as printed."""
    if "ms" not in row:
        return f"{row['case']:10s} {row['name']:15s} failed: {row['failed'][:100]}"
    numbers = [row.get("joule_per_token"), row.get("peak_memory_gb"), row.get("kv_share_of_bf16"), row["refined_share"]]
    forms = ("7.3f", "7.1f", "7.1%", "8.1%")
    words = ["-".rjust(int(f.split(".")[0])) if n is None else f"{n:{f}}" for n, f in zip(numbers, forms, strict=True)]
    tail = f"skips {row['cudagraph_skips']}, graphs {row['graphs']}, {row['row_seconds']:.0f} s"
    tail += f", generate {row['generate_ms']:.2f} ms" if row.get("generate_ms") else ""
    tail += {True: ", fused", False: ", not fused", None: ""}[row.get("fused")]
    return f"{row['case']:10s} {row['name']:15s} {row['ms']:9.2f} {row['tokens_per_s']:10.1f} {' '.join(words)}  {tail}"


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(_models.SHAPES), help="random weights of this shape")
    parser.add_argument("--model", help="or the model of a folder")
    parser.add_argument("--text", help="for --model: fill the caches by reading this")
    parser.add_argument("--cases", default="16x32768,32x8192,16x8192,1x8192", help="BATCHxLENGTH, comma-separated")
    parser.add_argument("--rows", default=",".join(ROWS), help=f"which of {', '.join(ROWS)}, in this order")
    parser.add_argument("--shares", type=_real.parse_shares, help="refined shares of layers, in turn: 0.05,0.1")
    parser.add_argument("--shares-from", type=Path, help="take them from the JSON of decode_kernel.py")
    parser.add_argument("--mode", help="eager, default or reduce-overhead (the default on CUDA)")
    parser.add_argument("--join", choices=JOIN, default="auto", help="join_linears of the lamp row")
    parser.add_argument("--seconds", type=float, default=1.0, help="length of a window")
    parser.add_argument("--windows", type=int, default=3)
    parser.add_argument("--budget", type=float, default=1e9, help="seconds after which no row is begun")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--targets", action="store_true", help="exit 1 when a target is missed")
    parser.add_argument("--out", nargs="?", const="", help="write JSON; without a name under results/")
    args = parser.parse_args(argv)
    if bool(args.shape) == bool(args.model):
        parser.error("one of --shape and --model")
    if args.text and not args.model:
        parser.error("--text needs --model")
    if unknown := set(args.rows.split(",")) - set(ROWS):
        parser.error(f"unknown rows: {', '.join(sorted(unknown))}")
    args.mode = args.mode or ("reduce-overhead" if args.device.startswith("cuda") else "eager")
    return args


def main(argv: list[str] | None = None) -> int:
    args, began = parse(argv), time.monotonic()
    device = load.checked_device(args.device)
    shares = args.shares or ASSUMED
    if args.shares_from:
        shares = [float(share) for share in json.loads(args.shares_from.read_text(encoding="utf-8"))["shares"]]
    head = environment(args.device)
    out = None if args.out is None else Path(args.out) if args.out else default_out("decode_model", head["device"])
    what = args.shape or Path(args.model).name
    imposed = None if args.text else shares
    print(f"{what} on {head['device']}, mode {args.mode}; shares imposed: {imposed}", flush=True)
    print(f"{'case':10s} {'name':15s} {'ms':>9s} {'tokens/s':>10s}   J/tok peak GB      KV  refined", flush=True)
    bench = Bench(args, device, shares)
    data: dict[str, Any] = {**head, "model": what, "mode": args.mode, "join": args.join, "shares": imposed}
    for case in map(Case.parse, args.cases.split(",")):
        for name in args.rows.split(","):
            if time.monotonic() - began > args.budget:
                print(f"out of budget before {case.name} {name}", flush=True)
                continue
            row = {"case": case.name, **attempt(name, lambda c=case, n=name: bench.row(c, n))}
            bench.rows.append(row)
            print(line(row), flush=True)
            compare(bench.rows)
            data |= {"rows": bench.rows, "targets": targets(bench.rows)}
            if out:
                write_json(out, data)
    for item in data.get("targets", []) if args.shape == "8b" else []:
        measured = "not measured" if item["measured"] is None else f"{item['measured']:.3g}"
        print(f"{'met   ' if item['met'] else 'MISSED'} {item['target']}: {measured} (limit {item['limit']:g})")
    return 1 if args.targets and not all(item["met"] for item in data.get("targets", [{"met": False}])) else 0


if __name__ == "__main__":
    _script.run(main)
