"""What the CPU's core hands on when torch calls it (``kernels/cpu/core/torch_ops.cpp``): calls that it does not serve,
and wrong ones. They go to private operators written in Python, through torch's C interface, which loses what is raised.
"""

from __future__ import annotations

import ctypes
import re
import threading
import traceback
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch

from lamp_compile.runtime import kernels

_refused = threading.local()


def define(library: Any, name: str, schema: str, run: Callable[..., Any], nothing: Callable[..., Any]) -> None:
    """``lamp::_<name>_checked``, which does what ``run`` does.

    Args:
        library: Where it is defined.
        name: The operator that hands calls on to it.
        schema: Of that operator. Words arrive as addresses of their bytes.
        run: The operator in Python.
        nothing: From the same arguments, what is returned where ``run`` raises; nobody sees it.
    """
    kinds = schema[1 : schema.rindex(") ->")].split(", ")
    words = [place for place, kind in enumerate(kinds) if kind.startswith("str ")]

    def checked(*args: Any) -> Any:
        given = list(args)
        for place in words:
            given[place] = ctypes.string_at(given[place]).decode()
        try:
            return run(*given)
        except BaseException as error:
            text = str(error) or repr(error)
            if not kernels.cpu.refuse(text):
                raise
            _refused.error = text, error.with_traceback(_without_locals(error.__traceback__))
            return nothing(*given)

    library.define(f"_{name}_checked" + re.sub(r"\bstr (\w+)(='')?", r"int \1", schema))
    library.impl(f"_{name}_checked", checked, "CompositeExplicitAutograd")


def _without_locals(where: TracebackType | None) -> TracebackType | None:
    """Where an error was raised, behind the frame that caught it, without the tensors that its frames hold."""
    behind = where.tb_next if where else None
    traceback.clear_frames(behind)
    return behind


def raise_by_type(name: str) -> None:
    """Have ``torch.ops.lamp.<name>`` raise what ``_<name>_checked`` raised: an InputError or CacheError, as where torch
    calls Python. The core can raise but RuntimeErrors with the same words."""
    packet = getattr(torch.ops.lamp, name)
    for operator in (packet, packet.default):
        if hasattr(operator, "_op"):  # what both call; without it there is the RuntimeError
            operator._op = _typed(operator._op)
    register = getattr(torch.jit._builtins, "_register_builtin", None)
    if register is not None:  # torch.jit.script knows operators by what they call
        register(packet._op, f"lamp::{name}")


def _typed(plain: Callable[..., Any]) -> Callable[..., Any]:
    def op(*args: Any, **options: Any) -> Any:
        try:
            return plain(*args, **options)
        except RuntimeError as error:
            text, found = getattr(_refused, "error", None) or ("", None)
            _refused.error = None
            if found is None or text != str(error):
                raise
            try:
                raise found from found.__cause__
            finally:
                del found  # whose frames hold this one

    op.__name__, op.__module__ = plain.__name__, plain.__module__
    return op
