"""JUnit XML: one test case for each tier, failed where something differs, skipped where nothing was compared."""

from __future__ import annotations

import re
from xml.etree import ElementTree

from lamp_compile.diff.compare import TIERS, Comparison
from lamp_compile.diff.reporters._base import TITLES, Reporter, count, sentence, shown, verdict

_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def render(found: Comparison, limit: int) -> str:
    """A suite with a case for each tier, the sentences in its failure."""
    tiers = found.by_tier()
    left_out = [tier for tier in TIERS if tier not in found.compared]
    counts = {"tests": str(len(TIERS)), "failures": str(len(tiers)), "errors": "0"}
    root = ElementTree.Element("testsuites", counts)
    suite = ElementTree.SubElement(
        root, "testsuite", {"name": "lamp-compile diff", **counts, "skipped": str(len(left_out)), "time": "0"}
    )
    for tier in TIERS:
        classname = _clean(f"{found.names[0]} to {found.names[1]}")
        case = ElementTree.SubElement(suite, "testcase", {"classname": classname, "name": TITLES[tier], "time": "0"})
        if tier in left_out:
            ElementTree.SubElement(case, "skipped", {"message": "not compared"})
        if tier in tiers:
            first, left = shown(tiers[tier], limit)
            failure = ElementTree.SubElement(case, "failure", {"message": count(len(tiers[tier])), "type": tier})
            more = [f"and {left:,} more"] if left else []
            failure.text = _clean("\n".join([*map(sentence, first), *more]))
    out = ElementTree.SubElement(suite, "system-out")
    out.text = _clean("\n".join([verdict(found), *found.notes]))
    ElementTree.indent(root)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + ElementTree.tostring(root, encoding="unicode") + "\n"


def _clean(text: str) -> str:
    return _NOT_XML.sub("?", text)


REPORTER = Reporter("junit", render)
