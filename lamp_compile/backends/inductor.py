"""Compiles the rewritten graph with TorchInductor. Nothing is set process-wide."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.fx import GraphModule

from lamp_compile.backends._base import Backend
from lamp_compile.errors import OptionError


def _lower(
    module: GraphModule, inputs: Sequence[Any], mode: str | None, options: Mapping[str, Any]
) -> Callable[..., Any]:
    from torch._inductor.compile_fx import compile_fx

    from lamp_compile.backends._few_rows import spell_out

    spell_out(module)
    patches = {**mode_options(mode), **check(options)}
    with torch.no_grad():
        compiled: Callable[..., Any] = compile_fx(module, list(inputs), config_patches=patches)
    return compiled


def mode_options(mode: str | None) -> dict[str, Any]:
    """Inductor's settings of a ``torch.compile`` mode.

    Raises:
        OptionError: Unknown mode.
    """
    modes: dict[str, dict[str, Any]] = torch._inductor.list_mode_options()
    if mode in (None, "default"):
        return {}
    if mode not in modes:
        raise OptionError(f"unknown mode {mode!r}", where="mode", fix=f"one of {', '.join(modes)}")
    return dict(modes[str(mode)])


def check(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options, once Inductor knows their names.

    Raises:
        OptionError: It does not.
    """
    known = torch._inductor.list_options()
    for name in options:
        if name.replace("-", "_") not in known:
            raise OptionError(
                f"unknown Inductor option {name!r}", where=f"inductor.{name}", fix="see torch._inductor.list_options()"
            )
    return dict(options)


BACKEND = Backend("inductor", lambda: None, _lower)
