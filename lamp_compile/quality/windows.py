"""Windows of real text, spread evenly over a file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lamp_compile.errors import InputError

Encode = Callable[[str], list[int]]
"""A tokenizer without special tokens: text -> token ids."""


def token_ids(path: str | Path, encode: Encode | None = None, *, vocabulary: int | None = None) -> Tensor:
    """All token ids of a file, int64 ``[N]``.

    Args:
        path: A UTF-8 text file, or token ids as little-endian unsigned 16-bit numbers in a file called ``*.u16``.
        encode: Tokenizer for text; not needed for ``*.u16``.
        vocabulary: Size of the model's vocabulary; ids beyond it are refused.

    Raises:
        InputError: The file is missing, empty, not UTF-8, of odd length, or holds ids the model does not know.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read the text: {error.strerror}", where=str(path), fix="check the path") from None
    if not data:
        raise InputError("the text file is empty", where=str(path), fix="a file with text, or *.u16 with token ids")
    if path.suffix == ".u16":
        if len(data) % 2:
            raise InputError(
                f"{len(data)} bytes are no whole number of 16-bit ids",
                where=str(path),
                fix="little-endian uint16 without a header",
            )
        ids = torch.from_numpy(np.frombuffer(data, dtype="<u2").astype(np.int64))
    else:
        ids = _encoded(data, path, encode)
    if vocabulary is not None and int(ids.max()) >= vocabulary:
        raise InputError(
            f"token id {int(ids.max())} is beyond the model's vocabulary of {vocabulary}",
            where=str(path),
            fix="ids made with this model's own tokenizer",
        )
    return ids


def spread(ids: Tensor, context: int, count: int, *, where: str = "text") -> Tensor:
    """``count`` windows of ``context`` ids, spread evenly: window i starts at ``i * ((N - context) // count)``.

    Returns:
        int64 ``[count, context]``.

    Raises:
        InputError: The text is shorter than one window, or the windows would overlap entirely.
    """
    if context < 2 or count < 1:
        raise InputError(
            f"{count} windows of {context} tokens measure nothing",
            where="context / max_tokens",
            fix="a context of at least 2 tokens and at least one window",
        )
    room = ids.numel() - context
    if room < 0 or (count > 1 and room // count < 1):
        raise InputError(
            f"{ids.numel()} tokens are too few for {count} windows of {context}",
            where=where,
            fix="a longer text, a shorter context, or fewer windows",
        )
    step = room // count
    return torch.stack([ids[i * step : i * step + context] for i in range(count)])


def _encoded(data: bytes, path: Path, encode: Encode | None) -> Tensor:
    if encode is None:
        raise InputError(
            "a text file needs a tokenizer", where=str(path), fix="pass `encode`, or give a *.u16 file of ids"
        )
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"not UTF-8 text: {error.reason}", where=str(path), fix="convert the file to UTF-8") from None
    ids = encode(text)
    if not text.strip() or not ids:
        raise InputError("the text holds no words", where=str(path), fix="a file with text")
    return torch.tensor(ids, dtype=torch.int64)
