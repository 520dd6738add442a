"""Which operation of one block is which of the other, in time linear in their number.

Order is no evidence: two operands swapped turn half a graph's order around. Three kinds of evidence are, from strong
to weak:

1. *What it computes*: a hash of the operation and all that it is made from. Equal above an edit.
2. *What it is for*: a hash of the operation and all its users up to the outputs. Equal below an edit.
3. *What it looks like*: operator, module, attributes and the parameters among its operands. Finds what stands between
   two edits.

Each unique pair is matched, pairs spread along operands and users while operators agree, and what is left is matched by
its place among its neighbours.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from lamp_compile.diff._syntax import refs, replace_refs
from lamp_compile.diff.lines import Line

BAND = 64
"""How far two lines matched by place may be from each other's place."""
GONE = "gone:"
"""Before the name of a value that has no partner."""


@dataclass
class Alignment:
    """Pairs of positions, positions without a partner, and how values of the first are called in the second."""

    pairs: list[tuple[int, int]]
    removed: list[int]
    added: list[int]
    values: dict[str, str]


def align(
    a: Sequence[Line], b: Sequence[Line], outer: Mapping[str, str], ends: tuple[Sequence[str], Sequence[str]]
) -> Alignment:
    """Match the lines of two blocks.

    Args:
        a: Lines of the first block.
        b: Lines of the second.
        outer: Values around the first block -> what they are called around the second.
        ends: The results of both blocks.
    """
    scopes = _same_modules(a, b)
    left, right = _Side(a, outer, ends[0], scopes), _Side(b, {}, ends[1], scopes)
    match = _Match(left, right)
    for key in (_Side.made_from, _Side.used_for, _Side.looks, _Side.looks_roughly):
        match.by(key)
    match.spread()
    match.by_place()
    match.replaced()
    values = dict(outer)
    for i, j in match.partner.items():
        values |= dict(zip(a[i].outputs, b[j].outputs, strict=False))
    taken = set(match.partner.values())
    # A value without a partner must not be taken for one of the second block that happens to have its name.
    values |= {o: f"{GONE}{o}" for i in range(len(a)) if i not in match.partner for o in a[i].outputs}
    return Alignment(
        sorted(match.partner.items(), key=lambda pair: pair[1]),
        [i for i in range(len(a)) if i not in match.partner],
        [j for j in range(len(b)) if j not in taken],
        values,
    )


def _same_modules(a: Sequence[Line], b: Sequence[Line]) -> bool:
    """Module paths are evidence unless one side has none, or they were renamed."""
    ours, theirs = [line.scope for line in a if line.scope], {line.scope for line in b}
    return bool(ours) and 2 * sum(scope in theirs for scope in ours) > len(ours)


def _hash(*parts: object) -> str:
    return hashlib.blake2b(repr(parts).encode(), digest_size=12).hexdigest()


