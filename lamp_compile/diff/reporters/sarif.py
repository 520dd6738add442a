"""SARIF 2.1.0, for code scanning: one result for each change; allowed ones are suppressed results."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any
from urllib.parse import quote

from lamp_compile import __version__
from lamp_compile.diff.compare import TIERS, Change, Comparison
from lamp_compile.diff.reporters._base import TITLES, Reporter, sentence

SCHEMA = "https://json.schemastore.org/sarif-2.1.0.json"
_ABOUT = {
    "interface": "Inputs, outputs, operator sets or limits of sizes changed.",
    "structure": "Operations or their operands changed.",
    "attributes": "Attributes of operations changed.",
    "types": "Element types or shapes changed.",
    "weights": "Values of parameters changed.",
    "precision": "The precision plan of an attention site changed.",
    "numerics": "Outputs on the same inputs differ.",
}


def render(found: Comparison, limit: int) -> str:
    """All changes, whatever the limit."""
    results = [_result(found, change, None) for change in found.changes]
    results += [_result(found, change, rule) for change, rule in found.allowed]
    driver = {
        "name": "lamp-compile diff",
        "version": __version__,
        "rules": [
            {"id": f"lamp/{tier}", "name": TITLES[tier], "shortDescription": {"text": _ABOUT[tier]}} for tier in TIERS
        ],
    }
    log = {"$schema": SCHEMA, "version": "2.1.0", "runs": [{"tool": {"driver": driver}, "results": results}]}
    return json.dumps(log, indent=2) + "\n"


def _result(found: Comparison, change: Change, rule: str | None) -> dict[str, Any]:
    uri = quote(Path(found.names[1]).as_posix())
    identity = "\0".join((change.tier, change.where, change.subject, change.text))
    made: dict[str, Any] = {
        "ruleId": f"lamp/{change.tier}",
        "ruleIndex": TIERS.index(change.tier),
        "level": "error",
        "message": {"text": sentence(change)},
        "locations": [
            {
                "physicalLocation": {"artifactLocation": {"uri": uri}, "region": {"startLine": 1}},
                "logicalLocations": [{"fullyQualifiedName": change.where}],
            }
        ],
        "partialFingerprints": {"lampChange/v1": hashlib.sha256(identity.encode()).hexdigest()[:32]},
    }
    if rule is not None:
        made["suppressions"] = [{"kind": "external", "status": "accepted", "justification": rule}]
    return made


REPORTER = Reporter("sarif", render)
