"""Time to the first token: a prompt into an empty cache, by the original model and by lamp.

    python benchmarks/prompts.py --shape 8b --lengths 512,2048,8192,32768 --out

Rows: original (transformers, SDPA, DynamicCache), lamp (``generate`` of a compiled model), kernels (the same with
attention over the planes that were just written, as it was before prompts attended to what came). Eager in all three,
as ``generate`` reads prompts. Medians; on random weights, for speed. Logits of the last position are compared.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import _models
import torch
from _timing import release, synchronize
from decode_kernel import default_out

import lamp_compile
from lamp_compile.quality.environment import environment, write_json
from lamp_compile.runtime import prompt

ROWS = ("original", "lamp", "kernels")


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
    for row in rows:
        row["over_original"] = row["ms"] / rows[0]["ms"]
        print({key: round(x, 4) if isinstance(x, float) else x for key, x in row.items()}, flush=True)
    return rows


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="8b", choices=tuple(_models.SHAPES))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--lengths", default="512,2048,8192,32768")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", nargs="?", const="", help="JSON; a name is made up when left out")
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    model = _models.build(args.shape, None, device)
    fast = lamp_compile.compile(model, mode="eager")
    models, rows = {"original": model, "lamp": fast, "kernels": fast}, []
    for length in map(int, args.lengths.split(",")):
        rows += case(models, length, args, device)
    if args.out is not None:
        file = Path(args.out) if args.out else default_out("prompts", args.device)
        write_json(file, {**environment(device), "shape": args.shape, "repeats": args.repeats, "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
