"""How the CPU kernels are compiled on systems that are not this one: what setup.py decides. Nothing runs there."""

from __future__ import annotations

import shutil
from types import SimpleNamespace
from typing import Any

import pytest

from tests.native.build import setup_file

pytest.importorskip("setuptools", minversion="77", reason="building needs setuptools 77")
SETUP = setup_file()
BOTH = ["clang", "-arch", "arm64", "-arch", "x86_64", "-O2"]


@pytest.mark.parametrize(
    ("system", "machine", "archflags", "wanted"),
    [
        ("linux", "x86_64", "", "x86_64"),
        ("linux", "x86_64", "-arch arm64", "x86_64"),
        ("darwin", "arm64", "", "arm64"),
        ("darwin", "arm64", "-arch x86_64", "x86_64"),
        ("darwin", "arm64", "-arch arm64 -arch x86_64", "arm64"),
        ("win32", "AMD64", "", "AMD64"),
    ],
)
def test_the_machine_that_is_compiled_for(system, machine, archflags, wanted):
    assert SETUP.target_machine(system, machine, archflags) == wanted


@pytest.mark.parametrize(
    ("machine", "macro", "names"),
    [
        ("x86_64", "LAMP_X86", ["avx2", "avx512"]),
        ("AMD64", "LAMP_X86", ["avx2", "avx512"]),
        ("arm64", "LAMP_NEON", ["neon"]),
        ("aarch64", "LAMP_NEON", ["neon"]),
        ("riscv64", "LAMP_PORTABLE", []),
    ],
)
def test_the_instruction_sets_of_a_machine(machine, macro, names):
    found, flags = SETUP.instruction_sets(machine)
    assert found == macro
    assert list(flags) == names
    assert all((SETUP.CORE / f"{name}.cpp").exists() for name in names)


def test_no_compiler_needs_openmp():
    words = [*SETUP.COMMON, *(flag for flags in (*SETUP.X86.values(), *SETUP.ARM.values()) for flag in flags)]
    assert not [word for word in words if "openmp" in word.lower()]


def test_macos_compiles_for_one_machine_at_a_time():
    assert SETUP.one_architecture(BOTH, "arm64") == ["clang", "-O2", "-arch", "arm64"]
    assert SETUP.one_architecture(["clang", "-O2"], "arm64") == ["clang", "-O2"]
    compiler = SimpleNamespace(compiler_type="unix", compiler_so=BOTH, compiler_cxx=BOTH, linker_so=BOTH)
    SETUP.prepare(compiler, "darwin", "x86_64")
    for command in (compiler.compiler_so, compiler.compiler_cxx, compiler.linker_so):
        assert command == ["clang", "-O2", "-arch", "x86_64"]
    compiler = SimpleNamespace(compiler_type="unix", compiler_so=["gcc", "-O2"])
    SETUP.prepare(compiler, "linux", "x86_64")
    assert compiler.compiler_so == ["gcc", "-O2"]


class Msvc:
    """As much of setuptools' compiler for Visual Studio as is touched."""

    compiler_type = "msvc"

    def __init__(self) -> None:
        self.initialized, self.cc, self.compile_options = False, "", [""]

    def initialize(self) -> None:
        self.initialized, self.cc = True, "cl.exe"
        self.compile_options = ["/nologo", "/O2", "/W3", "/GL", "/DNDEBUG", "/MD"]


def with_programs(monkeypatch: pytest.MonkeyPatch, **found: str) -> None:
    def which(name: str, *args: Any) -> str | None:
        return found.get(name.replace("-", "_"))

    monkeypatch.setattr(shutil, "which", which)


def test_windows_takes_clang(monkeypatch):
    with_programs(monkeypatch, clang_cl="C:/LLVM/bin/clang-cl.exe")
    compiler = Msvc()
    SETUP.prepare(compiler, "win32", "AMD64")
    assert compiler.initialized
    assert compiler.cc == "C:/LLVM/bin/clang-cl.exe"
    assert "/GL" not in compiler.compile_options
    flags = SETUP.for_compiler("msvc", [*SETUP.COMMON, *SETUP.X86["avx512"]])
    assert "/clang:-std=c++17" in flags
    assert "/clang:-mavx512vnni" in flags
    assert all(flag.startswith("/clang:-") for flag in flags)
    assert SETUP.for_compiler("unix", SETUP.COMMON) == SETUP.COMMON


def test_windows_without_clang_says_what_is_missing(monkeypatch):
    """setuptools goes on without an optional extension, and prints this."""
    with_programs(monkeypatch)
    compiler = Msvc()
    with pytest.raises(SETUP.CompileError, match="clang-cl"):
        SETUP.prepare(compiler, "win32", "AMD64")
    assert compiler.cc == ""
