"""``finish.cu`` on the host: compiled by g++ over coroutines (``tests/native/gpu``), in place of NVRTC and a GPU."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path
from typing import Any

import torch

from lamp_compile.runtime.kernels import nvrtc

HOST = Path(__file__).parents[1] / "native" / "gpu"
COMMAND = ("g++", "-std=c++17", "-O1", "-g1", "-shared", "-fPIC", "-Wall", "-Wno-unknown-pragmas")


class HostGpu:
    """Stands in for ``nvrtc``: launches run to their end before they return. ``launches`` counts them."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.launches = folder, 0
        self._made: dict[nvrtc.Defines, ctypes.CDLL] = {}

    def why_not(self, device: torch.device) -> str | None:
        return None

    def why_not_compiled(self, name: str, defines: nvrtc.Defines, device: torch.device) -> str | None:
        if defines not in self._made:
            path = self.folder / f"{name}{len(self._made)}.so"
            given = [*(f"-D{key}={value}" for key, value in defines), f"-I{HOST}", f"-I{nvrtc.SOURCES}"]
            subprocess.run([*COMMAND, *given, str(HOST / f"{name}.cpp"), "-o", str(path)], check=True)
            self._made[defines] = ctypes.CDLL(str(path))
        return None

    def launch(
        self, name: str, defines: nvrtc.Defines, arguments: Any, *, grid: tuple[int, int, int], shared: int,
        **others: Any,
    ) -> bool:  # fmt: skip
        self.launches += 1
        assert grid[:2] == (arguments.blocks, arguments.kv_heads)
        self._made[defines].run_finish(ctypes.byref(arguments), grid[2], ctypes.c_longlong(shared))
        return True
