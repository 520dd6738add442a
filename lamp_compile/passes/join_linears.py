"""Linear layers that read the same input become one product over their joined weights, and slices of its result.

For graphs of Dynamo's, whose weights are inputs. The weights are moved so that they lie one behind the other
(``runtime.joined_weights``) and enter the graph once more, as the one tensor that this makes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Node

from lamp_compile.passes._effects import why_not_restrided, writes
from lamp_compile.passes.capture import Program
from lamp_compile.passes.patterns._dialect import aten
from lamp_compile.passes.patterns._values import Emitter, tensor, value_key
from lamp_compile.passes.state_host import Host, host_for
from lamp_compile.runtime import joined_weights
from lamp_compile.runtime.joined_weights import JoinedWeights

LINEAR = (F.linear, aten.linear.default)
READERS = (*LINEAR, F.embedding, torch.embedding, aten.embedding.default)
"""What may read a weight besides: nothing that could write it, or hand it out of the graph."""
START = "linear layers "


@dataclass
class Joined:
    """What was done to a graph.

    Attributes:
        weights: Gives the joined tensors to append to the graph's arguments, at every call.
        inputs: The same as a compiler wants its example inputs.
        products: Products made of several layers.
        layers: Layers that they stand for.
        apart: Layers that read the same input and were left as they are, by reason.
    """

    weights: JoinedWeights = field(default_factory=JoinedWeights)
    inputs: list[Tensor] = field(default_factory=list)
    products: int = 0
    layers: int = 0
    apart: Counter[str] = field(default_factory=Counter)

    @property
    def notes(self) -> tuple[str, ...]:
        """For the report."""
        found = []
        if self.layers:
            done = f"joined: {self.products} products instead of {self.layers}"
            found.append(f"{START}{done} (weights of one input lie together; nothing is held twice)")
        for reason, layers in self.apart.items():
            found.append(f"{START}left apart though they read one input: {layers} ({reason})")
        return tuple(found)


@dataclass(frozen=True)
class _Layer:
    node: Node
    x: Node
    weight: Node
    bias: Node | None
    size: int


def join_linears(program: Program, inputs: Sequence[Any], device: str | None = None, count: bool = False) -> Joined:
    """Join the linear layers of a captured graph of Dynamo's, in place.

    Args:
        program: The captured graph.
        inputs: What it is called with; parameters among them are moved.
        device: Only layers on this type of device.
        count: Move and change nothing, only say what would be done.
    """
    join = _Join(program, inputs, count)
    for layers in _groups(program, join.given, device):
        join.group(layers)
    if join.done.layers and not count:
        program.graph.lint()
        program.module.recompile()
        join.done.inputs = join.host.inputs()
    return join.done


def _groups(program: Program, given: dict[Node, Tensor], device: str | None) -> Iterable[list[_Layer]]:
    """Layers of one input with nothing written between them, in order; each weight once."""
    stretch, found = 0, cast(dict[Any, list[_Layer]], {})
    for node in program.graph.nodes:
        stretch += writes(node)
        layer = _layer(node, given)
        if layer is None or (device is not None and given[layer.weight].device.type != device):
            continue
        weight = given[layer.weight]
        key = (stretch, layer.x, layer.bias is None, weight.dtype, weight.device)
        group = found.setdefault(key, [])
        if all(layer.weight is not other.weight and layer.bias is not (other.bias or 0) for other in group):
            group.append(layer)
    return [group for group in found.values() if len(group) > 1]


def _layer(node: Node, given: dict[Node, Tensor]) -> _Layer | None:
    """A linear layer of a weight ``[N, K]`` that is a parameter, and a bias ``[N]`` that is one or none."""
    if node.op != "call_function" or node.target not in LINEAR:
        return None
    names = enumerate(("input", "weight", "bias"))
    x, weight, bias = (cast(Any, node.args[i] if i < len(node.args) else node.kwargs.get(name)) for i, name in names)
    parameters: list[Node] = [weight] if bias is None else [weight, bias]
    if not isinstance(x, Node) or not all(isinstance(p, Node) and p in given for p in parameters):
        return None
    seen, made = tensor(x), tensor(node)
    dtypes = {None if t is None else t.dtype for t in (seen, made, *(given[p] for p in parameters))}
    # Under autocast a layer answers in another dtype than it is asked in.
    if len(dtypes) > 1 or given[weight].dim() != 2 or any(given[p].dim() != 1 for p in parameters[1:]):
        return None
    if any(user.target not in READERS for p in parameters for user in p.users):
        return None
    return _Layer(node, x, weight, bias, given[weight].shape[0])


class _Join:
    """Joins groups of one graph."""

    def __init__(self, program: Program, inputs: Sequence[Any], count: bool) -> None:
        placeholders = [node for node in program.graph.nodes if node.op == "placeholder"]
        # Placeholders that other passes appended have no example among the inputs.
        self.given: dict[Node, Tensor] = {
            n: x for n, x in zip(placeholders, inputs, strict=False) if type(x) is nn.Parameter
        }
        self.position = {node: index for index, node in enumerate(placeholders)}
        self.program, self.count, self.done = program, count, Joined()
        self.host: Host = host_for(program)
        self._columns: dict[tuple[Node, ...], Node | None] = {}
        self._taken: set[Node] = set()

    def group(self, layers: list[_Layer]) -> None:
        """Join these layers, those of them that can be; else note why not."""
        kept = self._movable(layers)
        if len(kept) < 2:
            return
        changed, reason = self._restrided(kept)
        if reason is None and not self.count:
            reason = self._move(kept)
        if reason is not None:
            self.done.apart[reason] += len(kept)
            return
        for column in _columns(kept):
            self._columns.setdefault(column)
            self._taken.update(column)
        self.done.products += 1
        self.done.layers += len(kept)
        if not self.count:
            self._replace(kept, changed)

    def _movable(self, layers: list[_Layer]) -> list[_Layer]:
        """The layers whose parameters lie together or can be moved."""
        if all(column in self._columns or self._fits(column) for column in _columns(layers)):
            return layers
        kept = []
        for layer in layers:
            reasons = (self._why_not(node) for column in _columns([layer]) for node in column)
            if (reason := next(filter(None, reasons), None)) is None:
                kept.append(layer)
            else:
                self.done.apart[reason] += 1
        return kept

    def _fits(self, column: tuple[Node, ...]) -> bool:
        parts = self._parts(column)
        if joined_weights.together(parts):
            return True
        return self._taken.isdisjoint(column) and joined_weights.why_not(parts) is None

    def _why_not(self, node: Node) -> str | None:
        if node in self._taken:
            return "their weights lie in another group"
        return joined_weights.why_not_move(self.given[node])

    def _restrided(self, layers: list[_Layer]) -> tuple[dict[Node, Any], str | None]:
        """The values that come out with other strides, by node, and why that cannot be."""
        first, start, changed = layers[0], 0, {}
        x = tensor(first.x)
        assert x is not None
        total = sum(layer.size for layer in layers)
        with torch.no_grad():
            joined = F.linear(x, x.new_empty(total, x.shape[-1]))
            for layer in layers:
                changed[layer.node] = joined[..., start : start + layer.size]
                start += layer.size
        return changed, why_not_restrided(first.node, changed)

    def _move(self, layers: list[_Layer]) -> str | None:
        for parts in map(self._parts, _columns(layers)):
            try:
                if not joined_weights.together(parts):
                    joined_weights.bring_together(parts)
            except torch.OutOfMemoryError:
                return "no memory to move their weights"
        return None

    def _replace(self, layers: list[_Layer], changed: dict[Node, Any]) -> None:
        first, start = layers[0], 0
        emit = Emitter(first.node)
        out = emit.call(first.node.target, first.x, *map(self._joined, _columns(layers)))
        key = value_key(self.program.graph)
        slices = []
        for layer in layers:
            slices.append(emit.call(aten.slice.Tensor, out, -1, start, start + layer.size))
            start += layer.size
        for layer, made in zip(layers, slices, strict=True):
            layer.node.replace_all_uses_with(made)
            self.program.graph.erase_node(layer.node)
        for node, value in changed.items():
            node.meta[key] = value

    def _joined(self, column: tuple[Node, ...]) -> Node:
        """The input of the graph that is these parameters as one tensor."""
        node = self._columns[column]
        if node is None:
            whole = self.done.weights.add([self.position[n] for n in column], self._parts(column))
            node = self._columns[column] = self.host.node(f"joined {len(self.host.tensors)}", "parameters", whole)
        return node

    def _parts(self, column: Iterable[Node]) -> list[Tensor]:
        return [self.given[node] for node in column]


def _columns(layers: Sequence[_Layer]) -> list[tuple[Node, ...]]:
    """Their weights, and their biases if they have any."""
    biases = tuple(layer.bias for layer in layers if layer.bias is not None)
    return [tuple(layer.weight for layer in layers), *([biases] if biases else [])]
