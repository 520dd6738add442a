"""A snapshot: canonical lines of a program, as data and as text that is read back to the same data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lamp_compile.diff import _syntax
from lamp_compile.diff.lines import Block
from lamp_compile.errors import InputError

MAGIC = "lamp-snapshot 1"
"""First line of a saved snapshot; the number counts versions of the format."""
SUFFIX = ".lamp.txt"


@dataclass(frozen=True)
class Snapshot:
    """What is compared. ``kind`` is "onnx", "torch" or "plan"; a plan has sites only.

    Attributes:
        facts: Versions of operator sets and of the format, compared.
        inputs: Public name -> type.
        ranges: Limits of symbolic sizes, ``d0`` -> ``"2..4096"``.
        params: Path -> type, with the value or its hash where it belongs to the precision plan or was asked for.
        sites: Attention site -> its precision settings.
        blocks: The graph first, then functions by name.
        versions: What wrote it; not compared.
        notes: What was not read; not compared.
    """

    kind: str
    facts: Mapping[str, str] = field(default_factory=dict)
    inputs: Mapping[str, str] = field(default_factory=dict)
    outputs: tuple[tuple[str, str], ...] = ()
    ranges: Mapping[str, str] = field(default_factory=dict)
    params: Mapping[str, str] = field(default_factory=dict)
    sites: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    blocks: tuple[Block, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def nodes(self) -> int:
        """Operations, those in bodies and functions too."""
        return sum(1 for block in self.blocks for _ in block.walk())

    def text(self, header: bool = True) -> str:
        """The text of a ``.lamp.txt`` file. Without ``header`` what is not compared is left out."""
        lines = [MAGIC]
        if header:
            lines += [f"# {name} {version}" for name, version in sorted(self.versions.items())]
            lines += [f"# note: {' '.join(note.split())}" for note in self.notes]
        lines += [f"kind {self.kind}"]
        for word, table in (
            ("fact", self.facts),
            ("input", self.inputs),
            ("range", self.ranges),
            ("param", self.params),
        ):
            lines += [f"{word} {_syntax.quote(name)} {value}" for name, value in table.items()]
        for name, row in self.sites.items():
            lines.append(f"site {_syntax.quote(name)} {_syntax.settings(row)}")
        for block in self.blocks:
            lines += _syntax.block_lines(block, 0, header)
        lines += [f"output {_syntax.quote(name)} {value}" for name, value in self.outputs]
        return "\n".join(lines) + "\n"

    @staticmethod
    def parse(text: str, where: str = "snapshot") -> Snapshot:
        """Read the text of a snapshot.

        Raises:
            InputError: It is no snapshot, of another version of the format, or broken; with the line's number.
        """
        lines = text.splitlines()
        if not lines or lines[0].strip() != MAGIC:
            found = lines[0][:60] if lines else ""
            raise InputError(
                f"not a snapshot of this version: the first line is {found!r}",
                where=where,
                fix=f"a file that begins with {MAGIC!r}, as `lamp-compile snapshot` writes it",
            )
        return Snapshot(**_syntax.Reader(lines, where).fields())
