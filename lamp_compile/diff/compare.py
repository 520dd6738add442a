"""Two snapshots against each other, tier by tier: interface, structure, attributes, types, weights, precision plan."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lamp_compile.diff import sites
from lamp_compile.diff._syntax import refs, replace_refs
from lamp_compile.diff.align import GONE, align
from lamp_compile.diff.lines import Block, Line
from lamp_compile.diff.snapshot import Snapshot

TIERS = ("interface", "structure", "attributes", "types", "weights", "precision", "numerics")


@dataclass(frozen=True)
class Change:
    """One difference.

    Attributes:
        tier: One of ``TIERS``.
        where: Module path, function, or ``graph``; the site for the precision plan.
        subject: Operator, attribute, setting, or name of an input: what a rule can name.
        text: One sentence.
        before: The line as it was; empty where there was none.
        after: The line as it is.
    """

    tier: str
    where: str
    subject: str
    text: str
    before: str = ""
    after: str = ""


@dataclass(frozen=True)
class Comparison:
    """All differences of two snapshots, those that a rule allows apart, and what was not compared and why."""

    changes: tuple[Change, ...]
    allowed: tuple[tuple[Change, str], ...] = ()
    notes: tuple[str, ...] = ()
    names: tuple[str, str] = ("A", "B")
    counts: tuple[int, int] = (0, 0)
    """Operations of both."""
    only: str = ""
    """"precision plan" where nothing else of the two can be compared."""
    compared: tuple[str, ...] = TIERS
    """Tiers that were looked at."""

    @property
    def same(self) -> bool:
        """No difference but allowed ones."""
        return not self.changes

    def by_tier(self) -> dict[str, list[Change]]:
        """Tiers that differ, in the order of ``TIERS``, the precision plan first: it says most in fewest words."""
        order = ("precision", *(tier for tier in TIERS if tier != "precision"))
        found = {tier: [c for c in self.changes if c.tier == tier] for tier in order}
        return {tier: changes for tier, changes in found.items() if changes}

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        from dataclasses import asdict

        return {
            "same": self.same,
            "a": {"name": self.names[0], "operations": self.counts[0]},
            "b": {"name": self.names[1], "operations": self.counts[1]},
            "changes": [asdict(change) for change in self.changes],
            "allowed": [{**asdict(change), "rule": rule} for change, rule in self.allowed],
            "compared": list(self.compared),
            "notes": list(self.notes),
        }


def compare_snapshots(a: Snapshot, b: Snapshot, names: tuple[str, str] = ("A", "B")) -> Comparison:
    """Every difference. Graphs are compared with graphs of their own kind only; precision plans with any that has
    one."""
    made = _Compare(a, b)
    notes = [f"{name}: {note}" for name, side in zip(names, (a, b), strict=True) for note in side.notes]
    if a.kind == b.kind:
        made.interface()
        made.params()
        made.blocks()
    else:
        notes.append(f"{a.kind} against {b.kind}: only precision plans were compared")
    made.precision()
    what = "" if a.kind == b.kind else "precision plan"
    return Comparison(tuple(made.changes), (), tuple(notes), names, (a.nodes(), b.nodes()), what)


@dataclass
class _Compare:
    a: Snapshot
    b: Snapshot
    changes: list[Change] = field(default_factory=list)

    def add(self, *values: str) -> None:
        """One change."""
        self.changes.append(Change(*values))

    def interface(self) -> None:
        """What callers see: inputs, outputs, versions of operator sets, limits of sizes."""
        tables: list[tuple[str, Mapping[str, str], Mapping[str, str]]] = [
            ("", self.a.facts, self.b.facts),
            ("input ", self.a.inputs, self.b.inputs),
            ("size ", self.a.ranges, self.b.ranges),
            ("output ", _types(self.a.outputs), _types(self.b.outputs)),
        ]
        for word, before, after in tables:
            for name in dict.fromkeys((*before, *after)):
                self._entry("interface", "graph", f"{word}{name}", before.get(name), after.get(name))
            order = [n for n in before if n in after], [n for n in after if n in before]
            if order[0] != order[1] and word in ("input ", "output "):
                self.add(
                    "interface", "graph", word.strip(), f"the order of {word.strip()}s changed", *map(", ".join, order)
                )

    def params(self) -> None:
        """Parameters by path; values of those that the precision plan holds are said there."""
        hot = {p for p in self.a.params.keys() & self.b.params.keys() if self.a.sites and self.b.sites and _is_hot(p)}
        for path in dict.fromkeys((*self.a.params, *self.b.params)):
            before, after = self.a.params.get(path), self.b.params.get(path)
            where = path.rpartition(".")[0] or "graph"
            if before is None or after is None:
                self._entry("structure", where, f"parameter {path}", before, after)
                continue
            (type_, _, value), (type2, _, value2) = before.partition(" = "), after.partition(" = ")
            if type_ != type2:
                self._entry("types", where, f"parameter {path}", type_, type2)
            if value and value2 and value != value2 and path not in hot:
                self._entry("weights", where, f"parameter {path}", value, value2)

    def _entry(self, tier: str, where: str, subject: str, before: str | None, after: str | None) -> None:
        if before == after:
            return
        if before is None:
            text = f"{subject} is new: {after}"
        elif after is None:
            text = f"{subject} is gone: {before}"
        else:
            text = f"{subject}: {before} -> {after}"
        self.add(tier, where, subject, text, before or "", after or "")

    def blocks(self) -> None:
        """The graph and its functions, by name."""
        ours, theirs = {x.name: x for x in self.a.blocks}, {x.name: x for x in self.b.blocks}
        for name, other in _pairs(list(ours), list(theirs)):
            a, b = ours.get(name), theirs.get(other)
            where = other.removeprefix("function ") or name.removeprefix("function ")
            if a is None or b is None:
                there = a or b
                assert there is not None
                what = f"{there.name} is {'gone' if b is None else 'new'} ({len(there.lines)} operations)"
                self.add("structure", where, there.name, what, name, other)
                continue
            if name != other:
                self._entry("attributes", where, "overload", _overload(name), _overload(other))
            outer = {x: x for x in (*self.a.params, *self.b.params)}
            self.block(a, b, where, {f"${x}": f"${x}" for x in outer})

    def block(self, a: Block, b: Block, where: str, outer: Mapping[str, str]) -> None:
        """Two blocks, with the bodies of their operations."""
        if len(a.inputs) != len(b.inputs):
            self.add(
                "structure",
                where,
                "inputs",
                f"{len(a.inputs)} inputs became {len(b.inputs)}",
                *map(str, (a.inputs, b.inputs)),
            )
        graph = a.name == "graph"
        known = {**outer, **({x: x for x in a.inputs} if graph else dict(zip(a.inputs, b.inputs, strict=False)))}
        found = align(a.lines, b.lines, known, (a.results, b.results))
        for i in found.removed:
            line = a.lines[i]
            self.add("structure", _where(line, where), line.op, f"{line.op} is gone", line.text(), "")
        for j in found.added:
            line = b.lines[j]
            self.add("structure", _where(line, where), line.op, f"{line.op} is new", "", line.text())
        for i, j in found.pairs:
            self.line(a.lines[i], b.lines[j], where, found.values)
        self._attributes(a.attributes, b.attributes, where, a.name, "", "")
        for index, (old, new) in enumerate(zip(a.results, b.results, strict=False)):
            if replace_refs(old, found.values) != new:
                self.add("structure", where, "result", f"result {index} comes from another operation", old, new)
        if len(a.results) != len(b.results):
            self.add(
                "structure",
                where,
                "result",
                f"{len(a.results)} results became {len(b.results)}",
                str(a.results),
                str(b.results),
            )

    def line(self, a: Line, b: Line, where: str, values: Mapping[str, str]) -> None:
        """Two operations that are taken for the same one."""
        place, old, new = _where(b, where), a.text(), b.text()
        if a.op != b.op:
            self.add("structure", place, b.op, f"{a.op} became {b.op}", old, new)
            return
        self._operands(a, b, place, values)
        self._attributes(a.attributes, b.attributes, place, b.op, old, new)
        if a.mark != b.mark:
            self.add("structure", place, b.op, f"{b.op}: {a.mark or 'used'} -> {b.mark or 'used'}", old, new)
        if len(a.outputs) != len(b.outputs):
            self.add("structure", place, b.op, f"{b.op}: {len(a.outputs)} outputs became {len(b.outputs)}", old, new)
        differ = [(t, u) for t, u in zip(a.types, b.types, strict=False) if t and u and t != u]
        if differ:
            self.add(
                "types",
                place,
                b.op,
                f"{b.op}: {_several(t for t, _ in differ)} -> {_several(u for _, u in differ)}",
                old,
                new,
            )
        bodies = {body.name: body for body in a.bodies}
        for body in b.bodies:
            if body.name in bodies:
                self.block(bodies.pop(body.name), body, f"{place}/{body.name}", values)
            else:
                self.add("structure", place, b.op, f"{b.op}: the body {body.name} is new", old, new)
        for name in bodies:
            self.add("structure", place, b.op, f"{b.op}: the body {name} is gone", old, new)

    def _operands(self, a: Line, b: Line, where: str, values: Mapping[str, str]) -> None:
        ours = [(name, replace_refs(text, values)) for name, text in a.arguments]
        theirs = list(b.arguments)
        if _is_lamp(b.op) and self.a.sites and self.b.sites:  # hot values are said once for the site
            ours, theirs = [[x for x in side if not (x[0] in sites.HOT and not refs(x[1]))] for side in (ours, theirs)]
        if ours == theirs:
            return
        swapped = [t for _, t in ours] != [t for _, t in theirs] and sorted(ours, key=str) == sorted(theirs, key=str)
        if swapped or (
            [n for n, _ in ours] == [n for n, _ in theirs]
            and sorted(t for _, t in ours) == sorted(t for _, t in theirs)
        ):
            text = f"{b.op}: its operands changed places"
        else:
            changed = [(x, y) for x, y in zip(ours, theirs, strict=False) if x != y]
            parts = [f"{y[0] or 'operand'} {_short(x[1])} -> {_short(y[1])}" for x, y in changed[:3]]
            if len(ours) != len(theirs):
                parts.append(f"{len(ours)} operands became {len(theirs)}")
            text = f"{b.op}: {', '.join(parts)}"
        self.add("structure", where, b.op, text, a.text(), b.text())

    def _attributes(
        self, a: Sequence[tuple[str, str]], b: Sequence[tuple[str, str]], where: str, op: str, old: str, new: str
    ) -> None:  # fmt: skip
        before, after = dict(a), dict(b)
        lamp = _is_lamp(op)
        for name in sorted(before.keys() | after.keys()):
            if before.get(name) == after.get(name):
                continue
            if lamp and name in sites.PRECISION and self.a.sites and self.b.sites:
                continue  # said once for the site
            shown = [("the default" if not side.get(name) else side[name]) for side in (before, after)]
            self.add(
                "attributes", where, name, f"{op}: {name} {shown[0]} -> {shown[1]}", old or shown[0], new or shown[1]
            )

    def precision(self) -> None:
        """Site by site, in words. Nothing is said where one side has no plan at all and the kinds differ."""
        if self.a.kind != self.b.kind and not (self.a.sites and self.b.sites):
            return
        kinds = (self.a.kind, self.b.kind)
        for name in dict.fromkeys((*self.a.sites, *self.b.sites)):
            before, after = self.a.sites.get(name), self.b.sites.get(name)
            for setting, text, old, new in sites.changes(name, before, after, kinds):
                self.add("precision", name, setting, text, _shown(old), _shown(new))


def _overload(name: str) -> str:
    """``function ai.lamp::Attend:if.q8`` -> ``if.q8``."""
    return name.rpartition("::")[2].partition(":")[2]


def _pairs(ours: list[str], theirs: list[str]) -> list[tuple[str, str]]:
    """Blocks by name; functions of one name whose only overload changed are one function. Empty = no partner."""
    pairs = [(name, name if name in theirs else "") for name in ours] + [
        ("", name) for name in theirs if name not in ours
    ]
    lone = [name for name, other in pairs if not other], [other for name, other in pairs if not name]
    for name in lone[0]:
        base = name.removesuffix(f":{_overload(name)}")
        same = [[x for x in side if x.removesuffix(f":{_overload(x)}") == base] for side in lone]
        if len(same[0]) == len(same[1]) == 1:
            pairs[pairs.index((name, ""))] = (name, same[1][0])
            pairs.remove(("", same[1][0]))
    return pairs


def _types(outputs: Sequence[tuple[str, str]]) -> dict[str, str]:
    return {name: text.partition(" : ")[2] or "?" for name, text in outputs}


def _is_lamp(op: str) -> bool:
    return op.startswith(("lamp.", "ai.lamp::", "lamp::"))


def _is_hot(path: str) -> bool:
    return path.replace("_", ".").rpartition(".")[2] in sites.HOT


def _where(line: Line, where: str) -> str:
    return line.scope if line.scope and where == "graph" else where


def _short(text: str) -> str:
    text = re.sub(rf"{GONE}([^\s,\]]+)", r"\1 (gone)", text)
    return text if len(text) <= 60 else text[:57] + "..."


def _several(texts: Any) -> str:
    return ", ".join(dict.fromkeys(texts))


def _shown(value: Any) -> str:
    return "" if value is None else str(value)
