"""A decode step whose important sub-tiles a look-ahead network names beforehand, against the exact look-ahead.

    python benchmarks/decode_predicted.py --out

The attention of one new token, all launches of it (prediction and audit too), in captured CUDA graphs over inputs that
do not fit into the cache together; bf16 SDPA in the same run. Keys are planted (_planes.py). The network's summaries
are made to say what is true, so that this is about speed: predicted shares are those asked for, and outputs are held
against float64 and, of the first sequence, against the reference at the same precisions. What a trained network
predicts is measured in lookahead_network.py. One step in sixteen skips nothing; sequences and heads are spread over the
sixteen.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import _rivals
import _script
import torch
from _planes import GUARD, NEVER, RULE, SHAPE, STORE, SUBTILE, TILE, Attention, Case, Inputs, Shape, importance, make
from _timing import cache_bytes, copy_bandwidth, milliseconds, release
from decode_kernel import attempt, default_out
from torch import Tensor

from lamp_compile.quality.environment import environment, write_json
from lamp_compile.quality.load import checked_device
from lamp_compile.runtime import guard, reference
from lamp_compile.runtime.arguments import Planes, Scores, Visibility
from lamp_compile.runtime.network import audit, gate
from lamp_compile.runtime.network import ops as _ops  # noqa: F401  (registers torch.ops.lamp)

CASES = "32x32768,16x32768,8x16384,1x131072"
SHARES = "0.02,0.05,0.1"
SKIPS = "0,0.2,0.5"
SPAN = 8
LEAST = 1e-9
"""Importance below this is called that: summaries are float16, of logarithms."""
LOSS = 100.0
"""Softmax mass that the plan allows to be skipped: more than there is, for what counts here is the share skipped."""


@dataclass
class Known:
    """``lamp::fused_predicted`` with a network that tells the truth about one set of inputs."""

    hot: Attention
    summaries: list[Tensor]
    weights: dict[str, Tensor]
    history: Tensor
    trust: Tensor
    predicted: Tensor

    @staticmethod
    def of(sets: list[Inputs], rank: int) -> Known:
        first, (batch, kv_heads, _, dim) = sets[0], sets[0].k.shape
        device, heads = first.q.device, first.q.shape[1]
        true = torch.cat([_exact(first, b) for b in range(batch)])  # [B, G, T]
        summary = torch.zeros(
            batch, kv_heads, true.shape[2] * SUBTILE // SPAN, rank, dtype=torch.float16, device=device
        )
        summary[..., 0] = true.clamp_min(LEAST).log().repeat_interleave(SUBTILE // SPAN, dim=2)
        like: dict[str, Any] = dict(device=device)
        weights = {
            "query": torch.zeros(heads, dim, rank, dtype=torch.float16, **like),
            "query_bias": torch.zeros(heads, rank, **like), "age": torch.zeros(heads, gate.AGES, **like),
            "extra": torch.zeros(heads, 4, **like), "limit": torch.full((kv_heads,), audit.MOST_EXCESS, **like),
            "margin": torch.ones(kv_heads, **like),
        }  # fmt: skip
        weights["query_bias"][:, 0] = math.sqrt(dim)
        # A group's four equal scores: half the mass is the energy; and importances do not add up to 1 as masses do.
        weights["extra"][:, gate.OFFSET] = (2 * true.sum(-1).mean(0)).log().repeat_interleave(heads // kv_heads)
        made = Known(
            Attention(first), [summary] + [summary.clone() for _ in sets[1:]], weights,
            torch.zeros(batch, kv_heads, true.shape[2], 2, **like), audit.new(batch, kv_heads, device), true,
        )  # fmt: skip
        made.predicted = torch.cat([made.predict(first, b) for b in range(batch)])
        return made

    def predict(self, inputs: Inputs, b: int) -> Tensor:
        """What the reference makes of the network for one sequence, ``[1, G, T]``."""
        one, room = slice(b, b + 1), inputs.k.shape[2]
        weights = [self.weights[name] for name in ("query", "query_bias", "age", "extra")]
        found: Tensor = torch.ops.lamp.predict(
            inputs.q[one], self.summaries[0][one], self.history[one], *weights, None, None, None, None, None, None,
            inputs.lengths[one], None, **SHAPE, keys=room, rotation="hadamard", query_bits=8, subtile=SUBTILE,
            room=room, pages=room // TILE, site="benchmark",
        )  # fmt: skip
        return found[:, :, 0]

    def choose(self, refined: float, skipped: float) -> float:
        """Set tau and margin so that these shares of the sub-tiles are refined and skipped; gives back ``skip``."""
        ranked, tiles = self.predicted.sort(dim=-1, descending=True).values, self.predicted.shape[2]
        count = max(1, round(refined * tiles))
        self.hot.tau.copy_((ranked[..., count - 1] * ranked[..., count]).sqrt() if refined else NEVER)
        if not skipped:
            return 0.0
        below = torch.quantile(self.predicted.float(), skipped, dim=-1).median(0).values  # a margin is a head's
        self.weights["margin"].copy_(LOSS / (tiles * math.sqrt(SUBTILE) * below))
        return LOSS

    def __call__(self, inputs: Inputs, index: int, skip: float, launch: str = "") -> Tensor:
        room, hot = inputs.k.shape[2], self.hot
        weights = [self.weights[name] for name in ("query", "query_bias", "age", "extra", "limit", "margin")]
        out: Tensor = torch.ops.lamp.fused_predicted(
            inputs.q, *inputs.planes, hot.tau, hot.floor, hot.budget, hot.state, hot.stats, None, None, None, None,
            None, inputs.lengths, None, self.summaries[index], self.history, self.trust, *weights, **SHAPE, keys=room,
            **STORE, **RULE, **GUARD, trained=room, skip=skip, room=room, pages=room // TILE, launch=launch,
        )  # fmt: skip
        return out

    def levels(self, inputs: Inputs, skip: float) -> Tensor:
        """The reference's precisions of the first sequence in a step that may skip, ``[1, G, 1, T]``."""
        below, hot, room = None, self.hot, inputs.k.shape[2]
        length = torch.full((1,), room, device=inputs.q.device)
        if skip:
            below = audit.skip_threshold(skip, self.weights["margin"], length, SUBTILE)
        return reference.select(self.predicted[:1, :, None], hot.tau[:1], hot.floor, None, below, False)


