"""The look-ahead network of a model: how well it predicts, what it costs, what it loses at an equal refined share, what
skipping saves and what skipping does to retrieval over long distances.

    python benchmarks/lookahead_network.py MODEL TEXT --network FILE --windows 4 --context 4096 --out results.json

TEXT should be the text that it was trained on: the end of it, which training holds out, is measured. Without --network
one is trained first (--train-windows). Bytes are those that a kernel would read which takes the levels from outside;
the reference, which runs here, computes everything.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import _script
import torch
from torch import Tensor

import lamp_compile
from lamp_compile.quality import load, rows, windows
from lamp_compile.quality.engine import CompiledEngine
from lamp_compile.quality.environment import environment, write_json
from lamp_compile.quality.evaluate import HEADER, Evaluation, line
from lamp_compile.quality.network import row as network_row
from lamp_compile.quality.network import score, session
from lamp_compile.quality.network.samples import Sample, Sampling, observe
from lamp_compile.quality.network.train import Settings
from lamp_compile.quality.rows import RowSpec
from lamp_compile.runtime.network import files

LENGTHS = (1024, 4096, 16384, 65536)
SKIPS = (0.001, 0.01, 0.05)
LIMIT = 1.3
"""KL over that of the exact look-ahead at an equal share, the project's target."""
DEPTHS, FACT, CUE = 8, 12, 8
"""Places of a planted run of tokens, its length, and how much of it is repeated at the end as a cue."""


def predictions(fast: Any, network: files.Network, held_out: Tensor) -> list[dict[str, Any]]:
    """Divergence and recall per site and step ahead, against the two baselines."""
    found: dict[str, list[Sample]] = {}
    sampling = Sampling(ahead=network.about.ahead, group=network.about.group)
    for index in range(held_out.shape[0]):
        ids = held_out[index : index + 1].to(next(fast.parameters()).device)
        observe(fast, ids, 2_000_000 + index, sampling, lambda name, s: found.setdefault(name, []).append(s))
    serves = {layer.name: layer.serves for layer in network.about.layers}
    with torch.no_grad():
        return [
            {"name": f"{name} t+{row['ahead']}", "site": name, "serves": serves[name], **row}
            for name, samples in found.items()
            for row in score.describe(score.measure(network.gates[name], samples, sampling))
        ]


def everywhere(path: Path, out: Path) -> Path:
    """The same network, serving every site whether it is good enough there or not."""
    read = files.load(path)
    layers = tuple(replace(layer, serves=True) for layer in read.about.layers)
    files.Network(replace(read.about, layers=layers), read.gates).save(out)
    return out


def planted(ids: Tensor, vocabulary: int, depth: int) -> Tensor:
    """The window ``[1, N]`` with a run of random tokens at a depth (0 ... DEPTHS - 1) and again at its end."""
    generator = torch.Generator().manual_seed(depth)
    fact = torch.randint(100, vocabulary, (FACT,), generator=generator)
    made = ids.clone()
    at = 16 + depth * (ids.shape[1] - 2 * FACT - 32) // DEPTHS
    made[0, at : at + FACT] = fact
    made[0, -FACT:] = fact
    return made


def retrieval(run: Any, window: Tensor, vocabulary: int) -> dict[str, float]:
    """Mean log-probability of a planted run's last tokens after its first, over depths; and at the worst depth."""
    scores = []
    for depth in range(DEPTHS):
        ids = planted(window, vocabulary, depth)
        logits = run(ids)[0, -FACT + CUE - 1 : -1].log_softmax(-1)
        scores.append(float(logits.gather(1, ids[0, -FACT + CUE :, None]).mean()))
    return {"logp": sum(scores) / len(scores), "logp_worst_depth": min(scores)}


def bytes_read(engine: CompiledEngine, ids: Tensor, plan: Any, live: dict[str, int]) -> float:
    """Bytes of planes read, as a share of both planes of every live sub-tile."""
    read = whole = 0.0
    for name, site in engine.run(ids, plan).tiles.items():
        seen, hot = (int(n) for n in site.counts.tolist())
        width = site.key_dim + site.value_dim
        read += seen * (width / 2 + 4) + hot * width / 2
        whole += live[name] * (width + 4)
    return read / whole