@dataclass
class _Side:
    """One block with the keys of its lines."""

    lines: Sequence[Line]
    outer: Mapping[str, str]
    ends: Sequence[str]
    scopes: bool
    producer: dict[str, tuple[int, int]] = field(default_factory=dict)
    users: dict[int, list[tuple[int, int]]] = field(default_factory=lambda: defaultdict(list))
    needs: list[list[tuple[int, int] | str]] = field(default_factory=list)
    results: list[tuple[int, int] | str] = field(default_factory=list)

    def __post_init__(self) -> None:
        for index, line in enumerate(self.lines):
            for port, output in enumerate(line.outputs):
                self.producer[output] = (index, port)
        for index, line in enumerate(self.lines):
            read = [ref for _, text in line.arguments for ref in refs(text)] + _captured(line)
            self.needs.append([self.producer.get(ref, self.outer.get(ref, ref)) for ref in read])
            for place, need in enumerate(self.needs[-1]):
                if not isinstance(need, str):
                    self.users[need[0]].append((index, place))
        self.results = [self.producer.get(ref, ref) for text in self.ends for ref in refs(text)]
        self._local = [self._looks(line, True) for line in self.lines]
        self._rough = [self._looks(line, False) for line in self.lines]

    def _looks(self, line: Line, attributes: bool) -> str:
        texts = [(name, replace_refs(text, _Blank(self.producer, self.outer))) for name, text in line.arguments]
        kept = line.attributes if attributes else ()
        return _hash(line.op, line.scope if self.scopes else "", texts, kept, len(line.outputs))

    def looks(self) -> Sequence[Hashable]:
        """Operator, module, attributes, parameters."""
        return self._local

    def looks_roughly(self) -> Sequence[Hashable]:
        """The same without attributes."""
        return self._rough

    def made_from(self) -> Sequence[Hashable]:
        """Hash of all that a line is made from. Lines stand after what they need."""
        made: list[str] = []
        for index, line in enumerate(self.lines):
            needs = [
                n if isinstance(n, str) else (made[n[0]] if n[0] < index else "later", n[1]) for n in self.needs[index]
            ]
            bodies = [_body(body_line) for body in line.bodies for body_line in body.walk()]
            made.append(_hash(line.op, line.attributes, [name for name, _ in line.arguments], needs, bodies))
        return made

    def used_for(self) -> Sequence[Hashable]:
        """Hash of all that a line's results are used for, up to the block's results."""
        ends: dict[int, list[object]] = defaultdict(list)
        for place, text in enumerate(self.ends):
            for ref in refs(text):
                if ref in self.producer:
                    ends[self.producer[ref][0]].append(("end", place, self.producer[ref][1]))
        used = [""] * len(self.lines)
        for index in range(len(self.lines) - 1, -1, -1):
            line = self.lines[index]
            users = [(used[user], self.needs[user][place][1], place) for user, place in self.users[index]]
            used[index] = _hash(line.op, line.attributes, sorted(map(str, users)), sorted(map(str, ends[index])))
        return used


class _Blank(dict[str, str]):
    """Values that are computed, by no name; parameters and inputs by their own."""

    def __init__(self, producer: Mapping[str, object], outer: Mapping[str, str]) -> None:
        super().__init__()
        self.producer, self.outer = producer, outer

    def get(self, key: str, default: str | None = None) -> str:  # type: ignore[override]
        """As ``replace_refs`` asks for it."""
        return "%" if key in self.producer else self.outer.get(key, key)


def _captured(line: Line) -> list[str]:
    """What bodies take from outside, in order."""
    inside: set[str] = set()
    found: list[str] = []
    for body in line.bodies:
        inside |= set(body.inputs)
        for inner in body.walk():
            inside |= set(inner.outputs) | {name for deeper in inner.bodies for name in deeper.inputs}
            found += [ref for _, text in inner.arguments for ref in refs(text)]
            found += [ref for deeper in inner.bodies for text in deeper.results for ref in refs(text)]
        found += [ref for text in body.results for ref in refs(text)]
    return list(dict.fromkeys(ref for ref in found if ref not in inside))


def _body(line: Line) -> str:
    return _hash(line.op, line.attributes, line.arguments)


