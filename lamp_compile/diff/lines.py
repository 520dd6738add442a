"""One operation and one block of a snapshot, as data and as text."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Line:
    """One operation: ``%linear1@layers.0 = aten.linear(&x, weight=$layers.0.w) {dim=1} : float32[d0,8]``."""

    outputs: tuple[str, ...]
    op: str
    arguments: tuple[tuple[str, str], ...]
    attributes: tuple[tuple[str, str], ...] = ()
    types: tuple[str, ...] = ()
    mark: str = ""
    """"dead" = nobody uses it, "effect" = kept for what it does."""
    bodies: tuple[Block, ...] = ()

    @property
    def scope(self) -> str:
        """Module path, empty where unknown."""
        return self.outputs[0].partition("@")[2] if self.outputs else ""

    def call(self) -> str:
        """Without outputs and types."""
        inner = ", ".join(f"{name}={text}" if name else text for name, text in self.arguments)
        settings = ", ".join(f"{name}={text}" for name, text in self.attributes)
        return (
            f"{self.op}({inner})" + (f" {{{settings}}}" if settings else "") + (f" !{self.mark}" if self.mark else "")
        )

    def text(self) -> str:
        """As in a file, without bodies."""
        types = f" : {', '.join(t or '?' for t in self.types)}" if any(self.types) else ""
        return f"{', '.join(self.outputs) or '()'} = {self.call()}{types}"


@dataclass(frozen=True)
class Block:
    """A graph, a function, or the body of an operation."""

    name: str
    inputs: tuple[str, ...]
    lines: tuple[Line, ...]
    results: tuple[str, ...]
    attributes: tuple[tuple[str, str], ...] = ()
    """Of a function: declared attributes with their defaults, and the versions of the operators it uses."""
    comment: str = field(default="", compare=False)

    def walk(self) -> Iterator[Line]:
        """All lines, those of bodies too."""
        waiting = list(reversed(self.lines))
        while waiting:
            line = waiting.pop()
            yield line
            for body in reversed(line.bodies):
                waiting.extend(reversed(body.lines))
