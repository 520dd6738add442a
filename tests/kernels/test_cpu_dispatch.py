"""When the compiled core for CPUs runs, and what is said where it does not."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lamp_compile.runtime import fused_ops, kernels
from lamp_compile.runtime.kernels import cpu
from lamp_compile.runtime.kernels.cpu import _library
from tests.kernels import calls

CACHED = (_library.path, _library.load, _library.why_not)


@pytest.fixture
def asked_anew() -> Iterator[None]:
    """What is known of the library is forgotten before the test and after it."""
    before = cpu.instruction_set()
    for function in CACHED:
        function.cache_clear()
    yield
    for function in CACHED:
        function.cache_clear()
    if before:
        _library.load().lamp_use(before.encode())


def pretend(monkeypatch, file: Path | None) -> None:
    monkeypatch.setattr(_library, "path", lambda: file)


def without(monkeypatch) -> None:
    monkeypatch.delenv(_library.VARIABLE, raising=False)


@pytest.mark.skipif(_library.path() is None, reason="the core is not compiled here")
class TestWithTheCore:
    @pytest.mark.usefixtures("asked_anew")
    def test_it_runs(self, monkeypatch):
        without(monkeypatch)
        assert kernels.why_not_device("cpu") is None
        assert cpu.instruction_set() == cpu.instruction_sets()[0]
        assert cpu.instruction_sets()[-1] == "portable"

    @pytest.mark.usefixtures("asked_anew")
    @pytest.mark.parametrize("name", cpu.instruction_sets())
    def test_an_instruction_set_by_name(self, name, monkeypatch):
        monkeypatch.setenv(_library.VARIABLE, name)
        assert kernels.why_not_device("cpu") is None
        assert cpu.instruction_set() == name

    @pytest.mark.usefixtures("asked_anew")
    def test_switched_off(self, monkeypatch):
        monkeypatch.setenv(_library.VARIABLE, "none")
        assert kernels.why_not_device("cpu") == "LAMP_CPU=none"
        assert cpu.instruction_set() == ""
        call = calls.make()
        assert "LAMP_CPU" in str(kernels.why_not_attend(call.q, call.planes, call.hot[3], call.options))

    @pytest.mark.usefixtures("asked_anew")
    def test_nonsense_is_answered_with_what_there_is(self, monkeypatch):
        monkeypatch.setenv(_library.VARIABLE, "nonsense")
        with pytest.warns(UserWarning, match="LAMP_CPU=nonsense.*the reference runs, slowly"):
            reason = str(kernels.why_not_device("cpu"))
        assert "LAMP_CPU=nonsense" in reason
        assert all(name in reason for name in cpu.instruction_sets())
        assert cpu.instruction_set() == ""

    def test_the_best_is_what_this_processor_has(self):
        """Not only the portable one, where the kernel lists more."""
        information = Path("/proc/cpuinfo")
        flags = set(information.read_text().split()) if information.exists() else set()
        wanted = {
            "avx2": {"avx2", "fma", "f16c"},
            "avx512": {"avx512_vnni", "avx512vl", "avx512bw"},
            "neon": {"asimddp"},
        }
        for name, needed in wanted.items():
            if flags:
                assert (name in cpu.instruction_sets()) == (needed <= flags), name


@pytest.mark.usefixtures("asked_anew")
def test_without_a_compiler_there_is_a_reason(monkeypatch):
    without(monkeypatch)
    pretend(monkeypatch, None)
    assert "no C++ compiler" in str(kernels.why_not_device("cpu"))
    assert cpu.instruction_sets() == ()
    call = calls.make()
    arguments = (call.q, *call.planes, *(x.clone() for x in call.hot), call.balance, *call.seen)
    wanted = calls.by_reference(call, calls.levels_of(call))
    found = fused_ops._fused_attention(*arguments, *fused_ops.settings(call.options))  # as torch calls it then
    assert torch.equal(found, wanted.out)


@pytest.mark.usefixtures("asked_anew")
def test_on_windows_the_reason_names_the_compiler(monkeypatch):
    without(monkeypatch)
    pretend(monkeypatch, None)
    monkeypatch.setattr("platform.system", lambda: "Windows")
    assert "clang-cl" in str(kernels.why_not_device("cpu"))


@pytest.mark.usefixtures("asked_anew")
@pytest.mark.skipif(_library.path() is None, reason="the core is not compiled here")
def test_threads_of_its_own_give_the_same_bits(monkeypatch):
    """As on macOS and Windows, where torch's OpenMP runtime is not GCC's."""
    without(monkeypatch)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        call = calls.make(batch=2, heads=8, kv_heads=4, keys=5000, share=0.2)
        wanted = cpu.attend(*call.arguments(torch.device("cpu"))).out
        monkeypatch.setattr(_library, "_gomp_parallel", lambda: None)
        _library.load.cache_clear()
        assert "of its own" in cpu.threads()
        for _ in range(3):
            assert torch.equal(cpu.attend(*call.arguments(torch.device("cpu"))).out, wanted)
    finally:
        torch.set_num_threads(before)


@pytest.mark.usefixtures("asked_anew")
@pytest.mark.parametrize("content", [b"", b"no library", b"\x7fELF" + bytes(200)])
def test_a_file_that_is_no_library_has_a_reason(content, monkeypatch, tmp_path):
    without(monkeypatch)
    file = tmp_path / "_core.so"
    file.write_bytes(content)
    pretend(monkeypatch, file)
    assert "do not load" in str(kernels.why_not_device("cpu"))
    assert cpu.instruction_set() == ""
    assert cpu.instruction_sets() == ()


SOURCES = {
    "of something else": "int nothing;",
    "with other structures": """
        const char *lamp_instruction_sets(void) { return "portable"; }
        const char *lamp_instruction_set(void) { return "portable"; }
        int lamp_use(const char *name) { return 0; }
        void lamp_use_threads_of(void *parallel) {}
        int lamp_append(const void *call) { return 0; }
        int lamp_attend(const void *call) { return 0; }
        long long lamp_size_of_append(void) { return 8; }
        long long lamp_size_of_attend(void) { return 8; }
    """,
}


@pytest.mark.usefixtures("asked_anew")
@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
@pytest.mark.parametrize("name", SOURCES)
def test_a_library_of_other_sources_has_a_reason(name, monkeypatch, tmp_path):
    without(monkeypatch)
    source, file = tmp_path / "other.c", tmp_path / "_core.so"
    source.write_text(SOURCES[name])
    subprocess.run(["cc", "-shared", "-fPIC", "-w", "-o", file, source], check=True, timeout=60)
    pretend(monkeypatch, file)
    assert "do not load" in str(kernels.why_not_device("cpu"))
    assert cpu.instruction_sets() == ()


def test_the_variable_is_read_by_a_fresh_process(root):
    code = "from lamp_compile.runtime import kernels; print(kernels.why_not_device('cpu'))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True,
        env={**os.environ, "LAMP_CPU": "none", "PYTHONPATH": str(root)},
    )  # fmt: skip
    assert done.stdout.strip() == "LAMP_CPU=none"


REASONS = {
    "head dimension": ({"dim": 18, "rotation": "none"}, "multiples of 4"),
    "value dimension": ({"value_dim": 22, "rotation": "none"}, "multiples of 4"),
    "storage tile": ({"tile": 16, "subtile": 16}, "storage tiles of 32"),
    "group": ({"heads": 65, "kv_heads": 1, "keys": 40}, "65 query heads to a kv head"),
}


@pytest.mark.skipif(cpu.why_not() is not None, reason="the core does not run here")
@pytest.mark.parametrize("name", REASONS)
def test_what_the_core_cannot_do_has_a_reason(name):
    settings, reason = REASONS[name]
    call = calls.make(tau=0.1, **settings)
    assert reason in str(kernels.why_not_attend(call.q, call.planes, call.hot[3], call.options))