def _exact(inputs: Inputs, b: int) -> Tensor:
    """Importance ``[1, G, T]`` of one sequence by the exact look-ahead."""
    one, (k_high, _, k_scale) = slice(b, b + 1), inputs.planes[:3]
    found: Tensor = torch.ops.lamp.look_ahead(
        inputs.q[one], k_high[one], k_scale[one], None, None, None, None, None, inputs.lengths[one], None,
        **SHAPE, keys=inputs.k.shape[2], k_format="nested8", rotation="hadamard", **RULE,
    )  # fmt: skip
    return found[:, :, 0]


def as_defined(inputs: Inputs, levels: Tensor) -> Tensor:
    """What the reference makes of the first sequence at these precisions, ``[H, Dv]``."""
    planes, q = Planes(*(p[:1] for p in inputs.planes)), inputs.q[:1]
    visible, scores = Visibility(inputs.k.shape[2], causal="bottom_right"), Scores(q.shape[3] ** -0.5, 0.0, "hadamard")
    out, _, _ = reference.attend(q, planes, levels, None, None, visible, scores, "nested8", "nested8", SUBTILE)
    return out[0, :, 0].double()


def predicted_row(
    known: Known, sets: list[Inputs], shares: tuple[float, float], repeats: int, wanted: dict[int, Tensor]
) -> dict[str, Any]:  # fmt: skip
    """A row of the network at a share refined and a share skipped."""
    refined, skipped = shares
    skip, first, device = known.choose(refined, skipped), sets[0], sets[0].q.device
    steps = torch.arange(known.trust[..., 0].numel(), device=device).reshape(known.trust.shape[:2]) % audit.WINDOW
    known.trust.zero_()
    known.trust[..., audit.STEPS] = 1.0  # a step that may skip
    known.hot.stats.zero_()
    out = known(first, 0, skip)
    counts = known.hot.stats.sum((0, 1)).tolist()
    known.trust[..., audit.STEPS] = steps
    calls = [lambda s=s, i=i: known(s, i, skip) for i, s in enumerate(sets)]
    ms = milliseconds(calls, repeats, device)
    live, all_tiles = counts[guard.LIVE], known.predicted.numel()
    report = {"exact_steps": float(known.trust[..., audit.EXACT].sum()), "dropped": float(known.trust[..., -1].sum())}
    name, levels = f"network {refined:.0%}, skip {skipped:.0%}", known.levels(first, skip)
    return {
        "name": name, "ms": ms, "refined_share": counts[guard.REFINED] / all_tiles,
        "skipped_share": 1 - live / all_tiles, "error": _rivals.error(out, wanted),
        "error_to_reference": _rivals.error(out, {0: as_defined(first, levels)}), **report,
        "excess": float(known.trust[..., audit.EXCESS].max()), "expense": float(known.trust[..., audit.EXPENSE].max()),
    }  # fmt: skip


