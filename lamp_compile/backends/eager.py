"""Runs the rewritten graph node by node: for debugging, and wherever there is no compiler."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch.fx import GraphModule

from lamp_compile.backends._base import Backend
from lamp_compile.errors import OptionError


def _lower(
    module: GraphModule, inputs: Sequence[Any], mode: str | None, options: Mapping[str, Any]
) -> Callable[..., Any]:
    if options or mode not in (None, "default"):
        given = ", ".join([*(f"inductor.{name}" for name in options), *([f"mode={mode!r}"] if mode else [])])
        raise OptionError(f"{given} with lower='eager'", where="options", fix="lower='inductor', or leave it out")
    forward: Callable[..., Any] = module.forward
    return forward


BACKEND = Backend("eager", lambda: None, _lower)