def losses(model: Any, path: Path, picked: Tensor, scratch: Path) -> list[dict[str, Any]]:
    """KL of the exact look-ahead, of the network where it serves and everywhere, and with skipping."""
    evaluation = Evaluation(
        model, picked, lambda m, b: CompiledEngine(lamp_compile.compile(m, mode="eager", balance=b))
    )
    vocabulary = int(model.config.vocab_size)
    print(HEADER, flush=True)
    done: list[dict[str, Any]] = []

    def add(made: Any, engine: CompiledEngine, plan: Any, name: str) -> None:
        exact = evaluation.rows[rows.LAMP.key]
        live = {n: int(s.counts[0]) for n, s in exact_engine.run(picked[:1], exact_engine.plan).tiles.items()}
        found = retrieval(lambda ids: engine.run(ids, plan).logits, picked[:1], vocabulary)
        share = bytes_read(engine, picked[:1], plan, live)
        done.append({**made.to_dict(), "name": name, "kl_ratio": made.kl / exact.kl, "bytes_read": share, **found})
        print(f"{line(replace(made, name=name))}  x{made.kl / exact.kl:.2f} bytes {share:.1%} {found}", flush=True)

    exact_engine = evaluation.engine()
    add(evaluation.measure(rows.LAMP), exact_engine, exact_engine.plan, "lamp")
    with torch.no_grad():
        done[0]["logp_uncompiled"] = retrieval(lambda ids: model(ids, use_cache=False).logits, picked[:1], vocabulary)
    for name, file in (("lamp_network", path), ("lamp_network everywhere", everywhere(path, scratch))):
        engine = CompiledEngine(lamp_compile.compile(model, mode="eager", lookahead=file))
        if not network_row.served(engine.plan):
            continue
        made = network_row.lamp_network(evaluation, engine)
        plan = network_row.with_tau(engine.plan, made.tau)
        add(made, engine, plan, name)
        for skip in SKIPS:
            names = network_row.served(plan)
            sites = tuple(replace(s, skip=skip) if s.name in names else s for s in plan.sites)
            skipping = replace(plan, sites=sites)
            fixed = network_row._Fixed(engine, skipping)
            add(evaluation.measure_with(fixed, RowSpec(name)), engine, skipping, f"{name}, skip {skip:g}")
    return done


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("text")
    parser.add_argument("--network", type=Path, help="its file; trained here when left out")
    parser.add_argument("--train-windows", type=int, default=48)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="write the rows as JSON")
    args = parser.parse_args(argv)
    model = load.load_model(args.model, device=args.device)
    fast = lamp_compile.compile(model, mode="eager")
    encode = None if args.text.endswith(".u16") else load.encoder(args.model)
    ids = windows.token_ids(args.text, encode)
    text = session.split(ids, args.context, args.train_windows, Path(args.text).name)
    path = args.network or Path("lookahead.safetensors")
    if args.network is None:
        rank = session.largest_rank(fast, args.context, 8, 32)
        settings = Settings(rank, Sampling(), text.train.shape[0])
        session.train(fast, text, settings, None, lambda what: print(what, flush=True)).network.save(path)
    network = files.load(path)
    about = network.about
    told = predictions(fast, network, text.held_out)
    for row in told:
        print({key: round(value, 3) if isinstance(value, float) else value for key, value in row.items()}, flush=True)
    costs = [session.costs_of(fast, n, rank=about.rank, group=about.group, subtile=about.subtile) for n in LENGTHS]
    picked = windows.spread(ids[int(ids.numel() * (1 - session.HELD_OUT)) :], args.context, args.windows)
    with tempfile.TemporaryDirectory() as folder:
        lost = losses(model, path, picked.to(args.device), Path(folder) / "everywhere.safetensors")
    served = next((row for row in lost if row["name"] == "lamp_network"), None)
    targets = [
        {"target": "every served site beats both baselines at t", "met": all(r["better"] for r in told
            if r["serves"] and r["ahead"] == 0)},
        {"target": f"lamp_network: KL within {LIMIT} of lamp's", "met": served is not None
            and served["kl_ratio"] <= LIMIT},
    ]  # fmt: skip
    if args.out:
        head = {**environment(args.device), "model": Path(args.model).name, "text": Path(args.text).name}
        described = {**head, "context": args.context, "windows": args.windows, "network": asdict(about)}
        write_json(args.out, {**described, "costs": costs, "rows": [*told, *lost], "targets": targets})
    for item in targets:
        print(item)
    return 0


if __name__ == "__main__":
    _script.run(main)
