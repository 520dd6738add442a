"""What each kind of GPU is given: which instructions, how many columns at least, how a call is cut into programs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from lamp_compile.launch_plan import LaunchPlan
from lamp_compile.runtime.kernels._tensors import padded_half, power_of_two


@dataclass(frozen=True)
class Target:
    """One kind of GPU.

    Attributes:
        name: As compilers call it ("sm_90", "gfx942"), or "interpreter".
        asm: Inline PTX unpacks four nibbles at a time; plain operations elsewhere.
        pdl: Programmatic dependent launch: a launch may begin while the one ahead of it ends.
        columns: Of the smallest matrix instruction.
        processors: Multiprocessors or compute units.
        shared: Bytes of shared memory that one program may have.
    """

    name: str
    asm: bool
    pdl: bool
    columns: int
    processors: int
    shared: int

    def dependent(self, asked: bool = True) -> dict[str, bool]:
        """Of a launch: it may begin while the one ahead ends, and lets the next one (``_device.wait_for_launch``)."""
        return {"PDL": True, "launch_pdl": True} if self.pdl and asked else {"PDL": False}


@dataclass(frozen=True)
class Cut:
    """One call, cut: rows of a program (tokens x group, padded), sub-tiles that share a pass (``_device.py``), tokens
    and number of its row blocks, sub-tiles of a sequence, programs of the look-ahead (splits) and of the refinement
    (segments) for one block of rows; warps of the latter where it holds few numbers, and how many of its programs a
    multiprocessor is to hold; where sequences differ in length, steps of a split at least; whether a program holds few
    numbers (SMALL); steps of both loops in flight, as many as shared memory holds."""

    rows: int
    pack: int
    tokens: int
    blocks: int
    subtiles: int
    splits: int
    segments: int
    refine_warps: int
    refine_programs: int
    least_steps: int
    small: bool
    stages: int
    refine_stages: int
    launch: LaunchPlan

    @property
    def slots(self) -> int:
        """Partial results of one block of rows."""
        return self.splits + self.segments

    def warps(self, value_width: int) -> tuple[int, int]:
        """Of the look-ahead and of the refinement: more where a program holds more numbers than one warp's registers.
        ``value_width`` is half the value dimension, padded."""
        held = self.rows * self.pack * value_width
        return min(16, self.launch.warps * max(1, held // 1024)), min(16, self.refine_warps * max(1, held // 512))


SMALL = 512
"""Columns times padded halves of the channels of a program that fits into few registers."""
FIT = 8
"""Programs per multiprocessor of those that do not."""
BESIDE = 4096
"""Bytes of shared memory beside the steps in flight, at most."""


@cache
def target_of(device: torch.device) -> Target:
    """The target of a device; the interpreter for a CPU."""
    if device.type != "cuda":
        return Target("interpreter", False, False, 8, 1, 1 << 30)
    found = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        name = found.gcnArchName.split(":")[0]
        return Target(name, False, False, 16, found.multi_processor_count, found.shared_memory_per_block)
    name = f"sm_{found.major}{found.minor}"
    shared = int(getattr(found, "shared_memory_per_block_optin", found.shared_memory_per_block))
    return Target(name, True, found.major >= 9, 8, found.multi_processor_count, shared)


def in_flight(stages: int, step: int, target: Target) -> int:
    """Steps of a loop in flight, of ``step`` bytes each: as many as asked for, or as shared memory holds."""
    return max(1, min(stages, 1 + (target.shared - BESIDE) // step))


def cut(
    target: Target, launch: LaunchPlan, q: Tensor, planes: tuple[Tensor, ...], room: int, subtile: int, mixed: bool
) -> Cut:  # fmt: skip
    """Cut attention of q ``[B, H, S, D]`` over room for ``room`` keys per sequence; ``mixed``: most are far from it."""
    batch, heads, queries, _ = q.shape
    group = heads // planes[0].shape[1]
    rows = power_of_two(group)
    if queries > 1:
        rows = max(rows, min(launch.most_rows, power_of_two(group * queries)))
    tokens = max(1, min(queries, rows // group))
    blocks = -(-queries // tokens)
    crowd = batch * planes[0].shape[1] * blocks
    subtiles = -(-room // subtile)
    pack = max(1, target.columns // rows)
    halves = padded_half(planes[0].shape[4]), padded_half(planes[3].shape[3])
    small, step = rows * pack * max(halves) <= SMALL, pack * subtile * sum(halves)
    programs, refine_programs, refine_warps = launch.programs, launch.refine_programs, launch.refine_warps
    if small and target.asm and crowd <= launch.most_paired and refine_warps == 1:
        refine_programs, refine_warps = launch.paired_programs, 2
    if not small:
        programs, refine_programs = min(FIT, programs), min(FIT, refine_programs)
    splits = min(target.processors * programs // crowd, subtiles // launch.least_subtiles, launch.most_splits)
    segments = min(target.processors * refine_programs // crowd, subtiles // pack, launch.most_segments)
    steps = 1
    if mixed and queries == 1:  # the longest sequence must not be the last one at work
        steps = launch.mixed_steps
        splits = max(splits, min(launch.most_splits, -(-subtiles // (pack * steps))))
        segments = max(segments, -(-subtiles // launch.mixed_tiles))
    stages, refine_stages = in_flight(launch.stages, step, target), in_flight(launch.refine_stages, 2 * step, target)
    splits, segments = max(1, splits), max(1, segments)
    return Cut(
        rows, pack, tokens, blocks, subtiles, splits, segments, refine_warps, refine_programs, steps, small, stages,
        refine_stages, launch,
    )  # fmt: skip
