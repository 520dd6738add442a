"""What a CPU is: its name, its last-level cache, and how many bytes a second it reads."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

CACHE = 32 << 20
"""Size of the last-level cache where the system does not say."""
FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16", "asimddp", "i8mm", "sve")


def cache_bytes(root: Path = Path("/sys/devices/system/cpu/cpu0/cache")) -> int:
    """Size of the largest cache that the first core sees."""
    sizes = []
    for path in root.glob("index*/size"):
        text = path.read_text(encoding="ascii").strip()
        factor = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(text[-1:], 1)
        digits = text.rstrip("KMG")
        if digits.isdigit():
            sizes.append(int(digits) * factor)
    return max(sizes, default=CACHE)


def describe(info: Path = Path("/proc/cpuinfo")) -> dict[str, Any]:
    """Model name and the instruction sets that matter here; empty where the system does not say."""
    found: dict[str, Any] = {"cpu": "", "isa": [], "cache_mb": cache_bytes() / (1 << 20)}
    if not info.exists():
        return found
    for line in info.read_text(encoding="utf-8").splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            found["cpu"] = value.strip()
        if key.strip() in ("flags", "Features"):
            found["isa"] = [flag for flag in FLAGS if flag in value.split()]
    return found


_READERS: dict[str, tuple[torch.dtype, Callable[[Tensor], Tensor]]] = {
    "float32 maximum": (torch.float32, torch.amax),
    "float32 sum": (torch.float32, torch.sum),
    "float64 sum": (torch.float64, torch.sum),
    "int64 sum": (torch.int64, torch.sum),
    "int64 maximum": (torch.int64, torch.amax),
}
"""Reductions that read every byte once. None is best on every machine, so the fastest counts."""


class Reading:
    """Reading buffers of ``size`` bytes that no cache holds, with the threads torch has; a copy would count what is
    written, and is slower."""

    def __init__(self, size: int, buffers: int = 2) -> None:
        self.size = size // 8 * 8
        self.held = [torch.ones(self.size // 4, dtype=torch.float32) for _ in range(buffers)]
        self.tried = {name: self._rate(name) for name in _READERS}
        self.best = max(self.tried, key=self.tried.__getitem__)

    def calls(self, name: str = "") -> list[Callable[[], None]]:
        """One call for each buffer, the fastest way or this one."""
        dtype, read = _READERS[name or self.best]

        def call(buffer: Tensor) -> None:
            read(buffer.view(dtype))

        return [lambda b=buffer: call(b) for buffer in self.held]

    def _rate(self, name: str) -> float:
        """GB/s, roughly."""
        times = []
        for call in self.calls(name) * 2:
            began = time.perf_counter()
            call()
            times.append(time.perf_counter() - began)
        return self.size / statistics.median(times[1:]) / 1e9
