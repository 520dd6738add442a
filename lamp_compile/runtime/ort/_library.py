"""The compiled core as a library of ONNX Runtime operators: where it lies, and why it cannot be used here."""

from __future__ import annotations

import ctypes
import os
from functools import cache
from pathlib import Path
from typing import Any

import lamp_compile

VARIABLE = "LAMP_CPU"
"""As for the torch kernels: an instruction set to use instead of the best, or "none"."""
PORTABLE = "the artifact's portable body of standard operators runs"


@cache
def path() -> Path | None:
    """The library, or None where the package was installed without a compiler."""
    file = Path(lamp_compile.__file__).parent / "runtime" / "kernels" / "cpu" / "_core.so"
    return file if file.exists() else None


@cache
def why_not() -> str | None:
    """Why the native operators cannot be used here, or None."""
    wanted = os.environ.get(VARIABLE, "")
    if wanted == "none":
        return f"{VARIABLE}=none"
    file = path()
    if file is None:
        return "the CPU kernels were not compiled when this package was installed (no C++ compiler?)"
    try:
        core = _load(file)
    except (OSError, AttributeError) as error:
        return f"the CPU kernels do not load: {error}"
    if wanted and core.lamp_use(wanted.encode()) != 0:
        return f"{VARIABLE}={wanted}: this machine has {core.lamp_instruction_sets().decode()}"
    return None


def instruction_set() -> str:
    """The one in use: "avx512", "avx2", "neon" or "portable"; empty without a library."""
    file = path()
    return "" if file is None or why_not() else str(_load(file).lamp_instruction_set().decode())


def _load(file: Path) -> Any:
    core = ctypes.CDLL(str(file))
    core.lamp_instruction_set.restype = core.lamp_instruction_sets.restype = ctypes.c_char_p
    _ = core.RegisterCustomOps  # a library of an older version has none
    return core