@dataclass
class _Match:
    left: _Side
    right: _Side
    partner: dict[int, int] = field(default_factory=dict)
    back: dict[int, int] = field(default_factory=dict)

    def pair(self, i: int, j: int, replaced: bool = False) -> bool:
        """Match two lines unless one has a partner or their operators differ (``replaced``: may differ)."""
        if i in self.partner or j in self.back:
            return False
        if self.left.lines[i].op != self.right.lines[j].op and not replaced:
            return False
        self.partner[i], self.back[j] = j, i
        return True

    def by(self, key: Callable[[_Side], Sequence[Hashable]]) -> None:
        """Match lines whose key occurs as often on both sides, in their order."""
        groups: dict[Hashable, tuple[list[int], list[int]]] = defaultdict(lambda: ([], []))
        for number, (side, taken) in enumerate(((self.left, self.partner), (self.right, self.back))):
            for index, value in enumerate(key(side)):
                if index not in taken:
                    groups[value][number].append(index)
        for ours, theirs in groups.values():
            if len(ours) == len(theirs):
                for i, j in zip(ours, theirs, strict=True):
                    self.pair(i, j)

    def spread(self) -> None:
        """From matched lines to the operands in the same places, and to users when there is one of a kind."""
        waiting = list(self.partner.items())
        while waiting:
            i, j = waiting.pop()
            for mine, other in zip(self.left.needs[i], self.right.needs[j], strict=False):
                if not isinstance(mine, str) and not isinstance(other, str) and self.pair(mine[0], other[0]):
                    waiting.append((mine[0], other[0]))
            ours, theirs = _lone(self.left, i, self.partner), _lone(self.right, j, self.back)
            for op in ours.keys() & theirs.keys():
                if self.pair(ours[op], theirs[op]):
                    waiting.append((ours[op], theirs[op]))

    def by_place(self) -> None:
        """What is left between matched neighbours, by the longest common sequence of operators."""
        for ours, theirs in self._gaps():
            if ours and theirs:
                for i, j in _common(ours, theirs, lambda i, j: self.left._rough[i] == self.right._rough[j]):
                    self.pair(i, j)
                ours, theirs = [i for i in ours if i not in self.partner], [j for j in theirs if j not in self.back]
                for i, j in _common(ours, theirs, lambda i, j: self._alike(i, j)):
                    self.pair(i, j)

    def replaced(self) -> None:
        """One operation became another with as many results, and the same user takes it in the same place."""
        places = [(self.left.needs[i], self.right.needs[j]) for i, j in self.partner.items()]
        for ours, theirs in [*places, (self.left.results, self.right.results)]:
            for mine, other in zip(ours, theirs, strict=False):
                if isinstance(mine, str) or isinstance(other, str):
                    continue
                if len(self.left.lines[mine[0]].outputs) == len(self.right.lines[other[0]].outputs):
                    self.pair(mine[0], other[0], replaced=True)

    def _alike(self, i: int, j: int) -> bool:
        a, b = self.left.lines[i], self.right.lines[j]
        return a.op == b.op and (not self.left.scopes or a.scope == b.scope)

    def _gaps(self) -> Iterable[tuple[list[int], list[int]]]:
        start: dict[int, list[int]] = defaultdict(list)
        last = -1
        for i in range(len(self.left.lines)):
            if i in self.partner:
                last = self.partner[i]
            else:
                start[last].append(i)
        other: dict[int, list[int]] = defaultdict(list)
        last = -1
        for j in range(len(self.right.lines)):
            if j in self.back:
                last = j
            else:
                other[last].append(j)
        return [(start[key], other[key]) for key in start.keys() & other.keys()]


def _lone(side: _Side, index: int, taken: Mapping[int, int]) -> dict[tuple[str, int], int]:
    """Unmatched users by operator and operand's place, where there is one of them."""
    found: dict[tuple[str, int], list[int]] = defaultdict(list)
    for user, place in side.users[index]:
        if user not in taken:
            found[side.lines[user].op, place].append(user)
    return {key: users[0] for key, users in found.items() if len(users) == 1}


def _common(a: Sequence[int], b: Sequence[int], same: Callable[[int, int], bool]) -> list[tuple[int, int]]:
    """A longest common subsequence within a band around the diagonal, as pairs; linear in the lengths."""
    start, end = 0, 0
    while start < min(len(a), len(b)) and same(a[start], b[start]):
        start += 1
    while end < min(len(a), len(b)) - start and same(a[-1 - end], b[-1 - end]):
        end += 1
    pairs = list(zip(a[:start], b[:start], strict=True))
    tail = list(zip(a[len(a) - end :], b[len(b) - end :], strict=True))
    return pairs + _banded(a[start : len(a) - end], b[start : len(b) - end], same) + tail


def _banded(a: Sequence[int], b: Sequence[int], same: Callable[[int, int], bool]) -> list[tuple[int, int]]:
    if not a or not b or abs(len(a) - len(b)) > BAND:
        return []
    low, width = min(0, len(b) - len(a)) - BAND, abs(len(b) - len(a)) + 2 * BAND + 1
    table = [[0] * (width + 2) for _ in range(len(a) + 1)]  # column y - x - low of row x

    for x in range(len(a) - 1, -1, -1):
        row, below = table[x], table[x + 1]
        for y in range(min(len(b) - 1, x + low + width - 1), max(-1, x + low - 1), -1):
            at = y - x - low
            row[at] = below[at] + 1 if same(a[x], b[y]) else max(below[at - 1] if at else 0, row[at + 1])
    pairs, x, y = [], 0, 0
    while x < len(a) and y < len(b):
        at = y - x - low
        if same(a[x], b[y]):
            pairs.append((a[x], b[y]))
            x, y = x + 1, y + 1
        elif (table[x + 1][at - 1] if at else 0) >= table[x][at + 1]:
            x += 1
        else:
            y += 1
        if not 0 <= y - x - low <= width:
            break
    return pairs
