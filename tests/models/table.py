"""docs/models.md, from what the tests expect of each family: ``python -m tests.models.table --write``."""

from __future__ import annotations

import sys
from pathlib import Path

from tests.models.zoo import FAMILIES, Expected, Family
from tests.tolerances import ZOO

PAGE = Path(__file__).resolve().parents[2] / "docs" / "models.md"

HEAD = f"""\
# Model families

Generated from `tests/models` (`make golden`), where each cell is a test: the model is compiled, rewritten sites are
counted, everything left alone must give its reason, and outputs with every tile refined must equal the original's
within {ZOO["both"].relative:.1%} (within {ZOO["exact"].relative:.0e} with the original keys and values) of their norm.

The models are tiny, with random weights: this says that an attention is recognised and computed right, not how good
a trained model stays. Where that was measured, the [README](../README.md#what-is-measured) says so.

*Graph* is `torch.compile(model, backend="lamp")` on a forward without a cache, by the spelling of attention
(`attn_implementation`). *Compile* is `lamp_compile.compile(model)`: for a decoder, prefill and decode over a cache of
planes. A number is how many attentions were found and rewritten: all of the model's, in each case.

| family | what is special | graph, sdpa | graph, eager | compile |
|---|---|---|---|---|
"""


def page() -> str:
    """The page as it should be."""
    return HEAD + "".join(_row(family) for family in FAMILIES) + _notes()


def _row(family: Family) -> str:
    cells = [_cell(family, family.graph.get(spelling), spelling) for spelling in ("sdpa", "eager")]
    routed = family.decoder is None and not family.refusal
    compiled = f"{family.graph['sdpa'].rewritten}, as a graph" if routed else _cell(family, family.decoder, "decoder")
    return f"| {family.name} | {family.feature} | {cells[0]} | {cells[1]} | {compiled} |\n"


def _cell(family: Family, expected: Expected | None, column: str) -> str:
    note = f" [{_numbered().index((family.name, column)) + 1}]" if column in family.notes else ""
    if expected is None:
        return f"not possible{note}"
    left = f"; {expected.unclaimed} other softmaxes left alone" if expected.unclaimed else ""
    return f"{expected.rewritten}{left}{note}"


def _numbered() -> list[tuple[str, str]]:
    return [(family.name, column) for family in FAMILIES for column in family.notes]


def _notes() -> str:
    by_name = {family.name: family for family in FAMILIES}
    lines = [
        f"{number}. {name}: {by_name[name].notes[column]}.\n" for number, (name, column) in enumerate(_numbered(), 1)
    ]
    return "\n" + "".join(lines)


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        PAGE.write_text(page(), encoding="utf-8")
    else:
        sys.stdout.write(page())
