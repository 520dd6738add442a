"""Writing and reading the text of snapshots. Nothing is evaluated: a scanner that knows quotes and brackets."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lamp_compile.diff.graph import DEEPEST
from lamp_compile.diff.lines import Block, Line
from lamp_compile.errors import InputError

_OPEN, _CLOSE = "([{", ")]}"
_PLAIN = re.compile(r"[A-Za-z0-9_.:/@-]+")
_VALUE = re.compile(r'"(?:[^"\\]|\\.)*"|([%&$][A-Za-z0-9_.:/@~-]+)')
INDENT = "  "


def quote(name: str) -> str:
    """A name as one word: as it is, or as a JSON string."""
    return name if _PLAIN.fullmatch(name) else json.dumps(name)


def identifier(name: str) -> str:
    """A name that can be part of a value's name."""
    return re.sub(r"[^A-Za-z0-9_.:/-]", lambda m: f"~{ord(m[0]):x}~", name) or "~"


def settings(row: Mapping[str, Any]) -> str:
    """``{name=json, ...}`` in the order of the names."""
    inner = ", ".join(f"{name}={json.dumps(value)}" for name, value in sorted(row.items()))
    return "{" + inner + "}"


def refs(text: str) -> list[str]:
    """The values named in the text of an argument, in order."""
    return [m[1] for m in _VALUE.finditer(text) if m[1]]


def replace_refs(text: str, table: Mapping[str, str]) -> str:
    """The text with values renamed; those not in the table stay."""
    return _VALUE.sub(lambda m: table.get(m[1], m[1]) if m[1] else m[0], text)


def split(text: str, separator: str = ",") -> list[str]:
    """Parts between separators that are outside quotes and brackets."""
    parts, start, depth, at = [], 0, 0, 0
    while at < len(text):
        c = text[at]
        if c == '"':
            at = _end_of_string(text, at)
            continue
        if c in _OPEN:
            depth += 1
        elif c in _CLOSE:
            depth -= 1
        elif c == separator and depth == 0:
            parts.append(text[start:at].strip())
            start = at + 1
        at += 1
    last = text[start:].strip()
    return [*parts, last] if last or parts else []


def block_lines(block: Block, depth: int, comments: bool = True) -> list[str]:
    """A block as lines of text."""
    pad = INDENT * depth
    attributes = f" {{{', '.join(f'{n}={v}' for n, v in block.attributes)}}}" if block.attributes else ""
    out = [f"{pad}# {' '.join(block.comment.split())}"] if block.comment and comments else []
    out.append(f"{pad}block {quote(block.name)}({', '.join(block.inputs)}){attributes} [")
    for line in block.lines:
        out.append(f"{pad}{INDENT}{line.text()}")
        for body in line.bodies:
            out += block_lines(body, depth + 2)
    out.append(f"{pad}] -> {', '.join(block.results)}".rstrip())
    return out


def _end_of_string(text: str, at: int) -> int:
    found = re.compile(r'"(?:[^"\\]|\\.)*"').match(text, at)
    return found.end() if found else len(text)


def _word(text: str) -> tuple[str, str]:
    """A quoted or plain name and what follows it."""
    if text.startswith('"'):
        end = _end_of_string(text, 0)
        return str(json.loads(text[:end])), text[end:].strip()
    found = _PLAIN.match(text)
    end = found.end() if found else 0
    return text[:end], text[end:].strip()


def _pairs(text: str) -> tuple[tuple[str, str], ...]:
    """``a=1, b`` -> (("a", "1"), ("", "b"))."""
    out = []
    for part in split(text):
        found = re.match(r"([A-Za-z_][\w.:~-]*)=(?!=)", part)
        out.append((found[1], part[found.end() :]) if found else ("", part))
    return tuple(out)


def _bracket(text: str, at: int) -> int:
    """Where the bracket that opens at ``at`` closes."""
    depth = 0
    while at < len(text):
        if text[at] == '"':
            at = _end_of_string(text, at)
            continue
        depth += text[at] in _OPEN
        depth -= text[at] in _CLOSE
        at += 1
        if depth == 0:
            return at
    raise ValueError("a bracket does not close")


