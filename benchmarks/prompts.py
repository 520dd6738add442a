"""Time to the first token: a prompt into an empty cache, by the original model and by lamp.

    python benchmarks/prompts.py --shape 8b --lengths 512,2048,8192,32768 --out
    python benchmarks/prompts.py --shape 8b --lengths 512 --profile

Rows: original (transformers, SDPA, DynamicCache), lamp (``generate`` of a compiled model), kernels (the same with
attention over the planes that were just written, as it was before prompts attended to what came), and on CUDA reused
(lamp in its default mode there, which keeps the planes of the last ``generate`` for the next). Eager in all of them, as
``generate`` reads prompts. Medians; on random weights, for speed. Logits of the last position are compared.
``host_ms`` is how long the host takes to launch a prompt's forward while the device has nothing to do; row ``slot`` is
the host's time for a prompt as ``generate_many`` starts it (a slot, its pages, a view, the forward). ``--profile``
prints the host's time by function of both; what waits for the device shows in the function that waits.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import _models
import torch
from _timing import release, synchronize
from decode_kernel import default_out
from transformers import DynamicCache

import lamp_compile
from lamp_compile.quality.environment import environment, write_json
from lamp_compile.runtime import prompt

SHOWN = 40
"""Functions that ``--profile`` prints."""


def once(model: Any, ids: torch.Tensor, device: torch.device) -> tuple[float, torch.Tensor]:
    """Milliseconds, and the logits ``[B, V]`` of the first new token."""
    synchronize(device)
    began = time.perf_counter()
    out = model.generate(
        ids, max_new_tokens=1, do_sample=False, pad_token_id=0, eos_token_id=None, output_logits=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    synchronize(device)
    return (time.perf_counter() - began) * 1e3, out.logits[0].float()


@torch.no_grad()
def forward(model: Any, ids: torch.Tensor) -> None:
    """Launch a prompt into an empty cache of its own."""
    if not hasattr(model, "lamp"):
        cache: Any = DynamicCache(config=model.config)
    else:
        cache = model.lamp.cache(ids.shape[1])
        cache.unpadded = True  # as generate has it
    model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)


@torch.no_grad()
def admit(model: Any, slots: Any, ids: torch.Tensor) -> None:
    """Launch a prompt into a slot, which is free again at once."""
    slot = slots.admit(ids.shape[1])
    view = slots.view(slot, upto=ids.shape[1])
    model(input_ids=ids, past_key_values=view, use_cache=True, logits_to_keep=1)
    slots.free(slot)


def host_ms(launch: Callable[[], None], repeats: int, device: torch.device) -> float:
    """Median milliseconds until ``launch`` comes back; the device has nothing to do when it begins."""
    times = []
    for _ in range(repeats + 2):
        synchronize(device)
        began = time.perf_counter()
        launch()
        times.append((time.perf_counter() - began) * 1e3)
    synchronize(device)
    return statistics.median(times[2:])


def profile(launch: Callable[[], None], repeats: int, device: torch.device) -> None:
    """Print the host's time by function."""
    watch = cProfile.Profile()
    for _ in range(repeats):
        synchronize(device)
        watch.enable()
        launch()
        watch.disable()
    pstats.Stats(watch).strip_dirs().sort_stats("tottime").print_stats(SHOWN)


def hosts(model: Any, fast: Any, ids: torch.Tensor, args: argparse.Namespace, device: torch.device) -> dict[str, float]:
    """The host's milliseconds for one prompt, by who launches it."""
    slots = fast.lamp.slots(2, 2 * ids.shape[1], ids.shape[1])
    ways: dict[str, Callable[[], None]] = {
        "original": lambda: forward(model, ids),
        "lamp": lambda: forward(fast, ids),
        "slot": lambda: admit(fast, slots, ids),
    }
    found = {name: host_ms(launch, args.repeats, device) for name, launch in ways.items()}
    if args.profile:
        for name in ("lamp", "slot"):
            print(f"host time of {args.repeats} prompts of {ids.shape[1]} tokens, {name}:")
            profile(ways[name], args.repeats, device)
    return found


def case(models: dict[str, Any], length: int, args: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """A row for each way at one length."""
    vocabulary = models["original"].config.get_text_config(decoder=True).vocab_size
    ids = torch.randint(3, vocabulary, (1, length), generator=torch.Generator().manual_seed(1)).to(device)
    rows, wanted = [], None
    for name, model in models.items():
        before = prompt.DEVICES
        prompt.DEVICES = () if name == "kernels" else before
        try:
            times = [once(model, ids, device) for _ in range(args.repeats + 1)][1:]
        finally:
            prompt.DEVICES = before
        logits = times[-1][1]
        wanted = logits if wanted is None else wanted
        error = float((logits - wanted).norm() / wanted.norm())
        rows.append({"tokens": length, "name": name, "ms": statistics.median(ms for ms, _ in times), "error": error})
        release(device)
    host = hosts(models["original"], models["lamp"], ids, args, device)
    for row in rows:
        row["host_ms"] = host.get(row["name"])
    rows.append({"tokens": length, "name": "slot", "ms": None, "error": None, "host_ms": host["slot"]})
    for row in rows:
        row["over_original"] = row["ms"] and row["ms"] / rows[0]["ms"]
        print({key: round(x, 4) if isinstance(x, float) else x for key, x in row.items()}, flush=True)
    return rows


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="8b", choices=tuple(_models.SHAPES))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--lengths", default="512,2048,8192,32768")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--profile", action="store_true", help="the host's time by function")
    parser.add_argument("--out", nargs="?", const="", help="JSON; a name is made up when left out")
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    model = _models.build(args.shape, None, device)
    fast = lamp_compile.compile(model, mode="eager")
    models, rows = {"original": model, "lamp": fast, "kernels": fast}, []
    if device.type == "cuda":
        models["reused"] = lamp_compile.compile(model, mode="reduce-overhead")
    for length in map(int, args.lengths.split(",")):
        rows += case(models, length, args, device)
    if args.out is not None:
        file = Path(args.out) if args.out else default_out("prompts", args.device)
        write_json(file, {**environment(device), "shape": args.shape, "repeats": args.repeats, "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
