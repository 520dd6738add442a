"""The part of a plan that names a look-ahead network. Imports no torch."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from lamp_compile.errors import PlanError

LOOKAHEADS = ("exact", "network")


@dataclass(frozen=True)
class NetworkPlan:
    """The file that the sites with ``lookahead: "network"`` take their gates from."""

    file: str
    """Path, relative to the plan's own folder (to the current one where the plan is no file)."""
    sha256: str
    """Hash of that file; another file is refused."""

    def validate(self, where: str) -> None:
        """Raise PlanError unless both are what they should be."""
        if not isinstance(self.file, str) or not self.file:
            raise PlanError(f"file is {self.file!r}", where=where, fix="the path of a *.safetensors file")
        if not isinstance(self.sha256, str) or not re.fullmatch("[0-9a-f]{64}", self.sha256):
            raise PlanError(f"sha256 is {self.sha256!r}", where=where, fix="64 hexadecimal digits, or a new plan")

    def path(self, folder: Path) -> Path:
        """Where the file is."""
        return folder / self.file
