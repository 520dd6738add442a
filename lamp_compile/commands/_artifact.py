"""``lamp-compile run artifact.onnx``: continue a prompt with an exported artifact on ONNX Runtime."""

from __future__ import annotations

import argparse
import time
from typing import Any

from lamp_compile.commands import _output
from lamp_compile.errors import InputError, OptionError


def is_artifact(name: str) -> bool:
    """Whether MODEL is a file to be run by ONNX Runtime."""
    return name.endswith(".onnx")


def run(args: argparse.Namespace) -> int:
    """Write once, and say where and how fast."""
    from lamp_compile.quality import load, windows
    from lamp_compile.runtime.ort.session import OrtSession

    fixed = [name for name in ("preset", "balance", "linears", "settings", "plan") if getattr(args, name)]
    if fixed:
        raise OptionError(
            f"--{fixed[0].replace('settings', 'set')} with an artifact",
            where=args.model,
            fix="export it anew; its plan is in the file",
        )
    text = not str(args.prompt_file).endswith(".u16")
    if text and not args.tokenizer:
        raise InputError(
            "an artifact has no tokenizer", where=args.prompt_file, fix="--tokenizer FOLDER, or token ids as *.u16"
        )
    tokenizer = load.load_tokenizer(args.tokenizer) if args.tokenizer else None
    ids = windows.token_ids(args.prompt_file, load.encoder(args.tokenizer) if text else None)
    session = OrtSession(args.model, provider=args.provider or args.device, graph=args.graph)
    began, first, made = time.perf_counter(), 0.0, []
    for _, token in session.stream([ids.numpy()], max_new_tokens=args.max_new_tokens):
        first = first or time.perf_counter() - began
        made.append(token)
    rest = time.perf_counter() - began - first
    speed = (len(made) - 1) / rest if len(made) > 1 else 0.0
    about: dict[str, Any] = {
        "provider": session.provider,
        "native": session.native,
        "prompt_tokens": int(ids.numel()),
        "seconds_to_first_token": first,
        "tokens_per_s": speed,
        "kv_bytes": session.nbytes,
        "guard": session.guard_report(),
        "placement": session.placement(),
        "notes": session.notes,
        "ids": made,
        "text": tokenizer.decode(made) if tokenizer else None,
    }
    if args.json:
        _output.print_json(about)
        return 0
    how = "native operators" if session.native else "the artifact's own bodies"
    print(f"{session.provider}, {how}: {speed:.1f} tokens/s, KV cache {session.nbytes:,} bytes")
    print(f"  {about['text']!r}" if tokenizer else f"  {made}")
    refined = [site["refined_share"] for site in about["guard"]]
    if refined:
        print(f"refined sub-tiles: {sum(refined) / len(refined):.1%}; first token after {first:.2f} s")
    return 0
