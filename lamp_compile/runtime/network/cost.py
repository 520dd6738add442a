"""What a look-ahead costs in one decode step of one sequence, from shapes alone: operations and bytes.

A multiplication with its addition counts as two operations, any other arithmetic on one number as one. Bytes are those
read from and written to memory: weights in 16 bits, keys and values in ``nested8`` with a tenth of them refined. The
pooling of a new key reads its group of keys, the projections' weights are read once.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from lamp_compile.runtime.network.gate import AGES

REFINED = 0.1
WEIGHT_BYTES = 2
SUMMARY_BYTES = 2


@dataclass(frozen=True)
class Shape:
    """One attention site: H, G, D and Dv."""

    heads: int
    kv_heads: int
    dim: int
    value_dim: int


@dataclass(frozen=True)
class Cost:
    """Operations and bytes of one decode step."""

    operations: float
    bytes: float

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.operations + other.operations, self.bytes + other.bytes)

    def share_of(self, whole: Cost) -> dict[str, float]:
        """As shares of another cost."""
        return {"operations": self.operations / whole.operations, "bytes": self.bytes / whole.bytes}


def attention(shape: Shape, keys: int) -> Cost:
    """Attention of one token over ``keys`` stored keys, without a look-ahead of its own."""
    operations = 2 * shape.heads * keys * (shape.dim + shape.value_dim) + 5 * shape.heads * keys
    width = shape.dim + shape.value_dim
    return Cost(operations, shape.kv_heads * keys * (width / 2 * (1 + REFINED) + 4))


def model(linear_weights: int, shapes: Iterable[Shape], keys: int) -> Cost:
    """The whole model: its linear layers (each weight read once and multiplied once) and all attentions."""
    total = Cost(2 * linear_weights, WEIGHT_BYTES * linear_weights)
    for shape in shapes:
        total = total + attention(shape, keys)
    return total


def exact(shapes: Iterable[Shape], keys: int) -> Cost:
    """The exact look-ahead: scores of all keys from the high plane, softmax, squares by sub-tile."""
    total = Cost(0.0, 0.0)
    for shape in shapes:
        operations = 2 * shape.heads * keys * shape.dim + 5 * shape.heads * keys
        total = total + Cost(operations, shape.kv_heads * keys * (shape.dim / 2 + 2))
    return total


def network(shapes: Iterable[Shape], keys: int, *, rank: int, group: int, subtile: int) -> Cost:
    """The gates: project the query, score the summaries, summarise the new key's group."""
    total = Cost(0.0, 0.0)
    groups, tiles = -(-keys // group), -(-keys // subtile)
    for shape in shapes:
        heads, kv_heads, dim = shape.heads, shape.kv_heads, shape.dim
        operations = (
            2 * heads * dim * rank + heads * groups * (2 * rank + 7) + heads * tiles * 20 + kv_heads * tiles * 4
        )
        operations += kv_heads * group * dim * 3 + 2 * kv_heads * dim * rank
        moved = kv_heads * groups * rank * SUMMARY_BYTES + kv_heads * tiles * 2 * 4 * 2 + kv_heads * group * (dim + 2)
        moved += WEIGHT_BYTES * (heads * (dim * rank + rank + AGES + 4) + kv_heads * (dim * rank + rank))
        total = total + Cost(operations, moved)
    return total
