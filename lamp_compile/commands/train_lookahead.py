"""``lamp-compile train-lookahead``: distil a look-ahead network from the model's own attention on a text."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lamp_compile.commands import _options, _output
from lamp_compile.errors import InputError

if TYPE_CHECKING:
    from lamp_compile.quality.network.session import Trained

NAME, HELP = "train-lookahead", "train a look-ahead network on a text, and say how well it predicts"
DEFAULT_WINDOWS = 48


def add(parser: argparse.ArgumentParser) -> None:
    """State the options."""
    _options.model(parser)
    _options.plan(parser)
    parser.add_argument("--text", required=True, metavar="FILE", help="UTF-8 text, or token ids in a *.u16 file")
    parser.add_argument(
        "--context", type=_options.positive, metavar="N",
        help="tokens of a window, the longest that the network will serve (default: the model's, at most 4096)",
    )  # fmt: skip
    parser.add_argument("--out", required=True, metavar="FILE", help="where to write it, such as lookahead.safetensors")
    parser.add_argument(
        "--windows", type=_options.positive, default=DEFAULT_WINDOWS, metavar="N",
        help="windows of text to learn from (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--steps", type=_options.positive, default=16, metavar="N",
        help="steps of the optimiser per window and layer (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--ahead", type=_options.positive, default=3, metavar="W",
        help="further tokens that it learns to predict (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--rank", type=_options.positive, metavar="R",
        help="numbers per summary of keys (default: the most that cost 2 %% of the model)",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="of weights and choices (default: 0)")
    parser.add_argument("--resume", metavar="FILE", help="checkpoint to write after each window, and to go on from")


def run(args: argparse.Namespace) -> int:
    """Train, print how good it is and what it costs, and write it."""
    from lamp_compile import api
    from lamp_compile.commands._measure import LONGEST_DEFAULT, longest_context
    from lamp_compile.quality import load, windows
    from lamp_compile.quality.network import session
    from lamp_compile.quality.network.samples import Sampling
    from lamp_compile.quality.network.train import Settings

    out = Path(args.out)
    if not out.parent.is_dir():
        raise InputError("the folder is not there", where=str(out), fix="an existing folder")
    folder = load.model_folder(args.model)
    encode = None if args.text.endswith(".u16") else load.encoder(folder)
    model = load.load_model(folder, device=args.device)
    ids = windows.token_ids(args.text, encode, vocabulary=model.config.get_text_config(decoder=True).vocab_size)
    longest = longest_context(model)
    context = args.context or min(longest, LONGEST_DEFAULT)
    if context > longest:
        raise InputError(f"a context of {context}, the model has {longest}", where="--context", fix=f"{longest}")
    sampling = Sampling(ahead=args.ahead, seed=args.seed)
    if context < 2 * sampling.length:
        raise InputError(
            f"a context of {context} tokens", where="--context", fix=f"at least {2 * sampling.length} tokens"
        )
    text = session.split(ids, context, args.windows, Path(args.text).name)
    fast = api.compile(model, mode="eager", **_options.compile_options(args))
    subtile = min(row.subtile for row in fast.lamp.plan.sites if row.apply)
    rank = args.rank or session.largest_rank(fast, context, sampling.group, subtile)
    settings = Settings(rank, sampling, text.train.shape[0], steps=args.steps, seed=args.seed)
    step = _output.progress(text.train.shape[0] + text.held_out.shape[0], "train")
    done = session.train(fast, text, settings, Path(args.resume) if args.resume else None, step)
    sha256 = done.network.save(out)
    _report(args, done, sha256)
    return 0


def _report(args: argparse.Namespace, done: Trained, sha256: str) -> None:
    from lamp_compile.quality.network import score

    about = done.network.about
    if args.json:
        found_rows = [{"site": n, **row} for n, rows in done.rows.items() for row in score.describe(rows)]
        found: dict[str, Any] = {"out": args.out, "sha256": sha256, "rank": about.rank, "trained": about.trained}
        served = [layer.name for layer in about.layers if layer.serves]
        _output.print_json({**found, "serves": served, "costs": done.costs, "rows": found_rows})
        return
    print(f"held-out part of {about.text}; KL in nats and recall of hot sub-tiles: network / copy / sink + newest")
    for name, rows in done.rows.items():
        for row in rows:
            print(
                f"{name:28s} t+{row.ahead}  KL {row.kl:6.3f} /{row.kl_copy:6.3f} /{row.kl_static:6.3f}  recall "
                f"{row.recall:6.1%} /{row.recall_copy:6.1%} /{row.recall_static:6.1%}  missed x{row.missed:.2f}"
            )
    for layer in about.layers:
        if not layer.serves:
            print(f"{layer.name} is not served: it keeps the exact look-ahead")
    for name in ("network", "exact"):
        share = done.costs[name]
        print(
            f"cost at {done.costs['keys']} tokens, {name} look-ahead: {share['operations']:.2%} of the model's "
            f"operations, {share['bytes']:.2%} of its bytes"
        )
    print(f"wrote {args.out}")
