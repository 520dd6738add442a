"""From command-line options to an evaluation. Heavy: imported by ``run`` functions only."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lamp_compile import api
from lamp_compile.commands import _options
from lamp_compile.errors import InputError
from lamp_compile.quality import load, windows
from lamp_compile.quality.engine import CompiledEngine
from lamp_compile.quality.evaluate import Evaluation

LONGEST_DEFAULT = 4096


@dataclass(frozen=True)
class Measured:
    """A model in float32 and windows of text to measure it on."""

    model: Any
    windows: Tensor
    ids: Tensor
    """The whole text."""

    def evaluation(self, args: argparse.Namespace, on_window: Callable[[str], None]) -> Evaluation:
        """Every row compiled as the command line says."""
        options = _options.compile_options(args)

        def engine(model: nn.Module, balance: str) -> CompiledEngine:
            return CompiledEngine(api.compile(model, mode="eager", **options))

        return Evaluation(self.model, self.windows, engine, on_window=on_window)

    def network_engine(self, args: argparse.Namespace) -> CompiledEngine:
        """The model with the look-ahead network of ``--lookahead``."""
        options = {**_options.compile_options(args), "lookahead": args.lookahead}
        return CompiledEngine(api.compile(self.model, mode="eager", **options))

    def engine(self, args: argparse.Namespace) -> CompiledEngine:
        """The model compiled as the command line says."""
        return CompiledEngine(api.compile(self.model, mode="eager", **_options.compile_options(args)))

    def describe(self, args: argparse.Namespace) -> dict[str, Any]:
        """What was measured on what, for reports."""
        return {
            "model": Path(args.model).resolve().name,
            "text": Path(args.text).name,
            "windows": self.windows.shape[0],
            "context": self.windows.shape[1],
        }


def prepare(args: argparse.Namespace, *, usual: int = LONGEST_DEFAULT, least: int = 1) -> Measured:
    """Load the model and cut the text.

    Args:
        args: Of the command line.
        usual: Context where none was asked for, if model and text are long enough.
        least: Windows that are needed.

    Raises:
        InputError: The model folder, the text or the context cannot be used.
        ModelError: The model cannot be loaded.
    """
    folder = load.model_folder(args.model)
    encode = None if args.text.endswith(".u16") else load.encoder(folder)
    windows.token_ids(args.text, encode or (lambda text: [0]))  # a bad file is found before the model is loaded
    model = load.load_model(folder, device=args.device)
    ids = windows.token_ids(args.text, encode, vocabulary=model.config.get_text_config(decoder=True).vocab_size)
    longest = longest_context(model)
    context = args.context or min(longest, usual, ids.numel() // least)
    if context > longest:
        raise InputError(
            f"a context of {context} tokens, the model has {longest}", where="--context", fix=f"--context {longest}"
        )
    count = max(least, min(args.max_tokens, ids.numel()) // context)
    return Measured(model, windows.spread(ids, context, count, where=args.text), ids)


def longest_context(model: Any) -> int:
    """Tokens that the model was made for."""
    found = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 0 else LONGEST_DEFAULT