def parse_line(text: str) -> Line:
    """One operation.

    Raises:
        ValueError: It is none.
    """
    left, equals, right = text.partition(" = ")
    opening = right.find("(")
    if not equals or opening < 1:
        raise ValueError("expected `outputs = operator(arguments)`")
    op, end = right[:opening], _bracket(right, opening)
    arguments, rest = _pairs(right[opening + 1 : end - 1]), right[end:].lstrip()
    attributes: tuple[tuple[str, str], ...] = ()
    if rest.startswith("{"):
        end = _bracket(rest, 0)
        attributes, rest = _pairs(rest[1 : end - 1]), rest[end:].lstrip()
    mark, types = "", ()
    if rest.startswith("!"):
        mark, _, rest = rest[1:].partition(" ")
        rest = rest.strip()
    if rest.startswith(":"):
        types = tuple("" if t == "?" else t for t in split(rest[1:]))  # type: ignore[assignment]
    elif rest:
        raise ValueError(f"cannot read {rest[:40]!r}")
    outputs = () if left.strip() == "()" else tuple(split(left))
    return Line(outputs, op, arguments, attributes, types, mark)


class Reader:
    """Lines of a file to a ``Snapshot``."""

    def __init__(self, lines: list[str], where: str) -> None:
        self.lines, self.where, self.at = lines, where, 1
        self.comments: list[str] = []

    def fields(self) -> dict[str, Any]:
        """The fields of a ``Snapshot``.

        Raises:
            InputError: A line cannot be read.
        """
        try:
            return self._read()
        except (ValueError, IndexError, RecursionError) as error:
            raise InputError(
                f"broken snapshot: {error or 'it ends early'}",
                where=f"{self.where}, line {min(self.at, len(self.lines))}",
                fix="write it again with `lamp-compile snapshot`",
            ) from None

    def _read(self) -> dict[str, Any]:
        tables: dict[str, dict[str, Any]] = {name: {} for name in ("fact", "input", "range", "param", "site")}
        outputs, blocks, kind = [], [], ""
        header: list[str] = []
        while (line := self._next()) is not None:
            word, _, rest = line.partition(" ")
            if word == "kind":
                kind, header = rest.strip(), list(self.comments)
            elif word == "block":
                blocks.append(self._block(rest, 0))
            elif word == "output":
                outputs.append(_word(rest))
            elif word in tables:
                name, value = _word(rest)
                tables[word][name] = _row(value) if word == "site" else value
            else:
                raise ValueError(f"cannot read {line[:40]!r}")
        if kind not in ("onnx", "torch", "plan"):
            raise ValueError(f"kind is {kind!r}")
        notes = [c[6:] for c in header if c.startswith("note: ")]
        versions = dict(c.rpartition(" ")[::2] for c in header if not c.startswith("note: "))
        return {
            "kind": kind, "facts": tables["fact"], "inputs": tables["input"], "outputs": tuple(outputs),
            "ranges": tables["range"], "params": tables["param"], "sites": tables["site"], "blocks": tuple(blocks),
            "versions": versions, "notes": tuple(notes),
        }  # fmt: skip

    def _next(self) -> str | None:
        while self.at < len(self.lines):
            line = self.lines[self.at].strip()
            self.at += 1
            if line.startswith("#"):
                self.comments.append(line[1:].strip())
            elif line:
                return line
        return None

    def _block(self, rest: str, depth: int) -> Block:
        if depth > DEEPEST:
            raise ValueError(f"more than {DEEPEST} blocks in blocks")
        name, rest = _word(rest)
        end = _bracket(rest, 0)
        inputs, rest = tuple(split(rest[1 : end - 1])), rest[end:].strip()
        if not rest.endswith("["):
            raise ValueError("a block opens with [")
        attributes = _pairs(rest[:-1].strip()[1:-1])
        lines: list[Line] = []
        while (line := self._next()) is not None and not line.startswith("]"):
            if line.startswith("block "):
                if not lines:
                    raise ValueError("a body before its operation")
                body = self._block(line[6:], depth + 1)
                lines[-1] = replace(lines[-1], bodies=(*lines[-1].bodies, body))
            else:
                lines.append(parse_line(line))
        if line is None:
            raise ValueError("a block does not close")
        arrow = line[1:].strip()
        return Block(name, inputs, tuple(lines), tuple(split(arrow.removeprefix("->"))), attributes)


def _row(text: str) -> dict[str, Any]:
    if not (text.startswith("{") and text.endswith("}")):
        raise ValueError("settings stand in { }")
    return {name: json.loads(value) for name, value in _pairs(text[1:-1])}
