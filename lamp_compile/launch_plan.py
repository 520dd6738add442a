"""How kernels cut their work on one kind of GPU: the part of a plan that is about speed alone."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields

from lamp_compile.errors import PlanError

MOST_LAUNCH = 4096
"""No way of cutting work needs a larger number."""


@dataclass(frozen=True)
class LaunchPlan:
    """How kernels cut one attention on one kind of GPU, for speed: it changes the order of sums, and with ``most_rows``
    which new tokens decide together. ``lamp-compile tune`` measures it."""

    warps: int = 1
    """Of the look-ahead, where few rows share a kv head."""
    stages: int = 3
    """Steps of its loop in flight."""
    refine_warps: int = 1
    refine_stages: int = 2
    programs: int = 8
    """Programs per multiprocessor that the look-ahead aims at."""
    refine_programs: int = 12
    """And the refinement. A quarter of a multiprocessor takes 2 programs of one warp, 3 of up to 168 registers, 4 of up
    to 128: 8, 12 and 16 are natural numbers."""
    paired_programs: int = 5
    """Of the refinement where two warps share a program: what they leave is less, and a step takes them less time."""
    most_paired: int = 128
    """Kv heads of all sequences, times blocks of new tokens, up to which that is so: on NVIDIA, where few rows share a
    kv head and ``refine_warps`` is 1. With more of them there are few programs for each, and these must be able to
    share evenly."""
    most_finished: int = 128
    """Kv heads of all sequences up to which one launch does all that comes behind the look-ahead, on NVIDIA
    (``runtime/kernels/finish.py``); 0: none."""
    least_subtiles: int = 8
    """Sub-tiles a program of the look-ahead should have at least."""
    most_splits: int = 128
    """Splits of one kv head's keys at most."""
    most_segments: int = 50
    """Programs of the refinement of one kv head at most (over pages see ``mixed_tiles``): what they leave must be
    joined."""
    mixed_steps: int = 16
    """Steps of the look-ahead's loop that one program has at least, over pages, where sequences differ in length."""
    mixed_tiles: int = 64
    """Sub-tiles of the longest sequence to one program of the refinement, likewise."""
    merge_chunk: int = 256
    """Partial results, times the rows of a program, joined at a time."""
    merge_warps: int = 8
    """Warps that join them, at most."""
    most_rows: int = 16
    """Rows (tokens x group) of one program when there are several new tokens."""
    dependent: int = 1
    """1: a launch may begin while the one ahead of it ends, where the GPU can do that."""

    SMALL = ("warps", "refine_warps", "merge_warps", "stages", "refine_stages")
    POWERS = ("warps", "refine_warps", "mixed_tiles", "merge_chunk", "merge_warps", "most_rows")

    def validate(self, where: str) -> None:
        """Check every field.

        Raises:
            PlanError: Naming the field, its value and what it may be.
        """
        for f in fields(self):
            value = getattr(self, f.name)
            least = 0 if f.name in ("dependent", "most_paired", "most_finished") else 1
            most = 1 if f.name == "dependent" else 8 if f.name in self.SMALL else MOST_LAUNCH
            if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
                raise PlanError(f"{f.name} is {value!r}", where=where, fix=f"a whole number, {least} to {most}")
            if f.name in self.POWERS and value & (value - 1):
                raise PlanError(f"{f.name} is {value}", where=where, fix="a power of two")

    def text(self) -> str:
        """What differs from the defaults, as JSON; empty where nothing does."""
        changed = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}
        return json.dumps(changed) if changed else ""

    @staticmethod
    def parse(text: str) -> LaunchPlan:
        """Of ``text()``."""
        return LaunchPlan(**json.loads(text)) if text else LaunchPlan()
