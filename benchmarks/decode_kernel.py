"""Attention of one new token: lamp against bf16 SDPA and an FP8 kernel, in one run, checked while it is timed.

    python benchmarks/decode_kernel.py --model DIR --text FILE --out

Every time is a captured CUDA graph's, replayed between events, over inputs that do not fit into the cache together.
Every output is held against float64. The refined shares are those of the model's layers on the text (or --shares), and
some fixed ones, imposed on planted inputs (_planes.py). With --targets it exits 1 when a target is missed.
"""

from __future__ import annotations

import argparse
import datetime
import statistics
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import _real
import _rivals
import _script
import torch
from _planes import Attention, Case, Inputs, Shape, importance, make
from _timing import cache_bytes, copy_bandwidth, milliseconds, release
from torch import Tensor

from lamp_compile.errors import LampError
from lamp_compile.quality.environment import environment, write_json
from lamp_compile.quality.load import checked_device
from lamp_compile.runtime import reference
from lamp_compile.runtime.arguments import Planes, Scores, Visibility

MAIN = "32x32768,1x131072,8x16384,16x32768,32x8192,1x16384"
SMALL = "1x4096,1x8192,4x4096,1x32768,8x4096,16x4096"
FIT = "1x65536,16x8192,16x16384,16x65536"
FIXED = (0.0, 0.02, 0.05, 0.1, 0.2, 1.0)
ASSUMED = [0.1]
"""Share where nothing was measured."""
MOST_SETS = 48
WEAK = 1.7
"""An FP8 rival below this many times bf16 is no rival."""
NEVER_SLOWER = 64 * 1024


