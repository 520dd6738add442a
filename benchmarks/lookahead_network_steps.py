"""What a look-ahead network saves in steps of one token on a CPU: time of the attention and of the whole step, bytes
read, and what it costs in quality, against the exact look-ahead in the same run.

    python benchmarks/lookahead_network_steps.py MODEL TEXT --network FILE --context 4096 --part speed --out FILE

for each of the parts (speed, quality, retrieval, audit) and contexts; an output that is there already is added to.
Every step decodes real text, which is forced, with the kernels that serve users; the end of TEXT is taken, which
training held out. "core" is the compiled attention alone with whatever the caches hold after the linear layers, "call"
is with the operator around it. Ways take turns, sixteen steps at a time: one that skips nothing and fifteen that may.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import _models
import _script
import torch
from _cpu_machine import describe
from lookahead_network import planted
from torch import Tensor

import lamp_compile
from lamp_compile.ir import Precision
from lamp_compile.quality import load, windows
from lamp_compile.quality.environment import environment, write_json
from lamp_compile.quality.network import row as network_row
from lamp_compile.quality.network import session
from lamp_compile.runtime import guard, layout, reference
from lamp_compile.runtime.arguments import Scores, Visibility
from lamp_compile.runtime.kernels.cpu import _library
from lamp_compile.runtime.network import audit, files
from lamp_compile.runtime.network import ops as network_ops
from lamp_compile.runtime.network.layer import NetworkLayer

SKIPS = (0.02, 0.05, 0.1, 0.2)
EXACT, NETWORK = "exact look-ahead", "network"
BURST = audit.WINDOW
WARM = 2 * audit.WINDOW
HOT = 0.01
"""Importance above which the audit's numbers are compared."""
FACT, CUE, DEPTHS = 12, 8, 4


class Tap:
    """The core, with a clock around each attention."""

    def __init__(self, core: Any) -> None:
        self._core, self.seconds = core, list[float]()

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._core, name)
        if name not in ("lamp_attend", "lamp_attend_predicted"):
            return found

        def timed(*args: Any) -> Any:
            began = time.perf_counter()
            result = found(*args)
            self.seconds.append(time.perf_counter() - began)
            return result

        return timed


@contextmanager
def tapped() -> Iterator[Tap]:
    """The core's attentions timed, for a while."""
    load_core = _library.load
    tap = Tap(load_core())
    _library.load = lambda: tap  # type: ignore[assignment, return-value]
    try:
        yield tap
    finally:
        _library.load = load_core


@dataclass
class Way:
    """One way to decode, and what was seen of it."""

    name: str
    fast: Any
    forward: Any
    cache: Any = None
    step_ms: list[float] = field(default_factory=list)
    core_us: list[float] = field(default_factory=list)
    call_us: list[float] = field(default_factory=list)

    def begin(self, ids: Tensor, room: int) -> None:
        """Read a prompt ``[1, N]``."""
        self.cache = self.fast.lamp.cache(room)
        self.cache.unpadded = True
        self.fast(ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)

    def step(self, token: Tensor) -> Tensor:
        """Logits ``[V]`` after one more token ``[1, 1]``."""
        found: Tensor = self.forward(token, past_key_values=self.cache, use_cache=True).logits[0, -1]
        return found


def ways(model: Any, network: Path, tau: float, mode: str, names: tuple[str, ...] | None = None) -> list[Way]:
    """The exact look-ahead, the network, and the network that may skip."""
    exact = lamp_compile.compile(model, mode=mode, guard_budget=float("inf"))
    fast = lamp_compile.compile(model, mode=mode, lookahead=network, guard_budget=float("inf"))
    plan = network_row.with_tau(fast.lamp.plan, tau)
    served = network_row.served(plan)
    made = [(EXACT, exact), (NETWORK, lamp_compile.compile(model, mode=mode, plan=plan))]
    for skip in SKIPS:
        sites = tuple(replace(s, skip=skip) if s.name in served else s for s in plan.sites)
        made.append(
            (f"{NETWORK}, skip {skip:g}", lamp_compile.compile(model, mode=mode, plan=replace(plan, sites=sites)))
        )
    config = None if mode == "eager" else "compiled"
    return [
        Way(name, built, _models.compiled(built, mode, config and built.lamp.compile_config))
        for name, built in made
        if names is None or name in names
    ]


