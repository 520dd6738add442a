"""Every kernel compiles for GPUs that are not here, and uses what they have."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
ROOT = Path(__file__).resolve().parents[2]
NAMES = ("sm_80", "sm_86", "sm_90", "sm_100", "gfx942", "gfx950")
READERS = ("look_ahead", "refine")
AROUND = ("predict_parts", "list_subtiles", "merge_and_audit", "trust_and_guard")


def run(name: str) -> list[dict]:
    """One row per kernel of each call; in a process of its own, which does not interpret."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.compile_all", name], cwd=ROOT, capture_output=True, text=True,
        env={**environment, "PYTHONPATH": str(ROOT)}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@cache
def all_compiled() -> dict[str, Future]:
    """Two processes at a time, the longest first."""
    pool = ThreadPoolExecutor(2)
    return {name: pool.submit(run, name) for name in ("sm_90", *(name for name in NAMES if name != "sm_90"))}


def compiled(name: str) -> list[dict]:
    return all_compiled()[name].result()


@pytest.mark.parametrize("name", NAMES)
def test_every_kernel_compiles(name):
    """Eleven calls for Hopper, in four of them ``prepare_query`` and in the three where programs do not join all rows
    of a kv head ``guard_step``; three calls elsewhere. Of a predicted step what stands around, in place of
    ``merge``."""
    rows = compiled(name)
    assert len(rows) == (11 * 3 + 9 + 4 + 3 + 2 * 4 if name == "sm_90" else 3 * 3 + 2 + 2 + 4) + 3
    assert {row["kernel"] for row in rows} >= {*READERS, *AROUND, "append_rows", "summarize_row"}


@pytest.mark.parametrize("name", NAMES)
def test_programs_fit_into_shared_memory(name):
    """Of head dimension 256, too: fewer steps are in flight there, and the rotation is read in pieces."""
    for row in compiled(name):
        assert row["shared"] <= row["room"], row


@pytest.mark.parametrize("name", NAMES)
def test_planes_are_multiplied_as_int8(name):
    for row in compiled(name):
        assert (row["int8_products"] > 0) == (row["kernel"] in READERS), row


@pytest.mark.parametrize("name", NAMES)
def test_dependent_launches_wait_before_they_write_or_let_others_begin(name):
    for row in compiled(name):
        wait, others, write = row["order"]
        if name not in ("sm_90", "sm_100") or row["kernel"] == "summarize_row":
            assert wait == others == -1, row
        else:
            assert -1 < wait < min(others, write), row
            if row["kernel"] in ("decide", "merge"):  # all that is read is asked for before the first sum
                assert row["fenced"], row
            if row["kernel"] == "refine":  # the look-ahead's results are read while the decision is made
                assert -1 < row["joins"] < wait, row
            if row["kernel"] == "look_ahead":  # programs that wait beside those that read slow these down
                assert 0 < row["last_product"] < others, row


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("sm_")])
def test_planes_are_loaded_asynchronously(name):
    for row in compiled(name):
        if row["kernel"] in READERS:
            assert row["asynchronous"] > 0, row


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("sm_")])
def test_what_the_look_ahead_notes_stays_in_the_cache(name):
    for row in compiled(name):
        assert (row["kept"] > 0) == (row["kernel"] == "look_ahead"), row


def test_pages_cost_no_asynchronous_load():
    """Where a sub-tile stands is read a step before its planes are; so are lists of them."""
    rows = {(row["case"], row["kernel"]): row["asynchronous"] for row in compiled("sm_90")}
    like = {"paged": "plain", "predicted": "many heads", "predicted, paged": "plain"}
    for case, other in like.items():
        loops = 2 if "predicted" in case else 1  # of the refinement: what was known before, and what was not
        assert rows[case, "look_ahead"] == rows[other, "look_ahead"], rows
        assert rows[case, "refine"] == loops * rows[other, "refine"], rows


def test_the_look_ahead_of_one_token_keeps_its_registers():
    """The loop that reads every key: what it spilled would cost more than it reads."""
    rows = [row for row in compiled("sm_90") if row["kernel"] == "look_ahead" and row["case"] != "tokens"]
    assert len(rows) == 10
    assert all(row["spilled"] == 0 for row in rows), rows


def test_programs_of_the_refinement_leave_room_for_each_other():
    """Five of two warps, or twelve of one."""
    rows = {(row["case"], row["kernel"]): row["registers"] for row in compiled("sm_90")}
    assert [rows[case, "refine"] for case in ("plain", "many heads", "dim 256")] == [168, 168, None]


@pytest.mark.parametrize("arch", ["sm_90", "sm_100"])
@pytest.mark.parametrize("heads", [1, 2, 3, 4])
def test_cuda_sources_compile(arch, heads):
    """With the shared memory that one program may have, and without registers in memory."""
    pytest.importorskip("cuda.bindings.nvrtc", reason="cuda-bindings is not installed")
    from lamp_compile.runtime.kernels import finish, nvrtc
    from tests.kernels import offline
    from tests.kernels.compile_all import SHARED

    constants = finish.Constants(finish.THREADS, heads, max(finish.HALVES), max(finish.HALVES), 32)
    assert constants.shared <= SHARED[arch]
    code = nvrtc.compile_source("finish", dict(constants.defines), arch)
    assert offline.local_memory(code) == 0


def test_a_source_that_does_not_compile_says_why():
    pytest.importorskip("cuda.bindings.nvrtc", reason="cuda-bindings is not installed")
    from lamp_compile.runtime.kernels import finish, nvrtc

    defines = dict(finish.Constants(256, 4, 64, 64, 32).defines) | {"SHARED": 1000}
    with pytest.raises(nvrtc.NvrtcError, match="reserves less"):
        nvrtc.compile_source("finish", defines, "sm_90")