def exact_row(sets: list[Inputs], share: float, ranked: Tensor, repeats: int, wanted: dict[int, Tensor]) -> Any:
    """A row of the exact look-ahead."""
    op = Attention(sets[0])
    got = op.impose(sets[0], share, ranked)
    ms = milliseconds([lambda s=s: op(s) for s in sets], repeats, sets[0].q.device)
    row = {"name": f"exact {share:.0%}", "ms": ms, "refined_share": got, "skipped_share": 0.0}
    return {**row, "error": _rivals.error(op(sets[0]), wanted)}


def bytes_read(case: Case, shape: Shape, row: dict[str, Any], rank: int) -> float:
    """Bytes a step must read: scales, high and residual planes, and of a network summaries, history and energies."""
    keys = case.tokens * shape.kv_heads
    read = 1 - row["skipped_share"]
    planes = keys * (read * (shape.dim + 4) + row["refined_share"] * shape.dim)
    if row["name"].startswith("network"):
        planes += keys / SPAN * rank * 2 + keys / SUBTILE * (16 + 4)
    return planes


def one_case(case: Case, shape: Shape, args: argparse.Namespace, bandwidth: float) -> list[dict[str, Any]]:
    """All rows of one case."""
    device = checked_device(args.device)
    release(device)
    inputs = make(case, shape, device)
    count = -(-3 * cache_bytes(device) // int(shape.bytes_touched(case, 0.0)))
    sets = [inputs] + [inputs.copy() for _ in range(min(16, count) - 1)]
    wanted, ranked, known = _rivals.references(inputs), importance(inputs), Known.of(sets, args.rank)
    rows = [attempt("bf16", lambda: _rivals.bf16(sets, args.repeats, wanted))]
    for share in (0.0, *args.shares):
        rows.append(attempt("exact", lambda s=share: exact_row(sets, s, ranked, args.repeats, wanted)))
    for share in args.shares:
        for skipped in args.skips:
            how = (share, skipped)
            rows.append(attempt("network", lambda h=how: predicted_row(known, sets, h, args.repeats, wanted)))
    for row in rows:
        row["case"] = case.name
        if "refined_share" in row and "ms" in row:
            row["floor_ms"] = bytes_read(case, shape, row, args.rank) / bandwidth / 1e6
            row["ratio_to_floor"] = row["ms"] / row["floor_ms"]
        bf16 = next((r["ms"] for r in rows if r["name"] == "bf16" and "ms" in r), None)
        if bf16 and "ms" in row:
            row["ratio_to_bf16"] = bf16 / row["ms"]
    if args.profile:
        for share, skipped in ((args.shares[-1], args.skips[0]), (args.shares[0], args.skips[-1])):
            skip = known.choose(share, skipped)
            known.trust.zero_()
            known.trust[..., audit.STEPS] = 1.0
            print(f"{case.name}, {share:.0%} refined, {skipped:.0%} skipped, without overlap")
            profile(lambda s=skip: known(inputs, 0, s, '{"dependent": 0}'), device)
        print(f"{case.name}, exact look-ahead, {args.shares[-1]:.0%} refined")
        op = Attention(inputs)
        op.impose(inputs, args.shares[-1], ranked)
        profile(lambda: op(inputs), device)
    return rows


def profile(call: Any, device: torch.device) -> None:
    """Print what each launch of one call takes."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as recorded

    call()
    with recorded(activities=[ProfilerActivity.CUDA if device.type == "cuda" else ProfilerActivity.CPU]) as found:
        for _ in range(12):
            call()
        if device.type == "cuda":
            torch.cuda.synchronize()
    for event in sorted(found.key_averages(), key=lambda e: -e.device_time_total)[:9]:
        print(f"    {event.key[:40]:40s} {event.device_time_total / 12:9.2f} us")


def line(row: dict[str, Any]) -> str:
    """One row as printed."""
    if "ms" not in row:
        return f"{row['case']:10s} {row['name']:24s} failed: {row['failed'][:160]}"
    numbers = [row.get(key) for key in ("refined_share", "skipped_share")]
    shares = " ".join("      -" if x is None else f"{x:7.1%}" for x in numbers)
    numbers = [row.get(key) for key in ("ratio_to_bf16", "ratio_to_floor")]
    ratios = " ".join("     -" if x is None else f"{x:6.2f}" for x in numbers)
    told = f" exact {row['exact_steps']:.0f} excess {row['excess']:.2f}" if "excess" in row else ""
    told += f" to reference {row['error_to_reference']:.1e}" if "error_to_reference" in row else ""
    return f"{row['case']:10s} {row['name']:24s} {row['ms']:9.4f} {ratios} {shares} {row['error']:9.2e}{told}"


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shares = lambda text: [float(x) for x in text.split(",")]  # noqa: E731
    parser.add_argument("--cases", default=CASES, help="BATCHxLENGTH, comma-separated")
    parser.add_argument("--shares", default=SHARES, type=shares, help="refined shares of the sub-tiles")
    parser.add_argument("--skips", default=SKIPS, type=shares, help="skipped shares of the sub-tiles")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--group", type=int, default=4)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--profile", action="store_true", help="print what each launch of the last row takes")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", nargs="?", const="", help="write JSON; without a name under results/")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    head, device = environment(args.device), checked_device(args.device)
    shape, bandwidth = Shape(args.kv_heads, args.group, args.dim), copy_bandwidth(device, args.repeats)
    print(f"{head['device']}, {vars(shape)}, rank {args.rank}, copy {bandwidth:.0f} GB/s")
    print(f"{'case':10s} {'name':24s} {'ms':>9s} x bf16 x floor refined skipped     error", flush=True)
    data: dict[str, Any] = {**head, "shape": vars(shape), "rank": args.rank, "copy_gb_per_s": bandwidth, "rows": []}
    out = None if args.out is None else Path(args.out) if args.out else default_out("decode_predicted", head["device"])
    for case in map(Case.parse, args.cases.split(",")):
        rows = one_case(case, shape, args, bandwidth)
        data["rows"] += rows
        print("\n".join(map(line, rows)), flush=True)
        if out:
            write_json(out, data)
    return int(any("failed" in row for row in data["rows"]))


if __name__ == "__main__":
    _script.run(main)
