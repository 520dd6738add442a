"""Builds the CPU kernels with the package; everything else is in pyproject.toml.

One shared library, each instruction set compiled with flags of its own and chosen from at run time. It has a plain C
interface (no Python, no torch headers), so it is loaded with ctypes. Without a working compiler the package installs
all the same, and says at run time that the CPU reference is slow.
"""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

CORE = Path("lamp_compile/runtime/kernels/cpu/core")
COMMON = ["-std=c++17", "-O3", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi", "-g0"]
X86 = {
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni", "-mfma", "-mf16c"],
}
ARM = {"neon": [] if sys.platform == "darwin" else ["-march=armv8.2-a+dotprod"]}


def instruction_sets(machine: str) -> tuple[str, dict[str, list[str]]]:
    """The macro that says which kernels there are, and the flags of each of their files."""
    if machine.lower() in ("x86_64", "amd64"):
        return "LAMP_X86", X86
    if machine.lower() in ("aarch64", "arm64"):
        return "LAMP_NEON", ARM
    return "LAMP_PORTABLE", {}


class BuildCore(build_ext):
    """Compiles each file of the core with its own flags."""

    def get_ext_filename(self, name: str) -> str:
        """Without the interpreter's version, which does not matter to it."""
        return str(Path(*name.split("."))) + ".so"

    def build_extension(self, ext: Extension) -> None:
        """As setuptools would, but for the flags, and for the C++ linker."""
        macro, flags = instruction_sets(platform.machine())
        extra = os.environ.get("LAMP_CXXFLAGS", "").split()
        objects = []
        for source in ("core", "ort_ops", "portable", *flags):
            objects += self.compiler.compile(
                [str(CORE / f"{source}.cpp")],
                output_dir=self.build_temp,
                macros=[(macro, None)],
                extra_postargs=[*COMMON, *flags.get(source, []), *extra],
                depends=[str(path) for path in sorted(CORE.iterdir())],
            )
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        self.compiler.link_shared_object(objects, str(target), extra_postargs=extra, target_lang="c++")


class PlatformWheel(bdist_wheel):
    """A wheel for this platform and any Python."""

    def get_tag(self) -> tuple[str, str, str]:
        """Not bound to the interpreter that builds it."""
        return "py3", "none", super().get_tag()[2]


if __name__ == "__main__":
    setup(
        ext_modules=[Extension("lamp_compile.runtime.kernels.cpu._core", sources=[], optional=True)],
        cmdclass={"build_ext": BuildCore, "bdist_wheel": PlatformWheel},
    )
