"""What a backend is: it says why it cannot lower a program, or turns a rewritten graph into a callable."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch.fx import GraphModule


@dataclass(frozen=True)
class Backend:
    """One way to run a rewritten graph.

    Attributes:
        name: As given in ``lower=``.
        why_not: ``() -> reason`` it cannot be used here, or None.
        lower: ``(module, example inputs, mode, Inductor options) -> callable``.
    """

    name: str
    why_not: Callable[[], str | None]
    lower: Callable[[GraphModule, Sequence[Any], str | None, Mapping[str, Any]], Callable[..., Any]]
