"""What the subcommands write: JSON on standard output, progress on a terminal only."""

from __future__ import annotations

import io
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lamp_compile.errors import InputError


def print_json(data: Any) -> None:
    """One JSON object on standard output. What is no number is spelled out, since JSON has no NaN."""
    print(json.dumps(_plain(data), indent=2, allow_nan=False))


def write(path: Path, text: str) -> None:
    """Write a text file.

    Raises:
        InputError: It cannot be written.
    """
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot write it: {error.strerror}", where=str(path), fix="another path") from None


def progress(total: int, title: str) -> Callable[[str], None]:
    """``step(what)`` moves a progress bar on standard error; nothing is shown where that is not a terminal."""
    from tqdm import tqdm

    bar = tqdm(total=total, desc=title, leave=False, disable=not sys.stderr.isatty())

    def step(what: str) -> None:
        bar.set_postfix_str(what, refresh=False)
        bar.update(1)
        if bar.n >= total:
            bar.close()

    return step


def print_anything() -> None:
    """Write what the terminal's encoding lacks as escapes; a model may write any character."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def quiet_loading() -> None:
    """No loading bars of transformers where standard error is not a terminal. For this process, which is ours."""
    if sys.stderr.isatty():
        return
    try:
        from transformers.utils.logging import disable_progress_bar
    except ImportError:
        return
    disable_progress_bar()


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value
