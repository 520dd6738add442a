"""A walk over protobuf bytes before they are parsed: counts, depth, truncation and text, with nothing allocated.

A parsed message takes a hundred times the two bytes that an empty one takes in a file, and recursion in a parser costs
stack; so both are bounded here first.
"""

from __future__ import annotations

from typing import Any

from lamp_compile.frontends.onnx.files.limits import Limits, bad

_TEXT = "text"
_DAMAGED = "the file is damaged or no ONNX model: copy or export it again"
_Fields = dict[int, Any]  # field number -> fields of that message, or _TEXT


def scan(data: bytes, descriptor: Any, limits: Limits, where: str) -> None:
    """Check that ``data`` is a well-formed message of a protobuf descriptor within the limits.

    Raises:
        InputError: Truncated, malformed, too deep, too many messages, or text that is not UTF-8.
    """
    _Walk(data, limits, where).message(0, len(data), _fields(descriptor, {}), descriptor.name, 1)


def _fields(descriptor: Any, known: dict[str, _Fields]) -> _Fields:
    if descriptor.full_name in known:
        return known[descriptor.full_name]
    fields: _Fields = {}
    known[descriptor.full_name] = fields
    for field in descriptor.fields:
        if field.message_type is not None:
            fields[field.number] = (field.message_type.name, _fields(field.message_type, known))
        elif field.type == field.TYPE_STRING:
            fields[field.number] = _TEXT
    return fields


class _Walk:
    def __init__(self, data: bytes, limits: Limits, where: str) -> None:
        self.data, self.limits, self.where = data, limits, where
        self.messages = 0

    def message(self, at: int, end: int, fields: _Fields, name: str, depth: int) -> None:
        """One message from byte ``at`` to ``end``. Depth is bounded, so recursion is."""
        if depth > self.limits.message_depth:
            raise self.fault(f"messages are nested more than {self.limits.message_depth} deep ({name})", at)
        self.messages += 1
        if self.messages > self.limits.messages:
            raise bad(
                f"more than {self.limits.messages:,} protobuf messages",
                self.where,
                "read it with larger Limits(messages=...) if you trust it",
            )
        data = self.data
        while at < end:
            tag = data[at]
            at += 1
            if tag > 127:
                tag, at = self.varint(at - 1, end, name)
            kind = tag & 7
            if kind == 2:
                at = self.delimited(at, end, fields.get(tag >> 3), name, depth)
            elif kind == 0:
                at = self.varint(at, end, name)[1]
            elif kind == 5:
                at += 4
            elif kind == 1:
                at += 8
            else:
                raise self.fault(f"{name} holds a field of wire type {kind}, which ONNX does not use", at)
            if tag >> 3 == 0:
                raise self.fault(f"{name} holds a field numbered 0", at)
        if at > end:
            raise self.fault(f"truncated inside {name}: {at - end} bytes are missing", end)

    def delimited(self, at: int, end: int, field: Any, name: str, depth: int) -> int:
        length, at = self.varint(at, end, name)
        if length > end - at:
            raise self.fault(f"truncated inside {name}: a field of {length:,} bytes, {end - at:,} remain", at)
        if field is _TEXT:
            text = self.data[at : at + length]
            if not text.isascii():
                try:
                    text.decode()
                except UnicodeDecodeError:
                    raise self.fault(f"{name} holds text that is not UTF-8", at) from None
        elif field is not None:
            self.message(at, at + length, field[1], field[0], depth + 1)
        return at + length

    def varint(self, at: int, end: int, name: str) -> tuple[int, int]:
        value = 0
        for position in range(10):
            if at >= end:
                raise self.fault(f"truncated inside {name}", at)
            byte = self.data[at]
            at += 1
            value |= (byte & 127) << (7 * position)
            if byte < 128:
                return value, at
        raise self.fault(f"{name} holds a number of more than 64 bits", at)

    def fault(self, what: str, at: int) -> Exception:
        return bad(f"{what} (byte {at:,})", self.where, _DAMAGED)
