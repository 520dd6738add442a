"""What a pattern is: it anchors on one kind of node, walks back, and returns a site, refuses, or does not match."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch.fx import Node

from lamp_compile.ir import AttentionSite
from lamp_compile.passes.patterns._dialect import Call
from lamp_compile.passes.patterns._values import Emitter


class NoMatch(Exception):
    """This node is not what the pattern reads; the message says what is missing."""


class Refuse(Exception):
    """This is an attention, and it stays as it is.

    Args:
        reason: Why, in one clause.
        fix: What the reader can do about it.
        training: The graph was captured in training mode.
    """

    def __init__(self, reason: str, fix: str = "", *, training: bool = False) -> None:
        super().__init__(reason)
        self.reason, self.fix, self.training = reason, fix, training


Read = Callable[[Node, Call, Emitter], AttentionSite]
Expand = Callable[[Node, Call, Emitter], None]


@dataclass(frozen=True)
class Pattern:
    """One spelling of attention.

    Attributes:
        name: Shown in reports.
        roots: Canonical operators (``_dialect``) that the reader anchors on.
        read: ``(root, call, emitter) -> AttentionSite``; raises ``NoMatch`` or ``Refuse``. It may add pure nodes
            through the emitter (a transpose, a sum of two biases), which are taken back unless it returns a site. The
            caller fills in the site's name.
        operators: Targets that ``_dialect`` does not know, with the names of their parameters. They are read as an
            operator called like the pattern, so that a spelling with an operator of its own is one file.
        expand: For operators that hold more than attention: replaces the root by smaller ones that another pattern
            then reads; raises ``NoMatch`` or ``Refuse``.
    """

    name: str
    roots: tuple[str, ...]
    read: Read | None = None
    expand: Expand | None = None
    operators: Mapping[Any, tuple[str, ...]] = field(default_factory=dict)
