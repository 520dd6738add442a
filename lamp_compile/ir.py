"""The nouns of the compiler: sites, refusals and levels. Plans live in ``plan.py``. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.fx import Node


class Floor(IntEnum):
    """Floor level of a kv head: the least precision the selector may choose. Raised by the guard."""

    RULE = 0
    """High plane where the rule allows it."""
    BOTH = 1
    """Both planes everywhere."""
    EXACT = 2
    """16-bit keys and values where the site has them; otherwise both planes, flagged."""


class Precision(IntEnum):
    """What ``lamp::select`` writes for one sub-tile of keys."""

    SKIP = 0
    """Not read: no live key in it, or below the opt-in skip threshold."""
    HIGH = 1
    """High plane only."""
    BOTH = 2
    """High and residual plane."""
    EXACT = 3
    """The original 16- or 32-bit tensors."""


@dataclass(frozen=True)
class CacheRef:
    """The packed planes and per-sequence state of one cache layer, as graph nodes (see ``runtime/ops.py``).

    ``nodes`` maps the tensor argument names of ``lamp::attention.cached`` (``k_high`` ... ``stats``, ``balance``,
    ``start``, ``lengths``, ``block_table``) to nodes or None; ``settings`` holds its attributes.
    """

    nodes: dict[str, Node | None]
    settings: dict[str, object]


@dataclass(frozen=True)
class AttentionSite:
    """One attention found in a graph, whatever its spelling.

    Shapes: q ``[B, H, S, D]``, k ``[B, G, N, D]``, v ``[B, G, N, Dv]`` with H query heads and G kv heads. ``mask`` is
    boolean (True = attend) and ``bias`` additive; both broadcast to ``[B, H, S, N]``.
    """

    name: str
    """Module path, such as ``model.layers.0.self_attn``; unique in the graph."""
    pattern: str
    """Name of the reader that claimed it."""
    root: Node
    """The node whose value is the attention output ``[B, H, S, Dv]``; it is what gets replaced."""
    q: Node
    k: Node | None
    v: Node | None
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    dtype: str
    mask: Node | None = None
    bias: Node | None = None
    causal: str = ""
    """``""``, ``"top_left"`` (key j visible to query i iff j <= i) or ``"bottom_right"`` (j <= i + N - S)."""
    window: int = 0
    """Sliding window in keys, counted back from the query's own position; 0 = none. Needs ``causal``."""
    scale: float | Node | None = None
    """Factor on q.k; None = 1 / sqrt(D); a Node when it is symbolic."""
    softcap: float = 0.0
    sinks: Node | None = None
    """Per-head logits ``[H]`` that join the softmax's denominator only."""
    cache: CacheRef | None = None
    absorbed: tuple[Node, ...] = field(default=(), compare=False)
    """Nodes between q.k and the root that the site replaces; dead code once it is rewritten."""
    stack_trace: str = field(default="", compare=False)

    @property
    def groups(self) -> int:
        """Query heads that share one kv head."""
        return self.heads // self.kv_heads


@dataclass(frozen=True)
class Refusal:
    """An attention, softmax or SDPA that stays as it is, and why."""

    site: str
    reason: str
    fix: str = ""
    pattern: str = ""
    node: str = ""


@dataclass(frozen=True)
class Found:
    """What the readers saw in a graph, in graph order."""

    sites: tuple[AttentionSite, ...]
    refusals: tuple[Refusal, ...]
    """Claimed by a reader but refused, with the reason."""
    unclaimed: tuple[Refusal, ...]
    """Softmax or SDPA roots that no reader recognised (a router's softmax ends here, and says so)."""
