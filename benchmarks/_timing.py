"""Time and energy on a device: captured graphs replayed between events, and the energy counter of NVML."""

from __future__ import annotations

import ctypes
import gc
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

Call = Callable[[], Any]
LEAST_CALLS = 4
"""Calls in one captured graph at least, so that the events' own time does not count."""


def milliseconds(calls: Sequence[Call], repeats: int, device: torch.device) -> float:
    """Median time of one call. On CUDA the calls (the same work on different inputs, more than the caches hold) take
    turns inside one captured graph, which is replayed between events."""
    turns = [*calls] * -(-LEAST_CALLS // len(calls)) if device.type == "cuda" else [*calls]
    if device.type != "cuda":
        return _on_the_host(turns, repeats)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in (*turns, *turns)[: max(3, len(calls))]:
            call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in turns:
            call()
    for _ in range(2):
        graph.replay()
    marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for began, ended in marks:
        began.record()
        graph.replay()
        ended.record()
    torch.cuda.synchronize()
    return statistics.median(began.elapsed_time(ended) for began, ended in marks) / len(turns)


def _on_the_host(calls: Sequence[Call], repeats: int) -> float:
    calls[0]()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        for call in calls:
            call()
        times.append((time.perf_counter() - began) * 1e3 / len(calls))
    return statistics.median(times)


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def copy_bandwidth(device: torch.device, repeats: int, size: int = 1 << 30) -> float:
    """GB/s of a device copy, bytes read and bytes written together. By a kernel: in a CUDA graph a plain ``copy_`` becomes
    a memory-copy node, which reached 2.7 TB/s where kernels reach 4.3."""
    size = size if device.type == "cuda" else 1 << 24
    source = torch.ones(size // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    return 2 * size / milliseconds([lambda: torch.mul(source, 2.0, out=target)], repeats, device) / 1e6


def cache_bytes(device: torch.device) -> int:
    """Size of the device's last-level cache; 0 where it does not matter."""
    if device.type != "cuda":
        return 0
    return int(getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0) or 50 << 20)


def release(device: torch.device) -> None:
    """Give freed memory back before something large."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


class Energy:
    """Joules that the device has used since the driver was loaded; None where nobody counts them."""

    def __init__(self, device: torch.device) -> None:
        self._read: Callable[[], int] | None = None
        if device.type != "cuda":
            return
        properties = torch.cuda.get_device_properties(device)
        uuid = f"GPU-{properties.uuid}"
        for reader in (_reader_of_pynvml, _reader_of_the_library):
            try:
                read = reader(uuid)
                read()
            except Exception:  # noqa: BLE001  (no library, no counter, no permission: there is no energy then)
                continue
            self._read = read
            return

    def joules(self) -> float | None:
        """The counter now."""
        return None if self._read is None else self._read() / 1e3


def _reader_of_pynvml(uuid: str) -> Callable[[], int]:
    import pynvml

    pynvml.nvmlInit()
    try:
        handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
    except pynvml.NVMLError:
        handle = pynvml.nvmlDeviceGetHandleByIndex(0)
    return lambda: int(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle))


def _reader_of_the_library(uuid: str) -> Callable[[], int]:
    library = ctypes.CDLL("libnvidia-ml.so.1")
    handle, value = ctypes.c_void_p(), ctypes.c_ulonglong()
    if library.nvmlInit_v2():
        raise OSError("NVML does not start")
    if library.nvmlDeviceGetHandleByUUID(uuid.encode(), ctypes.byref(handle)) and library.nvmlDeviceGetHandleByIndex_v2(
        ctypes.c_uint(0), ctypes.byref(handle)
    ):
        raise OSError("NVML does not know the device")

    def read() -> int:
        if library.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(value)):
            raise OSError("NVML counts no energy here")
        return int(value.value)

    return read
