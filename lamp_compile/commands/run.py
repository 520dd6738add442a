"""``lamp-compile run``: let a model continue a prompt with and without LAMP."""

from __future__ import annotations

import argparse
from typing import Any

from lamp_compile.commands import _artifact, _options, _output
from lamp_compile.errors import InputError, OptionError

NAME, HELP = "run", "continue a prompt with and without LAMP, or with an ONNX artifact: text, speed, bytes of KV"


def add(parser: argparse.ArgumentParser) -> None:
    """State the options."""
    _options.model(parser)
    _options.plan(parser)
    parser.add_argument("--prompt-file", required=True, metavar="FILE", help="UTF-8 text, or token ids in a *.u16 file")
    parser.add_argument(
        "--max-new-tokens", type=_options.positive, default=64, metavar="N", help="tokens to write (default: 64)"
    )
    parser.add_argument(
        "--mode",
        choices=("auto", "default", "eager", "reduce-overhead"),
        default="auto",
        help="as of lamp_compile.compile",
    )
    parser.add_argument("--provider", metavar="NAME", help="of an .onnx artifact: cpu, cuda, migraphx, amd, rocm")
    parser.add_argument("--graph", action="store_true", help="of an artifact on CUDA: steps replay a CUDA graph")
    parser.add_argument("--tokenizer", metavar="FOLDER", help="of an .onnx artifact: the model folder it was made from")


def run(args: argparse.Namespace) -> int:
    """Write twice and compare; an ONNX artifact writes once."""
    if _artifact.is_artifact(args.model):
        return _artifact.run(args)
    for name in ("provider", "tokenizer", "graph"):
        if getattr(args, name):
            raise OptionError(f"--{name} belongs to an .onnx artifact", where=args.model, fix="leave it out")
    from lamp_compile import api
    from lamp_compile.commands import _measure
    from lamp_compile.quality import continuation, load, windows
    from lamp_compile.runtime import kernel_notes

    folder = load.model_folder(args.model)
    tokenizer = load.load_tokenizer(folder)
    ids = windows.token_ids(args.prompt_file, load.encoder(folder))
    model = load.load_model(folder, dtype="auto", device=args.device)
    longest = _measure.longest_context(model)
    if ids.numel() + args.max_new_tokens > longest:
        raise InputError(
            f"{ids.numel()} prompt tokens and {args.max_new_tokens} new ones, the model was made for {longest}",
            where=args.prompt_file,
            fix="a shorter prompt or a smaller --max-new-tokens",
        )
    prompt = ids[None].to(model.device)
    plain = continuation.write(model, prompt, args.max_new_tokens)
    fast_model = api.compile(model, mode=args.mode, **_options.compile_options(args))
    fast = continuation.write(fast_model, prompt, args.max_new_tokens)
    first = continuation.compare(plain, fast)
    notes = [note for note in fast_model.lamp.report().notes if note.startswith(kernel_notes.START)]
    if args.json:
        sides = {"uncompiled": _side(plain, tokenizer), "lamp": _side(fast, tokenizer)}
        about = {
            "prompt_tokens": ids.numel(),
            "dtype": str(model.dtype).removeprefix("torch."),
            "first_difference": first,
            "notes": notes,
        }
        _output.print_json({**about, **sides})
        return 0
    for title, side in (("uncompiled", plain), ("LAMP", fast)):
        print(f"{title}: {side.tokens_per_s:.1f} tokens/s, KV cache {side.kv_bytes:,} bytes")
        print(f"  {tokenizer.decode(side.ids)!r}")
    if first is None:
        print(f"the {len(plain.ids)} tokens are the same")
    else:
        print(f"first differing token: number {first + 1} of {len(plain.ids)}")
    print(f"seconds before the timed call: {plain.warm_up_s:.1f} uncompiled, {fast.warm_up_s:.1f} LAMP")
    for note in notes:
        print(f"note: {note}")
    return 0


def _side(written: Any, tokenizer: Any) -> dict[str, Any]:
    return {**vars(written), "text": tokenizer.decode(written.ids)}
