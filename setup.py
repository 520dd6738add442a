"""Builds the CPU kernels with the package; everything else is in pyproject.toml.

One shared library, each instruction set compiled with flags of its own and chosen from at run time. It has a plain C
interface (no Python, no torch headers), so it is loaded with ctypes, and it needs no OpenMP to be compiled: threads are
those of torch where they can be had, or its own. Compilers are g++ and clang, on Windows clang-cl, because the sources
use vector types that cl does not have. Without one that works the package installs all the same, and `lamp-compile
doctor` says that the CPU reference is slow.
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

CORE = Path("lamp_compile/runtime/kernels/cpu/core")
# Python's own flags for extensions have signed numbers wrap (-fwrapv): loops over them are then slower, by a tenth.
COMMON = [
    "-std=c++17", "-O3", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math", "-fno-wrapv",
    "-fstrict-overflow", "-Wno-psabi", "-g0",
]  # fmt: skip
X86 = {
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni", "-mfma", "-mf16c"],
}
ARM = {"neon": [] if sys.platform == "darwin" else ["-march=armv8.2-a+dotprod"]}
NO_CLANG = (
    "the CPU kernels need clang-cl on Windows, and there is none on PATH; it comes with Visual Studio as "
    "'C++ Clang tools for Windows', or with LLVM"
)


def target_machine(system: str, machine: str, archflags: str = "") -> str:
    """What is compiled for: this machine; on macOS another one where ARCHFLAGS asks for that alone."""
    asked = archflags.replace("-arch", " ").split()
    return asked[0] if system == "darwin" and len(asked) == 1 else machine


def instruction_sets(machine: str) -> tuple[str, dict[str, list[str]]]:
    """The macro that says which kernels there are, and the flags of each of their files."""
    if machine.lower() in ("x86_64", "amd64"):
        return "LAMP_X86", X86
    if machine.lower() in ("aarch64", "arm64"):
        return "LAMP_NEON", ARM
    return "LAMP_PORTABLE", {}


def for_compiler(kind: str, flags: list[str]) -> list[str]:
    """The flags as a compiler of that kind takes them: clang-cl hands clang's own on."""
    if kind != "msvc":
        return flags
    kept = [flag for flag in flags if flag not in ("-fvisibility=hidden", "-g0")]  # Windows exports what is marked
    return [f"/clang:{flag}" for flag in kept]


def one_architecture(command: list[str], machine: str) -> list[str]:
    """A compiler's command for one machine. Python for macOS comes for two, and compiles for both at once: each of our
    files is for one."""
    found = [at for at, word in enumerate(command) if word == "-arch"]
    if not found:
        return command
    dropped = {*found, *(at + 1 for at in found)}
    return [word for at, word in enumerate(command) if at not in dropped] + ["-arch", machine]


def prepare(compiler: Any, system: str, machine: str) -> None:
    """Make setuptools' compiler one that knows the sources' vector types, for one machine.

    Raises:
        CompileError: There is none.
    """
    if compiler.compiler_type == "msvc":
        clang = shutil.which("clang-cl")
        if clang is None:
            raise CompileError(NO_CLANG)
        if not compiler.initialized:
            compiler.initialize()
        compiler.cc = clang
        compiler.compile_options = [flag for flag in compiler.compile_options if flag != "/GL"]
    elif system == "darwin":
        for name in ("compiler_so", "compiler_so_cxx", "compiler_cxx", "linker_so", "linker_so_cxx"):
            if getattr(compiler, name, None):
                setattr(compiler, name, one_architecture(list(getattr(compiler, name)), machine))


class BuildCore(build_ext):
    """Compiles each file of the core with its own flags."""

    def get_ext_filename(self, name: str) -> str:
        """Without the interpreter's version, which does not matter to it; of one name on every system."""
        return str(Path(*name.split("."))) + ".so"

    def build_extension(self, ext: Extension) -> None:
        """As setuptools would, but for the flags, and for the C++ linker."""
        machine = target_machine(sys.platform, platform.machine(), os.environ.get("ARCHFLAGS", ""))
        macro, flags = instruction_sets(machine)
        prepare(self.compiler, sys.platform, machine)
        kind, extra = self.compiler.compiler_type, os.environ.get("LAMP_CXXFLAGS", "").split()
        objects = []
        for source in ("core", "ort_ops", "torch_ops", "portable", *flags):
            objects += self.compiler.compile(
                [str(CORE / f"{source}.cpp")],
                output_dir=self.build_temp,
                macros=[(macro, None)],
                extra_postargs=[*for_compiler(kind, [*COMMON, *flags.get(source, [])]), *extra],
                depends=[str(path) for path in sorted(CORE.iterdir())],
            )
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        self.compiler.link_shared_object(objects, str(target), extra_postargs=extra, target_lang="c++")


class PlatformWheel(bdist_wheel):
    """A wheel for this platform and any Python."""

    def get_tag(self) -> tuple[str, str, str]:
        """Not bound to the interpreter that builds it; for one machine where that interpreter is for two."""
        machine = target_machine(sys.platform, platform.machine(), os.environ.get("ARCHFLAGS", ""))
        return "py3", "none", super().get_tag()[2].replace("universal2", machine)


if __name__ == "__main__":
    setup(
        ext_modules=[Extension("lamp_compile.runtime.kernels.cpu._core", sources=[], optional=True)],
        cmdclass={"build_ext": BuildCore, "bdist_wheel": PlatformWheel},
    )
