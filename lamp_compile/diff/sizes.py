"""Symbolic sizes in the text of a snapshot, given numbers."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping

from lamp_compile.diff._syntax import split
from lamp_compile.diff.snapshot import Snapshot
from lamp_compile.errors import InputError, OptionError

_TYPE = re.compile(r"([a-z]\w*)(?:\[(.*)\])?")


def choose(found: Snapshot, given: Mapping[str, int], first: int, other: int) -> dict[str, int]:
    """A number for each symbol of the inputs: as given, else a usual one within the symbol's limits.

    Raises:
        OptionError: A given name is no symbol, or its number is outside the limits.
    """
    table: dict[str, int] = {}
    for text in found.inputs.values():
        for axis, size in enumerate(_sizes(text)):
            for symbol in re.findall(r"\bd\d+\b", size):
                table.setdefault(symbol, first if axis == 0 else other)
    for name, number in given.items():
        if name not in table:
            raise OptionError(
                f"no size {name!r}", where="--size", fix=f"one of {', '.join(table) or 'none: all are fixed'}"
            )
        table[name] = number
    for name, limits in found.ranges.items():
        low, _, high = limits.partition("..")
        inside = min(max(table.get(name, other), int(low or 1)), int(high or 2**62))
        if name in given and inside != given[name]:
            raise OptionError(f"{name} = {given[name]} is not in {limits}", where="--size", fix=f"a number in {limits}")
        table[name] = inside
    return table


def shape(text: str, table: Mapping[str, int], name: str) -> tuple[str, tuple[int, ...]]:
    """Element type and numbers of ``float32[d0,(1+d1),64]``.

    Raises:
        InputError: A size is unknown.
    """
    found = _TYPE.fullmatch(text)
    if found is None or found[2] is None:
        raise InputError(f"input {name} is {text}", where="--numerics", fix="inputs with declared shapes")
    try:
        return found[1], tuple(_number(ast.parse(size, mode="eval").body, table) for size in _sizes(text))
    except (SyntaxError, KeyError, ValueError, ZeroDivisionError, RecursionError):
        raise InputError(
            f"cannot tell the shape of input {name}: {text}", where="--numerics", fix="declared shapes"
        ) from None


def _sizes(text: str) -> list[str]:
    found = _TYPE.fullmatch(text)
    return split(found[2]) if found is not None and found[2] else []


def _number(tree: ast.expr, table: Mapping[str, int]) -> int:
    if isinstance(tree, ast.Constant) and isinstance(tree.value, int):
        return tree.value
    if isinstance(tree, ast.Name):
        return table[tree.id]
    if isinstance(tree, ast.BinOp) and isinstance(tree.op, ast.Add | ast.Mult):
        left, right = _number(tree.left, table), _number(tree.right, table)
        return left + right if isinstance(tree.op, ast.Add) else left * right
    if isinstance(tree, ast.UnaryOp) and isinstance(tree.op, ast.USub):
        return -_number(tree.operand, table)
    if isinstance(tree, ast.Call) and isinstance(tree.func, ast.Name):
        operands = [_number(x, table) for x in tree.args]
        if tree.func.id in ("FloorDiv", "Mod") and len(operands) == 2:
            return operands[0] // operands[1] if tree.func.id == "FloorDiv" else operands[0] % operands[1]
        if tree.func.id in ("Max", "Min"):
            return max(operands) if tree.func.id == "Max" else min(operands)
    raise ValueError("no size")
