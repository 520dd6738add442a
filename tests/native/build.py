"""Compiles the core and the fuzz program, by a few calls: ``python -m tests.native.build FOLDER [KIND]``."""

from __future__ import annotations

import importlib.util
import platform
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
CORE = ROOT / "lamp_compile/runtime/kernels/cpu/core"


class Kind(NamedTuple):
    """A way to compile: the compiler, flags behind those of setup.py, and for which machine ("" is this one)."""

    compiler: tuple[str, ...]
    flags: tuple[str, ...]
    machine: str = ""


ALWAYS = ("core", "ort_ops", "torch_ops", "portable")
"""Files that are compiled for every machine."""
SANITIZERS = ("-O1", "-g1", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer")
QUIET = ("-Wno-maybe-uninitialized", "-Wno-uninitialized")
"""Of gcc 12's own avx512fintrin.h."""
KINDS = {
    "address": Kind(("g++",), (*SANITIZERS, "-fsanitize=address,undefined")),
    "thread": Kind(("g++",), (*SANITIZERS, "-fsanitize=thread")),
    "plain": Kind(("g++",), ("-O2",)),
    "warnings": Kind(("g++",), ("-O2", "-Wall", "-Wextra", "-Werror", *QUIET)),
    "clang": Kind((sys.executable, "-m", "ziglang", "c++"), ("-O2", "-Wall", "-Wextra", "-Werror")),
    "aarch64": Kind(("aarch64-linux-gnu-g++",), ("-O2", "-static", "-Wall", "-Wextra"), "aarch64"),
}


def setup_file() -> ModuleType:
    """setup.py, for its flags."""
    found = importlib.util.spec_from_file_location("lamp_setup", ROOT / "setup.py")
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def compile_core(folder: Path, kind: str) -> list[Path]:
    """Object files of the core, each with the flags of setup.py, and of nothing else."""
    settings, setup = KINDS[kind], setup_file()
    macro, sets = setup.instruction_sets(settings.machine or platform.machine())
    common = [flag for flag in setup.COMMON if flag not in ("-O3", "-g0")] + [f"-D{macro}"]
    jobs = {name: [*common, *sets.get(name, []), *settings.flags] for name in (*ALWAYS, *sets)}

    def one(name: str) -> Path:
        made = folder / f"{name}.o"
        command = [*settings.compiler, *jobs[name], "-fPIC", "-c", str(CORE / f"{name}.cpp"), "-o", str(made)]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=500)
        return made

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(one, jobs))


def build(folder: Path, kind: str, source: str = "fuzz") -> Path:
    """A program of this folder: ``fuzz`` calls the core, ``ort_fuzz`` the operators of ONNX Runtime, ``segments`` and
    ``helping`` what threads share, ``whole`` and ``asked`` parts of the kernels for AVX-512. Object files that are
    there are used again."""
    settings, program = KINDS[kind], folder / source
    objects = sorted(folder.glob("*.o")) or compile_core(folder, kind)
    flags = [flag for flag in settings.flags if not flag.startswith("-W")]
    if source in ("whole", "asked"):
        flags += [
            *setup_file().instruction_sets(settings.machine or platform.machine())[1]["avx512"],
            "-DLAMP_X86",
            "-w",
        ]
    command = [*settings.compiler, "-std=c++17", f"-I{CORE}", *flags, str(ROOT / f"tests/native/{source}.cpp"),
               *map(str, objects), "-pthread", "-o", str(program)]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=500)
    return program


if __name__ == "__main__":
    target = Path(sys.argv[1])
    target.mkdir(parents=True, exist_ok=True)
    for program in ("fuzz", "ort_fuzz", "segments", "helping"):
        print(build(target, sys.argv[2] if len(sys.argv) > 2 else "address", program))