def shares(way: Way, before: list[Tensor], layers: list[int], keys: int) -> dict[str, float]:
    """Of the steps since ``before``, at the sites that the network serves: shares of sub-tiles read and refined, and
    bytes read a step and layer, with those of the network where it was asked, and the share of steps where it was."""
    live = refined = seen = 0.0
    planes = extra = 0.0
    for index in layers:
        layer, old = way.cache.layers[index], before[index]
        counted = (layer.stats - old).sum((0, 1)).tolist()
        steps = counted[guard.STEPS] / layer.stats.shape[1]
        width = layout.key_width(layer.k_high) + layout.value_width(layer.v_high)
        live, refined = live + counted[guard.LIVE], refined + counted[guard.REFINED]
        seen += counted[guard.STEPS] * -(-keys // layer.plan.subtile)
        planes += layer.plan.subtile * (counted[guard.LIVE] * (width + 4) + counted[guard.REFINED] * width) / steps
        if hasattr(layer, "summary"):
            heads, tiles = layer.summary.shape[1], -(-keys // layer.plan.subtile)
            extra += heads * (2 * layer.summary.shape[3] * -(-keys // layer.network.group) + 2 * 8 * tiles)
            extra += sum(w.numel() * w.element_size() for w in layer._now)
    found = [site["predicted_share"] for site in way.cache.guard_report() if "predicted_share" in site]
    share = statistics.fmean(found) if found else 0.0
    extra *= share
    return {"predicted": share, "read": live / seen, "refined": refined / seen, "bytes": (planes + extra) / len(layers),
            "bytes_network": extra / len(layers)}  # fmt: skip


def speed(made: list[Way], ids: Tensor, context: int, rounds: int, layers: list[int]) -> list[dict[str, Any]]:
    """Times of steps from ``context`` cached tokens on; ``layers`` are those that the network serves."""
    room = context + WARM + rounds * BURST + 1
    for way in made:
        way.begin(ids[:, :context], room)
        for i in range(WARM):
            way.step(ids[:, context + i : context + i + 1])
    before = {way.name: [layer.stats.clone() for layer in way.cache.layers] for way in made}
    with tapped() as tap:
        for turn in range(rounds):
            for index in range(len(made)):
                _burst(made[(index + turn) % len(made)], ids, context + WARM + turn * BURST, layers, tap)
    done = []
    keys = context + WARM + rounds * BURST // 2
    for way in made:
        row = {"name": f"{way.name}, {context} tokens", "way": way.name, "part": "speed", "context": context}
        row |= {"step_ms": statistics.median(way.step_ms), "core_us": statistics.median(way.core_us)}
        row |= {"core_mean_us": statistics.fmean(way.core_us), "steps": len(way.step_ms)}
        if way.call_us:
            row["call_us"] = statistics.median(way.call_us)
        row |= shares(way, before[way.name], layers, keys)
        done.append(row)
    _of_the_first(done, "read")
    first = dict(done[0])
    for row in done:
        for what in ("step_ms", "core_us", "core_mean_us", "call_us", "bytes"):
            if what in row:
                row[f"{what}_ratio"] = row[what] / first[what]
    return done


def _burst(way: Way, ids: Tensor, first: int, layers: list[int], tap: Tap) -> None:
    for i in range(first, first + BURST):
        tap.seconds.clear()
        with calls_timed(way, layers) as calls:
            began = time.perf_counter()
            way.step(ids[:, i : i + 1])
            way.step_ms.append((time.perf_counter() - began) * 1e3)
        way.core_us.append(statistics.fmean(tap.seconds[layer] for layer in layers) * 1e6)
        if calls:
            way.call_us.append(statistics.fmean(calls) * 1e6)


@contextmanager
def calls_timed(way: Way, layers: list[int]) -> Iterator[list[float]]:
    """Seconds of each attention with the operator around it, in eager mode."""
    found: list[float] = []
    if way.forward is not way.fast.__call__ and way.forward != way.fast.__call__:
        yield found
        return
    for index in layers:
        layer = way.cache.layers[index]

        def timed(*args: Any, _run: Any = layer._run, **kwargs: Any) -> Any:
            began = time.perf_counter()
            out = _run(*args, **kwargs)
            found.append(time.perf_counter() - began)
            return out

        layer._run = timed
    yield found
    for index in layers:
        del way.cache.layers[index]._run


def quality(made: list[Way], model: Any, picked: Tensor, steps: int, layers: list[int]) -> list[dict[str, Any]]:
    """KL and agreement over the last ``steps`` tokens of windows ``[n, N]``."""
    context = picked.shape[1]
    rows: dict[str, dict[str, Any]] = {}
    held: dict[str, list[Tensor]] = {way.name: [] for way in made}
    counts: dict[str, list[dict[str, float]]] = {way.name: [] for way in made}
    for ids in picked:
        ids = ids[None]
        truth = model(ids, use_cache=False, logits_to_keep=steps + 1).logits[0, :-1].log_softmax(-1)
        for way in made:
            way.begin(ids[:, : context - steps], context)
            before = [layer.stats.clone() for layer in way.cache.layers]
            got = torch.stack([way.step(ids[:, i : i + 1]) for i in range(context - steps, context)])[:-1]
            held[way.name].append(torch.stack(_losses(truth[1:], got.log_softmax(-1))))
            counts[way.name].append(shares(way, before, layers, context - steps // 2))
    for way in made:
        kl, agrees = torch.cat(held[way.name], dim=1)
        rows[way.name] = {"name": f"{way.name}, {context} tokens", "way": way.name, "part": "quality",
                          "context": context, "kl": float(kl.mean()), "agreement": float(agrees.mean()),
                          "positions": kl.numel()}  # fmt: skip
        for what in ("read", "refined", "bytes", "predicted"):
            rows[way.name][what] = statistics.fmean(found[what] for found in counts[way.name])
        rows[way.name]["kl_ratio"] = rows[way.name]["kl"] / rows[made[0].name]["kl"]
    _of_the_first(list(rows.values()), "read")
    return list(rows.values())


def _of_the_first(rows: list[dict[str, Any]], what: str) -> None:
    first = rows[0][what]
    for row in rows:
        row[what] /= first


def retrieval(made: list[Way], window: Tensor, vocabulary: int) -> list[dict[str, Any]]:
    """Mean log-probability of a planted run's end after its first tokens, over depths of a window ``[1, N]``."""
    context = window.shape[1]
    depths = [planted(window, vocabulary, depth * 8 // DEPTHS) for depth in range(DEPTHS)]
    rows = []
    for way in made:
        scores = [_retrieved(way, ids) for ids in depths]
        rows.append({"name": f"{way.name}, {context} tokens", "way": way.name, "part": "retrieval", "context": context,
                     "logp": statistics.fmean(scores), "logp_worst_depth": min(scores)})  # fmt: skip
    return rows


def _losses(truth: Tensor, got: Tensor) -> list[Tensor]:
    return [(truth.exp() * (truth - got)).sum(-1), (truth.argmax(-1) == got.argmax(-1)).float()]


def _retrieved(way: Way, ids: Tensor) -> float:
    """Mean log-probability of a planted run's last tokens after its first, decoded."""
    context = ids.shape[1]
    way.begin(ids[:, : context - FACT], context)
    logits = torch.stack([way.step(ids[:, i : i + 1]) for i in range(context - FACT, context - 1)])
    return float(logits.log_softmax(-1)[CUE - 1 :].gather(1, ids[0, -FACT + CUE :, None]).mean())


def audited(way: Way, ids: Tensor, context: int, steps: int) -> list[dict[str, Any]]:
    """How far the importances of the audit are from the exact look-ahead's, and both from those of both planes, where
    these are above 0.01."""
    found: list[Tensor] = []
    run = NetworkLayer._run

    def watched(layer: Any, q: Tensor, seen: tuple[Tensor | None, ...], options: dict[str, Any]) -> Tensor:
        out = run(layer, q, seen, options)
        if q.shape[2] > 1:
            return out
        exact = network_ops.exact_importance(q, layer.planes, (layer.balance, *seen), options)
        visible = Visibility(options["keys"], *seen[:5], options["causal"], options["window"])
        how = (options["scale"] or q.shape[3] ** -0.5, options["softcap"], options["rotation"], options["query_bits"])
        levels = torch.full(exact.shape, int(Precision.BOTH), dtype=torch.uint8)
        both = reference.final_importance(
            q, layer.planes[:3], levels, layer.balance, visible, Scores(*how), options["k_format"], options["subtile"]
        )
        mine = layer.history[:, :, None, :, 0]
        found.append(torch.stack((mine, exact, both))[:, both > HOT])
        return out

    way.begin(ids[:, :context], context + steps)
    NetworkLayer._run = watched  # type: ignore[method-assign]
    try:
        for i in range(context, context + steps):
            way.step(ids[:, i : i + 1])
    finally:
        NetworkLayer._run = run  # type: ignore[method-assign]
    mine, exact, both = torch.cat(found, dim=1)
    gaps = {"audit_to_exact": (mine, exact), "audit_to_both": (mine, both), "exact_to_both": (exact, both)}
    row = {name: float(((a - b).abs() / both).mean()) for name, (a, b) in gaps.items()}
    return [{"name": f"audit, {context} tokens", "part": "audit", "context": context, "sub_tiles": both.numel(), **row}]


def equal_tau(model: Any, network: Path, ids: Tensor, steps: int, layers: list[int]) -> float:
    """tau at which the network refines as many sub-tiles as the exact look-ahead, at the sites that it serves."""
    context, tau = ids.shape[1], 0.01
    wanted = 0.0
    for _ in range(4):
        share = []
        for way in ways(model, network, tau, "eager", (EXACT, NETWORK)):
            way.begin(ids[:, : context - steps], context)
            before = [layer.stats.clone() for layer in way.cache.layers]
            for i in range(context - steps, context):
                way.step(ids[:, i : i + 1])
            share.append(shares(way, before, layers, context)["refined"])
        wanted = share[0]
        if abs(share[1] / wanted - 1) < 0.02:
            break
        tau *= share[1] / wanted
    return tau


def add(out: Path, head: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Write the rows beside those of other runs into the same file."""
    data = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {**head, "rows": []}
    keys = [(row["part"], row["context"], row["mode"], row["rank"]) for row in rows]
    kept = [row for row in data["rows"] if (row["part"], row["context"], row["mode"], row["rank"]) not in keys]
    write_json(out, {**data, "rows": [*kept, *rows]})


@torch.no_grad()
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("text")
    parser.add_argument("--network", type=Path, required=True)
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--part", choices=("speed", "quality", "retrieval", "audit"), default="speed")
    parser.add_argument("--mode", default="eager", help="of lamp_compile.compile, for speed")
    parser.add_argument("--tau", type=float, help="of the sites that the network serves; found when left out")
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--steps", type=int, default=256, help="tokens of each window that are decoded, for quality")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    model = load.load_model(args.model)
    encode = None if args.text.endswith(".u16") else load.encoder(args.model)
    ids = windows.token_ids(args.text, encode)
    tail = ids[int(ids.numel() * (1 - session.HELD_OUT)) :].long()
    about = files.load(args.network).about
    plan = lamp_compile.compile(model, mode="eager", lookahead=args.network).lamp.plan
    layers = [i for i, site in enumerate(plan.sites) if site.name in network_row.served(plan)]
    picked = windows.spread(tail, args.context, args.windows)
    tau = args.tau or equal_tau(model, args.network, picked[:1], min(args.steps, args.context // 4), layers)
    made = ways(model, args.network, tau, args.mode)
    if args.part == "speed":
        rows = speed(made, tail[None], args.context, args.rounds, layers)
    elif args.part == "audit":
        rows = audited(next(way for way in made if way.name == NETWORK), tail[None], args.context, 2 * BURST)
    elif args.part == "retrieval":
        rows = retrieval(made, picked[:1], int(model.config.vocab_size))
    else:
        rows = quality(made, model, picked, min(args.steps, args.context // 2), layers)
    for row in rows:
        row |= {"rank": about.rank, "tau": tau, "mode": args.mode, "threads": args.threads}
        row["name"] += f", rank {about.rank}"
        print({key: round(value, 5) if isinstance(value, float) else value for key, value in row.items()}, flush=True)
    if args.out:
        head = {**environment("cpu"), **describe(), "model": Path(args.model).name, "text": Path(args.text).name}
        network = {name: getattr(about, name) for name in ("group", "subtile", "trained", "seed")}
        add(args.out, {**head, "network": {**network, "served": network_row.served(plan)}}, rows)
    return 0


if __name__ == "__main__":
    _script.run(main)
