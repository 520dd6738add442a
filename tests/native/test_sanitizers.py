"""The core under sanitizers, on random calls; on another instruction set under an emulator; with another compiler.

``make fuzz`` runs many more cases. A failure prints its seed: ``python -m tests.native.build FOLDER address`` and
``FOLDER/fuzz SEED 1`` repeat it.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from lamp_compile.runtime.kernels import cpu
from tests.native.build import KINDS, build, compile_core

FIRST = 1
CASES = {"address": 300, "thread": 40, "aarch64": 60}
"""Each takes about ten seconds of two cores, besides compiling."""

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")


def made(folder: Path, kind: str, source: str = "fuzz") -> Path:
    """The program; what the compiler said where it fails."""
    try:
        return build(folder, kind, source)
    except subprocess.CalledProcessError as error:
        pytest.fail(f"{kind}: {error.stderr[-3000:]}")


def run(command: list[str], **environment: str) -> str:
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=500, check=False, env={**os.environ, **environment}
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0, said[-4000:]
    return said


def fuzz(program: Path, kind: str, *before: str, **environment: str) -> str:
    said = run([*before, str(program), str(FIRST), str(CASES[kind])], **environment)
    assert f"{CASES[kind]} cases" in said
    found = re.search(r"(\d+) results by lanes as by rows", said)
    assert found is not None
    assert int(found[1]) > CASES[kind] // 4
    return said


@pytest.fixture(scope="module")
def addresses(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for what is compiled to watch addresses: once for all its programs."""
    return tmp_path_factory.mktemp("address")


def test_nothing_is_read_or_written_out_of_bounds(addresses: Path) -> None:
    fuzz(made(addresses, "address"), "address", ASAN_OPTIONS="detect_leaks=0")


@pytest.mark.skipif("avx512" not in cpu.instruction_sets(), reason="this processor has no AVX-512 VNNI")
def test_whole_chunks_are_what_they_are_in_the_common_way(addresses: Path) -> None:
    """And there are some: weights relative to a level are a way of their own, which nobody need notice losing."""
    said = run([str(made(addresses, "address", "whole")), str(FIRST), "1000"], ASAN_OPTIONS="detect_leaks=0")
    cases, *chunks = (int(word) for word in re.findall(r"\d+", said))
    assert cases > 30
    assert sum(chunks) > 4 * cases
    assert chunks[0] == 0  # of 64 channels, by rows
    assert min(chunks[1:]) > 10  # of 128 and of 256; by lanes of 64 too


@pytest.fixture(scope="module")
def asked(addresses: Path) -> list[str]:
    """What the program says about lines that are asked for."""
    if "avx512" not in cpu.instruction_sets():
        pytest.skip("this processor has no AVX-512 VNNI")
    return run([str(made(addresses, "address", "asked"))], ASAN_OPTIONS="detect_leaks=0").splitlines()


@pytest.mark.parametrize("layout", ["rows", "lanes"])
def test_what_is_read_is_asked_for(layout: str, asked: list[str]) -> None:
    """Over head sizes, groups, and shares of refined sub-tiles from none to all; what a head begins with by the one
    before it."""
    lines = [line for line in asked[:-1] if line.startswith(layout)]
    calls = [[float(word) for word in re.findall(r"\d+(?:\.\d+)?", line)] for line in lines]
    assert len(calls) == 3 * 4 * 4
    for line, (_dim, _group, refined, queries, scales, first, keys, values, *more) in zip(lines, calls, strict=True):
        residual, twice = more[:2], more[2:]
        assert min(queries, scales, first) == 1, line
        assert keys > 0.99, line
        assert values > (0.93 if refined < 0.5 else 0.88), line
        assert len(residual) == (2 if refined else 0), line
        # And next to nothing else: where few sub-tiles are refined, what lies behind one.
        assert max(residual, default=1) < 1.1, line
        assert min(residual, default=1) > (0.96 if refined < 0.5 else 0.92), line
        assert all(share > 0.9 if refined < 0.5 else share < 0.6 for share in twice), line
    assert sum(0.01 < call[2] < 0.2 for call in calls) > 8  # such as text has


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="asks Linux which processor this is")
def test_the_first_cache_is_asked_on_a_zen_5(asked: list[str]) -> None:
    said = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    zen5 = "AuthenticAMD" in said and re.search(r"cpu family\s*: 26$", said, re.MULTILINE) is not None
    assert asked[-1] == f"into the {'first' if zen5 else 'second'} cache"


def test_operators_of_onnxruntime_refuse_what_does_not_fit(addresses: Path) -> None:
    """Wrong shapes, types, numbers and missing inputs; right calls are taken."""
    program = made(addresses, "address", "ort_fuzz")
    said = run([str(program), str(FIRST), "1500"], ASAN_OPTIONS="detect_leaks=0")
    accepted, refused = (int(word) for word in re.findall(r"(\d+) (?:accepted|refused)", said))
    assert accepted > 500
    assert refused > 500


@pytest.fixture(scope="module")
def races(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Likewise, to watch threads."""
    return tmp_path_factory.mktemp("thread")


def test_threads_do_not_race(races: Path) -> None:
    fuzz(made(races, "thread"), "thread")


def test_threads_share_segments(races: Path) -> None:
    """Each goes to one thread, the owner's come first to last, and those with nothing else to do take some."""
    said = run([str(made(races, "thread", "segments")), "200", "4"])
    assert "200 rounds" in said


def test_threads_without_a_piece_help(races: Path) -> None:
    """The bits are the same, whoever has done it."""
    said = run([str(made(races, "thread", "helping")), "8"])
    assert "8 calls" in said


def test_neon_under_an_emulator(tmp_path: Path) -> None:
    compiler, emulator = KINDS["aarch64"].compiler[0], "qemu-aarch64-static"
    for tool, package in ((compiler, "g++-aarch64-linux-gnu"), (emulator, "qemu-user-static")):
        if shutil.which(tool) is None and platform.machine() != "aarch64":
            pytest.skip(f"{tool} is missing (Debian: {package})")
    said = fuzz(made(tmp_path, "aarch64"), "aarch64", emulator)
    assert "neon,portable" in said


@pytest.mark.parametrize("kind", ["warnings", "clang"])
def test_compilers_have_nothing_to_say(kind: str, tmp_path: Path) -> None:
    if kind == "clang" and importlib.util.find_spec("ziglang") is None:
        pytest.skip("no clang: pip install ziglang")
    try:
        compile_core(tmp_path, kind)
    except subprocess.CalledProcessError as error:
        pytest.fail(f"{kind}: {error.stderr[-3000:]}")
