"""Programs whose linear layers are joined, for tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lamp_compile.passes.capture import capture
from lamp_compile.passes.join_linears import LINEAR, Joined, join_linears
from lamp_compile.runtime.joined_weights import together


class Joining:
    """A backend that joins, runs the graph node by node, and remembers."""

    def __init__(self) -> None:
        self.graphs: list[torch.fx.Graph] = []
        self.done: list[Joined] = []
        self.counted: list[tuple[str, ...]] = []

    def __call__(self, module: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        self.counted.append(join_linears(capture(module, inputs), inputs, count=True).notes)
        program = capture(module, inputs)
        done = join_linears(program, inputs)
        self.graphs.append(program.graph)
        self.done.append(done)
        return lambda *args: program.module(*args, *done.weights.tensors(args))

    @property
    def products(self) -> int:
        return sum(node.target in LINEAR for node in self.graphs[-1].nodes)


class Block(nn.Module):
    """Grouped-query attention without a cache, and a gated MLP."""

    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(64, n, bias=bias) for n in (64, 32, 32))
        self.o, self.down = nn.Linear(64, 64, bias=False), nn.Linear(96, 64, bias=False)
        self.gate, self.up = nn.Linear(64, 96, bias=False), nn.Linear(64, 96, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (-1, 16)).transpose(1, 2) for p in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.o(y.transpose(1, 2).flatten(2))
        return x + self.down(F.silu(self.gate(x)) * self.up(x))


def run(model: nn.Module | Callable[..., Any], *args: Any, backend: Any = None, **kwargs: Any) -> tuple[Any, Any]:
    """(what it gives when its linear layers are joined, the backend); counting ahead must have said the same."""
    torch._dynamo.reset()
    made = backend or Joining()
    with torch.no_grad():
        out = torch.compile(model, backend=made, fullgraph=True, **kwargs)(*args)
    if backend is None:
        assert made.counted == [done.notes for done in made.done]
    return out, made


def joined(*layers: nn.Module) -> bool:
    """Whether the weights of these layers lie together, each in a storage of its own."""
    weights = [layer.weight for layer in layers]
    sizes = [(w.untyped_storage().nbytes(), w.storage_offset()) for w in weights]
    return together(weights) and sizes == [(w.nbytes, 0) for w in weights]
