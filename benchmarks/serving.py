"""A queue of requests with mixed lengths, served with 16, 64 and 128 streams by lamp and by what transformers has.

    python benchmarks/serving.py --shape 8b --shares-from results/DATE-decode_kernel-DEVICE.json --out
    python benchmarks/serving.py --model DIR --text FILE --streams 16 --out
    python benchmarks/serving.py --shape tiny --device cpu --streams 2,4 --requests 6

All requests wait from the start; prompt lengths are log-normal, answers go on to their length. Rows: lamp
(``fast.lamp.generate_many`` over a pool of pages), static (padded batches of similar prompt length, StaticCache, a
compiled step whose attention repeats no kv heads), hf_static (the same with transformers' SDPA), paged (transformers'
continuous batching with the pool and the streams of lamp). Compiling, recording and the first prompts are outside the
clock. On random weights the given shares of refined sub-tiles are imposed layer by layer. ``tokens_per_joule`` counts
the whole device.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import _models
import _real
import _requests
import _script
import _serve_lamp
import _serve_rivals
import torch
from _requests import Clock, Request, Served
from _timing import Energy, release
from decode_kernel import ASSUMED, attempt, default_out
from torch._dynamo.utils import counters

from lamp_compile.frontends.huggingface import many
from lamp_compile.quality import load, windows
from lamp_compile.quality.environment import environment, write_json

ROWS = ("lamp", "static", "hf_static", "paged")
LAST = ("hf_static", "paged")
"""Rivals that may be slow or fail: after those of all cases."""


@dataclass
class Setup:
    """How a row serves."""

    streams: int
    pool: int
    mode: str
    shares: list[float] | None
    graphs: int
    row_seconds: float
    energy: Energy


class Bench:
    """What all rows share."""

    def __init__(self, args: argparse.Namespace, device: torch.device) -> None:
        self.args, self.device = args, device
        self.model = _models.build(args.shape, args.model, device)
        self.shares = None if args.model else args.shares or ASSUMED
        if args.shape:
            _spread_scores(self.model)
        self.energy = Energy(device)
        self.text = None
        if args.text:
            encode = None if args.text.endswith(".u16") else load.encoder(args.model)
            self.text = windows.token_ids(args.text, encode, vocabulary=self.vocabulary)

    @property
    def vocabulary(self) -> int:
        """Token ids there are."""
        return int(self.model.config.get_text_config(decoder=True).vocab_size)

    def queue(self, streams: int) -> list[Request]:
        """The requests of a case."""
        args = self.args
        count = args.requests or max(96, 4 * streams)
        longest = getattr(self.model.config, "max_position_embeddings", None) or 1 << 30
        longest = min(args.prompts[1], longest - args.outputs[1], len(self.text) if self.text is not None else 1 << 30)
        prompts = (min(args.prompts[0], longest), longest)
        sizes = _requests.lengths(count, prompts, args.median, args.sigma, args.outputs, args.seed)
        return _requests.make(sizes, self.vocabulary, self.text, args.seed)

    def row(self, streams: int, name: str) -> dict[str, Any]:
        """Build, warm, serve, check, forget."""
        torch._dynamo.reset()
        release(self.device)
        counters.clear()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        began, queue, args = time.monotonic(), self.queue(streams), self.args
        pool = args.pool or _requests.pool_for(queue, streams)
        setup = Setup(streams, pool, args.mode, self.shares, args.graphs, args.row_seconds, self.energy)
        clock = Clock(self.device, self.energy)
        served = self.serve(name, queue, setup, clock)
        made = {"name": name, "error": None, **summary(queue, served, clock), **_serve_rivals.graphs()}
        if self.device.type == "cuda":
            made["peak_memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
        if verify := served.extra.pop("check", None):
            made["check"] = attempt("check", verify)
        # Of every finished request, for the share of first tokens on which two rows agree.
        made |= served.extra | {"first_tokens": {index: tokens[0] for index, tokens in sorted(served.tokens.items())}}
        return made | {"row_seconds": round(time.monotonic() - began, 1)}

    def serve(self, name: str, queue: list[Request], setup: Setup, clock: Clock) -> Served:
        """The server called ``name``."""
        if name == "lamp":
            return _serve_lamp.serve(self.model, queue, setup, clock)
        if name == "paged":
            return _serve_rivals.serve_paged(self.model, queue, setup, clock)
        attention = _serve_rivals.PACKED if name == "static" else "sdpa"
        return _serve_rivals.serve_static(self.model, queue, setup, clock, attention)


def _spread_scores(model: Any) -> None:
    """Scale random query projections so that scores spread as those of real text: every share then has its tau."""
    config = model.config
    factor = _models.SCORE_SPREAD / (config.initializer_range**2 * config.hidden_size)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.mul_(factor)


def summary(queue: list[Request], served: Served, clock: Clock) -> dict[str, Any]:
    """Rates over the finished requests; a row that ran out of time has fewer of them."""
    made = sum(map(len, served.tokens.values()))
    done = [request for request in queue if request.index in served.tokens]
    seconds, joules = clock.seconds, clock.joules
    waits = [served.first[r.index] - served.admitted[r.index] for r in done if r.index in served.admitted]
    return {
        "requests": len(queue),
        "finished": len(done),
        "cut_short": len(done) < len(queue),
        "prompt_tokens": sum(request.length for request in done),
        "new_tokens": made,
        "as_long_as_asked": all(len(served.tokens[request.index]) == request.new for request in done),
        "seconds": seconds,
        "requests_per_s": len(done) / seconds,
        "tokens_per_s": made / seconds,
        "joules": joules,
        "tokens_per_joule": made / joules if joules else None,
        "requests_per_kilojoule": 1e3 * len(done) / joules if joules else None,
        "ttft_median_s": _requests.median([served.first[r.index] for r in done if r.index in served.first]),
        "ttft_after_admission_median_s": _requests.median(waits),
        "steps": served.steps or None,
        "idle_share": 1 - served.busy / served.slot_steps if served.slot_steps else None,
        "kv_gb": served.kv_bytes / 1e9 if served.kv_bytes else None,
        "kv_tokens": served.kv_tokens,
        "peak_memory_gb": None,
    }


def compare(rows: list[dict[str, Any]]) -> None:
    """Ratios to the rivals of the same case, and how often the first token is the same."""
    named = {(row["case"], row["name"]): row for row in rows if "seconds" in row}
    for (case, _), row in named.items():
        for name in ROWS[1:]:
            other = named.get((case, name))
            for key in ("requests_per_s", "tokens_per_s", "tokens_per_joule"):
                measured = other and row[key] is not None and other[key]
                row[f"{key}_to_{name}"] = row[key] / other[key] if other and measured else None
            shared = set(row["first_tokens"]) & set(other["first_tokens"]) if other else ()
            same = sum(row["first_tokens"][i] == other["first_tokens"][i] for i in shared) if other else 0
            row[f"same_first_token_as_{name}"] = same / len(shared) if shared else None


def line(row: dict[str, Any]) -> str:
    """One row as printed."""
    if "seconds" not in row:
        return f"{row['case']:12s} {row['name']:10s} failed: {row['failed'][:120]}"
    keys = (
        "requests_per_s",
        "tokens_per_s",
        "tokens_per_joule",
        "ttft_median_s",
        "peak_memory_gb",
        "kv_gb",
        "idle_share",
    )
    forms = ("7.2f", "8.1f", "7.3f", "7.2f", "7.1f", "7.2f", "6.1%")
    words = [
        f"{row[k]:{f}}" if row[k] is not None else "-".rjust(int(f.split(".")[0]))
        for k, f in zip(keys, forms, strict=True)
    ]
    tail = f"{row['finished']}/{row['requests']}, graphs {row['graphs']}, skips {row['cudagraph_skips']}"
    if row.get("refined_share") is not None:
        tail += f", refined {row['refined_share']:.1%}"
    if "host_waits_share" in row:
        tail += (
            f", host {row['host_ms_per_prompt']:.1f} ms a prompt, {row['host_ms_per_step']:.1f} a step, "
            f"waits {row['host_waits_share']:.0%}"
        )
    if "check" in row:
        ok = row["check"].get("ok", False)
        tail += ", not checked" if ok is None else ", checked" if ok else f", CHECK FAILED: {row['check']}"
    return f"{row['case']:12s} {row['name']:10s} {' '.join(words)}  {tail}, {row['row_seconds']:.0f} s"


def heading() -> str:
    """Of the table."""
    return f"{'case':12s} {'name':10s}   req/s    tok/s   tok/J  TTFT s peak GB   KV GB   idle"


def jobs(streams: list[int], names: list[str]) -> list[tuple[int, str]]:
    """In which order rows are made: what matters most first."""
    early = [(count, name) for count in streams for name in names if name not in LAST]
    return early + [(count, name) for name in names if name in LAST for count in streams]


def _range(text: str) -> tuple[int, int]:
    low, high = (int(word) for word in text.split(":"))
    if not 0 < low <= high:
        raise argparse.ArgumentTypeError(f"{text!r} is no range")
    return low, high


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(_models.SHAPES), help="random weights of this shape")
    parser.add_argument("--model", help="or the model of a folder")
    parser.add_argument("--text", help="for --model: prompts are slices of this; random ids otherwise")
    parser.add_argument("--streams", default="16,64,128", help="sequences at a time, comma-separated")
    parser.add_argument("--rows", default=",".join(ROWS), help=f"which of {', '.join(ROWS)}")
    parser.add_argument("--requests", type=int, help="in the queue; 4 for each stream and at least 96")
    parser.add_argument("--prompts", type=_range, help="shortest:longest prompt (64:8192; tiny 8:96)")
    parser.add_argument("--median", type=float, help="of prompt lengths before they are clipped (1024; tiny 32)")
    parser.add_argument("--sigma", type=float, default=1.0, help="of the logarithm of prompt lengths")
    parser.add_argument("--outputs", type=_range, help="fewest:most new tokens (32:512; tiny 4:12)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pool", type=int, help="tokens of lamp's and the paged pool; what the queue needs otherwise")
    parser.add_argument("--graphs", type=int, default=3, help="capacities of static caches in a row, each compiled")
    parser.add_argument("--shares", type=_real.parse_shares, help="refined shares of layers, in turn: 0.05,0.1")
    parser.add_argument("--shares-from", type=Path, help="take them from the JSON of decode_kernel.py")
    parser.add_argument("--behind", type=int, help="launches that lamp's loop prepares ahead of a GPU (2)")
    parser.add_argument("--mode", help="eager, default or reduce-overhead (the default on CUDA)")
    parser.add_argument(
        "--row-seconds", type=float, default=120.0, help="served seconds after which a row is cut short"
    )
    parser.add_argument("--budget", type=float, default=1e9, help="seconds after which no row is begun")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--keep", type=Path, help="JSON of an earlier run whose rows of other cases stay")
    parser.add_argument("--out", nargs="?", const="", help="write JSON; without a name under results/")
    args = parser.parse_args(argv)
    if bool(args.shape) == bool(args.model):
        parser.error("one of --shape and --model")
    if args.text and not args.model:
        parser.error("--text needs --model")
    if unknown := set(args.rows.split(",")) - set(ROWS):
        parser.error(f"unknown rows: {', '.join(sorted(unknown))}")
    tiny = args.shape == "tiny"
    args.prompts = args.prompts or ((8, 96) if tiny else (64, 8192))
    args.median = args.median or (32 if tiny else 1024)
    args.outputs = args.outputs or ((4, 12) if tiny else (32, 512))
    args.mode = args.mode or ("reduce-overhead" if args.device.startswith("cuda") else "eager")
    if args.shares_from:
        args.shares = [float(share) for share in json.loads(args.shares_from.read_text(encoding="utf-8"))["shares"]]
    return args


def main(argv: list[str] | None = None) -> int:
    args, began = parse(argv), time.monotonic()
    many.UNREAD = many.UNREAD if args.behind is None else args.behind
    device = load.checked_device(args.device)
    head = environment(args.device)
    out = None if args.out is None else Path(args.out) if args.out else default_out("serving", head["device"])
    bench = Bench(args, device)
    what = args.shape or Path(args.model).name
    asked = {key: getattr(args, key) for key in ("prompts", "median", "sigma", "outputs", "seed", "mode", "graphs")}
    data: dict[str, Any] = {**head, "model": what, **asked, "shares": bench.shares, "text": bool(args.text)}
    data["stop"] = "no end-of-sequence token: every answer goes on to its length"
    cases = [int(count) for count in args.streams.split(",")]
    rows: list[dict[str, Any]] = []
    if args.keep:
        kept = json.loads(args.keep.read_text(encoding="utf-8"))["rows"]
        rows += [row for row in kept if row["case"] not in [f"{count} streams" for count in cases]]
    print(f"{what} on {head['device']}, mode {args.mode}; shares imposed: {bench.shares}\n{heading()}", flush=True)
    for streams, name in jobs(cases, args.rows.split(",")):
        case = f"{streams} streams"
        if time.monotonic() - began > args.budget:
            row = {"case": case, "name": name, "failed": "out of budget"}
        else:
            row = {"case": case, **attempt(name, lambda s=streams, n=name: bench.row(s, n))}
        rows.append(row)
        print(line(row), flush=True)
        compare(rows)
        if out:
            write_json(out, data | {"rows": rows})
    print("\n".join(["", heading(), *(line(row) for row in sorted(rows, key=lambda r: int(r["case"].split()[0])))]))
    return 0


if __name__ == "__main__":
    _script.run(main)
