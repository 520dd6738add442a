"""What an artifact may hold for each target, and a lint that looks.

``portable`` and ``cpu`` unpack with bit operations and multiply integers, which ONNX Runtime's CPU provider has.
``cuda`` and ``migraphx`` do both in float: neither provider has the bit operations, and a node that a provider lacks
goes to the CPU, with copies both ways. Where there is no control flow a CUDA graph can be captured.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lamp_compile.errors import OptionError
from lamp_compile.frontends.onnx.form import GUARDS

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto


@dataclass(frozen=True)
class Target:
    """One target.

    Attributes:
        name: What the user calls it.
        arithmetic: ``Form.arithmetic``.
        guard: ``Form.guard`` where the user does not choose.
        opset: Of the model.
        forbidden: Operators that its provider does not have, or reads as something else.
        cast_pairs: Whether a cast to fewer bits and back may be relied on.
        providers: Of ONNX Runtime, best first.
    """

    name: str
    arithmetic: str
    guard: str
    opset: int
    forbidden: tuple[str, ...] = ()
    cast_pairs: bool = True
    providers: tuple[str, ...] = ("CPUExecutionProvider",)


BITS = ("BitShift", "BitwiseAnd", "BitwiseNot", "BitwiseOr", "BitwiseXor", "BitCast")
TARGETS = {
    target.name: target
    for target in (
        Target("portable", "integer", "if", 20),
        Target("cpu", "integer", "if", 20),
        Target("cuda", "float", "select", 20, forbidden=BITS, providers=("CUDAExecutionProvider",)),
        Target(
            "migraphx", "float", "select", 18, forbidden=(*BITS, "Attention", "TensorScatter"), cast_pairs=False,
            providers=("MIGraphXExecutionProvider",),
        ),
    )
}  # fmt: skip


def parse(target: str, guard: str | None) -> tuple[Target, str]:
    """The target of that name, and the guard chosen or its own.

    Raises:
        OptionError: Unknown.
    """
    if target not in TARGETS:
        fix = "migraphx" if target in ("rocm", "amd") else f"one of {', '.join(TARGETS)}"
        raise OptionError(f"unknown target {target!r}", where="target", fix=fix)
    found = TARGETS[target]
    if guard is None:
        return found, found.guard
    if guard not in GUARDS:
        raise OptionError(f"unknown guard {guard!r}", where="guard", fix=f"one of {', '.join(GUARDS)}")
    return found, guard


def lint(model: ModelProto, target: Target) -> list[str]:
    """What the target would not run as it is meant, one line each; functions are looked into."""
    findings: list[str] = []
    bodies = [("", model.graph.node), *((f" in {f.name}", f.node) for f in model.functions)]
    for where, nodes in bodies:
        produced: dict[str, NodeProto] = {}
        for node in _every(nodes):
            if node.domain in ("", "ai.onnx") and node.op_type in target.forbidden:
                findings.append(f"{node.op_type} ({node.name or node.output[0]}{where})")
            if not target.cast_pairs and node.op_type == "Cast" and not node.domain:
                before = produced.get(node.input[0])
                if before is not None and _narrow(before):
                    findings.append(f"Cast there and back ({node.name or node.output[0]}{where})")
            produced.update((name, node) for name in node.output)
    return findings


def _every(nodes: Any) -> Iterator[NodeProto]:
    """Nodes, those of branches included."""
    for node in nodes:
        yield node
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _every(attribute.g.node)


def _narrow(node: NodeProto) -> bool:
    """Whether it casts to a float of fewer than 32 bits."""
    from onnx import TensorProto

    if node.op_type != "Cast" or node.domain:
        return False
    to = next(a.i for a in node.attribute if a.name == "to")
    narrow = ("FLOAT16", "BFLOAT16", "FLOAT8E4M3FN", "FLOAT8E4M3FNUZ", "FLOAT8E5M2", "FLOAT8E5M2FNUZ")
    return TensorProto.DataType.Name(to) in narrow
