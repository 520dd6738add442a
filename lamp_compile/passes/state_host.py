"""How changeable tensors (tau, floor, budget, guard state) enter a graph, so that changing them recompiles nothing.

Each kind of program has its own way in: a Dynamo graph gets placeholders at the end of its inputs, an FX graph
registered buffers, an ExportedProgram buffers in its signature and state dict.
"""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor
from torch._dynamo.source import LocalSource
from torch._guards import TracingContext
from torch.export import ExportedProgram
from torch.export.graph_signature import ExportGraphSignature, InputKind, InputSpec, TensorArgument
from torch.fx import Graph, GraphModule, Node

from lamp_compile.passes.capture import Program
from lamp_compile.passes.patterns._values import fake_mode, value_key

PREFIX = "lamp"


class Host:
    """Gives each changeable tensor a place in one program's graph."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.tensors: dict[str, Tensor] = {}
        self._nodes: dict[tuple[str, str], Node] = {}
        self._mode, self._key = fake_mode(program.graph), value_key(program.graph)

    def node(self, site: str, field: str, tensor: Tensor) -> Node:
        """The node that reads ``tensor``; the same node when asked twice."""
        if (site, field) not in self._nodes:
            name = self._name(site, field)
            node = self._make(name, tensor)
            node.meta[self._key] = (
                self._mode.from_tensor(tensor, static_shapes=True) if self._mode is not None else tensor
            )
            self.tensors[name] = tensor
            self._nodes[site, field] = node
        return self._nodes[site, field]

    @property
    def appended(self) -> list[Tensor]:
        """Tensors that a caller must append to the program's own inputs."""
        return []

    def inputs(self) -> list[Tensor]:
        """``appended`` as a compiler wants its example inputs."""
        return []

    def finish(self) -> Any:
        """The rewritten program, of the type that was handed in."""
        return self.program.module

    def _name(self, site: str, field: str) -> str:
        base = name = f"{PREFIX}_{re.sub(r'[^0-9A-Za-z]+', '_', site)}_{field}"
        number = 2
        while name in self.tensors or self._taken(name):
            name, number = f"{base}_{number}", number + 1
        return name

    def _taken(self, name: str) -> bool:
        return hasattr(self.program.module, name)

    def _make(self, name: str, tensor: Tensor) -> Node:
        raise NotImplementedError


class DynamoHost(Host):
    """Placeholders after the graph's own; the compiled function is called with the tensors appended."""

    def _make(self, name: str, tensor: Tensor) -> Node:
        graph: Graph = self.program.graph
        last = [node for node in graph.nodes if node.op == "placeholder"]
        with graph.inserting_after(last[-1]) if last else graph.inserting_before():
            node = graph.placeholder(name)
        # AOTAutograd wants a source for every input of a Dynamo graph; "unguarded" marks the address as fixed, so that
        # CUDA graphs accept the in-place update of the guard's state.
        node._dynamo_source = LocalSource(name)
        node.meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"}
        return node

    @property
    def appended(self) -> list[Tensor]:
        return list(self.tensors.values())

    def inputs(self) -> list[Tensor]:
        context = TracingContext.try_get()
        mode = context.fake_mode if context is not None else None
        # Fake ones of fixed size: under dynamic=True a real tensor would get a symbol for its number of heads.
        return [t if mode is None else mode.from_tensor(t, static_shapes=True) for t in self.appended]


class BufferHost(Host):
    """Buffers of the graph module."""

    def _make(self, name: str, tensor: Tensor) -> Node:
        module: GraphModule = self.program.module
        module.register_buffer(name, tensor)
        first = next(node for node in module.graph.nodes if node.op != "placeholder")
        with module.graph.inserting_before(first):
            return module.graph.get_attr(name)


class ExportedHost(Host):
    """Buffers in the signature and the state dict; ``finish`` gives the new ExportedProgram."""

    def __init__(self, program: Program) -> None:
        super().__init__(program)
        self._specs: list[InputSpec] = []
        self._anchor = next(iter(program.graph.nodes))

    def _make(self, name: str, tensor: Tensor) -> Node:
        graph = self.program.graph
        with graph.inserting_before(self._anchor):
            node = graph.placeholder(f"b_{name}")
        self._specs.append(InputSpec(InputKind.BUFFER, TensorArgument(node.name), name, persistent=True))
        return node

    def _taken(self, name: str) -> bool:
        original: ExportedProgram = self.program.original
        inputs = (node.name for node in self.program.graph.nodes if node.op == "placeholder")
        return name in original.state_dict or name in original.constants or f"b_{name}" in inputs

    def finish(self) -> ExportedProgram:
        original: ExportedProgram = self.program.original
        signature = original.graph_signature
        changed = ExportGraphSignature([*self._specs, *signature.input_specs], list(signature.output_specs))
        self.program.module.recompile()
        return ExportedProgram(
            root=self.program.module,
            graph=self.program.graph,
            graph_signature=changed,
            state_dict={**original.state_dict, **self.tensors},
            range_constraints=dict(original.range_constraints),
            module_call_graph=original.module_call_graph,
            example_inputs=original.example_inputs,
            constants=original.constants,
            verifiers=original.verifiers,
        )


def host_for(program: Program) -> Host:
    """The way in for this kind of program."""
    kinds: dict[str, type[Host]] = {"dynamo": DynamoHost, "graph_module": BufferHost, "exported": ExportedHost}
    return kinds[program.kind](program)