@dataclass
class Bench:
    """What all cases share."""

    shape: Shape
    device: torch.device
    repeats: int
    shares: list[float]
    fixed_at: str
    bandwidth: float
    fixed: Sequence[float] = FIXED
    rows: list[dict[str, Any]] = field(default_factory=list)

    def case(self, case: Case) -> list[dict[str, Any]]:
        """All rows of one case; what fails is a row that says why."""
        release(self.device)
        inputs = make(case, self.shape, self.device)
        count = -(-3 * cache_bytes(self.device) // int(self.shape.bytes_touched(case, 0.0)))
        sets = [inputs] + [inputs.copy() for _ in range(min(MOST_SETS, count) - 1)]
        wanted = _rivals.references(inputs)
        rows = [attempt("bf16", lambda: _rivals.bf16(sets, self.repeats, wanted))]
        rows.append(attempt("fp8", lambda: _rivals.fp8(sets, self.repeats, wanted)))
        release(self.device)
        rows += self.lamp(sets, wanted, case)
        for row in rows:
            self.finish(row, case, rows)
        self.rows += rows
        return rows

    def lamp(self, sets: list[Inputs], wanted: dict[int, Tensor], case: Case) -> list[dict[str, Any]]:
        """A row for each layer's share, their mean first, and the fixed shares where they are asked for."""
        ranked = importance(sets[0])
        names = {f"lamp layer {index}": share for index, share in enumerate(self.shares)}
        fixed = self.fixed if case.name == self.fixed_at else ()
        names |= {"lamp all refined" if share >= 1 else f"lamp {share:.0%}": share for share in fixed}
        rows = []
        for name, share in names.items():
            check = name in ("lamp layer 0", "lamp all refined")
            run: Callable[[], dict[str, Any]] = lambda n=name, s=share, c=check: one_share(  # noqa: E731
                n, sets, s, ranked, self.repeats, wanted, c
            )
            rows.append(attempt(name, run))
        layers = [row for row in rows if row["name"].startswith("lamp layer") and "ms" in row]
        if len(layers) < len(self.shares):
            return [{"name": "lamp", "failed": "not every share ran"}, *rows]
        mean = {key: statistics.fmean(row[key] for row in layers) for key in ("ms", "refined_share", "error")}
        return [{"name": "lamp", **mean}, *rows]

    def finish(self, row: dict[str, Any], case: Case, rows: list[dict[str, Any]]) -> None:
        """Ratios to the rivals of the same case, and to what moving the bytes alone would take."""
        row["case"] = case.name
        if "ms" not in row:
            return
        for rival in ("bf16", "fp8"):
            other = next((r["ms"] for r in rows if r["name"] == rival and "ms" in r), None)
            row[f"ratio_to_{rival}"] = other and other / row["ms"]
        row.setdefault("refined_share", None)
        per_value = {"bf16": 4, "fp8": 2}.get(row["name"])
        touched = (
            self.shape.bytes_touched(case, row["refined_share"])
            if per_value is None
            else case.tokens * self.shape.kv_heads * self.shape.dim * per_value
        )
        row["floor_ms"] = touched / self.bandwidth / 1e6
        row["ratio_to_floor"] = row["ms"] / row["floor_ms"]


def attempt(name: str, run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A row, or why there is none."""
    try:
        return run()
    except Exception as problem:  # noqa: BLE001  (one rival that fails must not cost the run)
        traceback.print_exc(limit=-6)
        return {"name": name, "failed": f"{type(problem).__name__}: {str(problem)[:400]}"}


def one_share(
    name: str, sets: list[Inputs], share: float, ranked: Tensor, repeats: int, wanted: dict[int, Tensor], check: bool
) -> dict[str, Any]:
    """lamp at one share of refined sub-tiles."""
    op = Attention(sets[0])
    got = op.impose(sets[0], share, ranked)
    ms = milliseconds([lambda s=s: op(s) for s in sets], repeats, sets[0].q.device)
    out = op(sets[0])
    row = {"name": name, "ms": ms, "wanted_share": share, "refined_share": got, "error": _rivals.error(out, wanted)}
    if check:
        row["path"] = op.path(sets[0])
        row["error_to_reference"] = _rivals.error(out, {0: as_defined(sets[0], op)})
    return row


def as_defined(inputs: Inputs, op: Attention) -> Tensor:
    """What the reference makes of the first sequence, ``[H, Dv]``."""
    planes = Planes(*(p[:1] for p in inputs.planes))
    q, visible = inputs.q[:1], Visibility(int(inputs.k.shape[2]), causal="bottom_right")
    scores = Scores(q.shape[3] ** -0.5, rotation="hadamard", query_bits=8)
    seen = reference.look_ahead(q, planes.k_high, planes.k_scale, None, visible, scores, "nested8", "energy", 32)
    levels = reference.select(seen, op.tau[:1], op.floor, None, None, False)
    out, _, _ = reference.attend(q, planes, levels, None, None, visible, scores, "nested8", "nested8", 32)
    return out[0, :, 0].double()


def fits(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Cost of one more cached token, per batch size with three lengths or more: least squares over the lengths."""
    found = []
    named = {(row["case"], row["name"]): row["ms"] for row in rows if "ms" in row}
    cases = [Case.parse(name) for name, rival in named if rival == "bf16" and (name, "lamp") in named]
    for batch in sorted({case.batch for case in cases}):
        lengths = sorted({case.length for case in cases if case.batch == batch})
        if len(lengths) < 3:
            continue
        cost = {}
        for name in ("lamp", "bf16"):
            times = [named[f"{batch}x{length}", name] for length in lengths]
            cost[name] = statistics.linear_regression(lengths, times).slope * 1e6 / batch
        ratio = cost["lamp"] / cost["bf16"] if cost["bf16"] else None
        found.append({"batch": batch, "lengths": lengths, "ns_per_token": cost, "ratio": ratio})
    return found


def break_even(rows: list[dict[str, Any]]) -> int | None:
    """Cached tokens (batch times length) from which on no measured case is slower than bf16."""
    sizes: dict[int, float] = {}
    for row in rows:
        if row["name"] == "lamp" and row.get("ratio_to_bf16"):
            tokens = Case.parse(row["case"]).tokens
            sizes[tokens] = min(row["ratio_to_bf16"], sizes.get(tokens, row["ratio_to_bf16"]))
    found = None
    for tokens in sorted(sizes, reverse=True):
        if sizes[tokens] < 1:
            break
        found = tokens
    return found


def targets(
    rows: list[dict[str, Any]], fitted: list[dict[str, Any]], real: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """The project's targets for this kernel, each with what was measured; nothing measured is nothing met."""
    named = {(row.get("case"), row["name"]): row for row in rows}
    found: list[dict[str, Any]] = []

    def check(text: str, measured: float | None, limit: float, at_most: bool = False) -> None:
        met = measured is not None and (measured <= limit if at_most else measured >= limit)
        found.append({"target": text, "measured": measured, "limit": limit, "met": met})

    def ratio(case: str, name: str = "lamp", rival: str = "bf16") -> float | None:
        value: float | None = named.get((case, name), {}).get(f"ratio_to_{rival}")
        return value

    check("32x32768: times bf16", ratio("32x32768"), 2.8)
    check("32x32768: times fp8", ratio("32x32768", rival="fp8"), 1.5)
    check("1x131072: times bf16", ratio("1x131072"), 2.3)
    check("8x16384: times bf16", ratio("8x16384"), 2.0)
    check("32x32768, all refined: times bf16", ratio("32x32768", "lamp all refined"), 1.5)
    large = [row for row in rows if row["name"] == "lamp" and Case.parse(row["case"]).tokens > NEVER_SLOWER]
    slowest = [row.get("ratio_to_bf16") or 0.0 for row in large]
    check("never slower than bf16 above 64K cached tokens", min(slowest, default=None), 1.0)
    errors = {row["name"]: row["error"] for row in real}
    share = errors["lamp"] / errors["fp8"] if {"lamp", "fp8"} <= set(errors) and errors["fp8"] else None
    check("error on real data over that of fp8", share, 1.0, True)
    for batch in (1, 16):
        cost = next((item["ratio"] for item in fitted if item["batch"] == batch), None)
        check(f"batch {batch}: cost of one more token over bf16's", cost, 0.36, True)
    rival = ratio("32x32768", "fp8")
    check("the fp8 rival is one (32x32768: times bf16)", rival, WEAK)
    return found


def line(row: dict[str, Any]) -> str:
    """One row as printed."""
    if "ms" not in row:
        return f"{row['case']:10s} {row['name']:17s} failed: {row['failed'][:90]}"
    share = "" if row["refined_share"] is None else f"{row['refined_share']:.1%}"
    ratios = [f"{row[key]:6.2f}" if row.get(key) else "     -" for key in ("ratio_to_bf16", "ratio_to_fp8")]
    how = row.get("backend") or row.get("config") or row.get("path") or ""
    return (
        f"{row['case']:10s} {row['name']:17s} {row['ms']:9.4f} {' '.join(ratios)} {share:>7s} {row['error']:9.2e} "
        f"{row['ratio_to_floor']:6.2f} {how}"
    )


def measured(args: argparse.Namespace, device: torch.device) -> dict[str, Any] | None:
    """What the model's own data gives; None, and why, where it fails: the planted cases can run without it."""
    try:
        return _real.measure_folder(
            args.model, args.text, args.context, args.windows, args.positions, device, tau=args.tau
        )
    except LampError:
        raise
    except Exception as problem:  # noqa: BLE001
        traceback.print_exc(limit=-6)
        print(f"real data failed: {type(problem).__name__}: {problem}", flush=True)
        return None


def report(data: dict[str, Any]) -> None:
    """Fits, break-even and targets as printed last."""
    for item in data.get("fits", []):
        costs = item["ns_per_token"]
        print(f"batch {item['batch']}: one more token {costs['lamp']:.3f} ns, bf16 {costs['bf16']:.3f} ns")
    print(f"never slower than bf16 from {data.get('break_even')} cached tokens on (batch times length)")
    for item in data.get("targets", []):
        measured = "not measured" if item["measured"] is None else f"{item['measured']:.3g}"
        print(f"{'met   ' if item['met'] else 'MISSED'} {item['target']}: {measured} (limit {item['limit']:g})")
    for row in data.get("rows", []):
        wanted = row.get("wanted_share")
        if wanted and abs(row["refined_share"] - wanted) > 0.1 * wanted:
            print(f"{row['case']} {row['name']}: {row['refined_share']:.2%} are refined, {wanted:.2%} were wanted")
        large = row["name"] == "fp8" and "ms" in row and Case.parse(row["case"]).tokens > NEVER_SLOWER
        if large and (row["ratio_to_bf16"] or WEAK) < WEAK:
            print(f"the fp8 rival is weak at {row['case']}: {row['ratio_to_bf16']:.2f} times bf16, below {WEAK}")


def default_out(benchmark: str, device: str) -> Path:
    """``results/<date>-<benchmark>-<device>.json`` next to the scripts."""
    short = next((word.lower() for word in device.replace(",", " ").split() if word.lower() != "nvidia"), "device")
    name = f"{datetime.datetime.now(tz=datetime.UTC):%Y-%m-%d}-{benchmark}-{short}.json"
    return Path(__file__).resolve().parent / "results" / name


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of a trained model, for real queries, keys, values and shares")
    parser.add_argument("--text", help="UTF-8 file or *.u16 token ids for it")
    parser.add_argument("--context", type=int, default=4096, help="tokens of a window of the text")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--positions", type=int, default=64, help="decode steps measured in each window")
    parser.add_argument("--tau", type=float, default=_real.TAU, help="threshold that shares are measured at")
    parser.add_argument("--shares", type=_real.parse_shares, help="refined shares to impose instead: 0.05,0.1")
    parser.add_argument("--cases", default=f"{MAIN},{SMALL},{FIT}", help="BATCHxLENGTH, comma-separated")
    parser.add_argument("--fixed-at", default="32x32768", help="the case that also runs fixed shares")
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--group", type=int, default=4)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--budget", type=float, default=1e9, help="seconds after which no case is begun")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--targets", action="store_true", help="exit 1 when a target is missed")
    parser.add_argument("--out", nargs="?", const="", help="write JSON; without a name under results/")
    args = parser.parse_args(argv)
    if bool(args.model) != bool(args.text):
        parser.error("--model and --text go together")
    return args


def main(argv: list[str] | None = None) -> int:
    args, began = parse(argv), time.monotonic()
    device, real = checked_device(args.device), {"rows": [], "layers": [], "shares": []}
    head = environment(args.device)
    print(f"{head['device']}, {args.kv_heads} kv heads, groups of {args.group}, D {args.dim}", flush=True)
    if args.model:
        real = measured(args, device) or real
    source = "given" if args.shares else "measured" if real["shares"] else "assumed"
    shares = args.shares or real["shares"] or ASSUMED
    bandwidth = copy_bandwidth(device, args.repeats)
    print(f"copy {bandwidth:.0f} GB/s; shares ({source}): {', '.join(f'{s:.3f}' for s in shares)}")
    for row in real["rows"]:
        print(f"{row['case']:10s} {row['name']:17s} median error {row['error']:.2e}, mean {row['error_mean']:.2e}")
    print(f"{'case':10s} {'name':17s} {'ms':>9s} x bf16  x fp8 refined     error x floor", flush=True)
    shape = Shape(args.kv_heads, args.group, args.dim)
    bench = Bench(shape, device, args.repeats, shares, args.fixed_at, bandwidth)
    out = None if args.out is None else Path(args.out) if args.out else default_out("decode_kernel", head["device"])
    data: dict[str, Any] = {**head, "shape": vars(shape), "copy_gb_per_s": bandwidth, "shares": shares}
    data |= {
        "shares_are": source,
        "real_layers": real["layers"],
        "tau": args.tau,
        "model": args.model and Path(args.model).name,
    }
    for case in dict.fromkeys(map(Case.parse, args.cases.split(","))):
        if time.monotonic() - began > args.budget:
            print(f"out of budget before {case.name}", flush=True)
            break
        try:
            rows = bench.case(case)
        except Exception as problem:  # noqa: BLE001  (no room for this case: go on with the next)
            rows = [{"case": case.name, "name": "inputs", "failed": f"{type(problem).__name__}: {str(problem)[:400]}"}]
            bench.rows += rows
        print("\n".join(map(line, rows)), flush=True)
        data |= {"rows": real["rows"] + bench.rows, "fits": fits(bench.rows)}
        data |= {"targets": targets(bench.rows, data["fits"], real["rows"]), "break_even": break_even(bench.rows)}
        if out:
            write_json(out, data)
    report(data)
    return 1 if args.targets and not all(item["met"] for item in data.get("targets", [{"met": False}])) else 0


if __name__ == "__main__":
    _script.run(main)
