"""CUDA C++ of this package (``cuda/``): compiled by NVRTC when it is first needed, and launched, through NVIDIA's
``cuda-bindings``, which CUDA 13 builds of torch bring along. Where that is missing, or does not work, nothing of it is
used: kernels in Triton do the same."""

from __future__ import annotations

import ctypes
import warnings
from collections.abc import Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

SOURCES = Path(__file__).parent / "cuda"
LEAST = (9, 0)
"""Compute capability of the oldest GPU that it is compiled for."""
Defines = tuple[tuple[str, int], ...]
Key = tuple[str, Defines, int]
"""A kernel, what it is compiled with, a device."""
_loaded: dict[Key, Any] = {}
_broken: dict[Key, str] = {}


class NvrtcError(RuntimeError):
    """The compiler or the driver refuses; never raised to users, who get the kernels in Triton."""


@cache
def _missing() -> str | None:
    if torch.version.hip:
        return "CUDA C++ does not run on ROCm"
    try:
        found = find_spec("cuda.bindings")
    except ModuleNotFoundError:  # no `cuda`, or one that is no package
        found = None
    return None if found else "cuda-bindings is not installed"


def why_not(device: torch.device) -> str | None:
    """Why nothing is compiled for a device, or None."""
    if device.type != "cuda":
        return f"CUDA C++ runs on CUDA devices, this is {device.type}"
    if reason := _missing():
        return reason
    found = torch.cuda.get_device_capability(device)
    return None if found >= LEAST else f"CUDA C++ needs compute capability {LEAST[0]}.{LEAST[1]}, this is {found}"


def why_not_compiled(name: str, defines: Defines, device: torch.device) -> str | None:
    """The same for one kernel, which is compiled and loaded at the first call. ``device`` is the current one."""
    if reason := why_not(device):
        return reason
    key = (name, defines, _index(device))
    if key in _loaded or key in _broken:
        return _broken.get(key)
    if torch.cuda.is_current_stream_capturing():
        return "a CUDA graph is being captured, into which nothing can be loaded"
    try:
        _loaded[key] = _load(*key)
    except Exception as error:  # noqa: BLE001  (what cuda-bindings raises without NVRTC or a symbol is of many types)
        _give_up(key, error)
    return _broken.get(key)


def _give_up(key: Key, error: Exception) -> None:
    _broken[key] = f"{key[0]}.cu: {error}"
    warnings.warn(f"kernels in Triton take the place of {key[0]}.cu: {error} (said once)", UserWarning, stacklevel=3)


def compile_source(name: str, defines: Mapping[str, int], arch: str) -> bytes:
    """Machine code of ``cuda/<name>.cu`` for ``arch`` ("sm_90").

    Raises:
        NvrtcError: With what the compiler says.
    """
    from cuda.bindings import nvrtc

    headers = sorted(SOURCES.glob("*.h"))
    program = _checked(
        nvrtc.nvrtcCreateProgram(
            (SOURCES / f"{name}.cu").read_bytes(), f"{name}.cu".encode(), len(headers),
            [header.read_bytes() for header in headers], [header.name.encode() for header in headers],
        )
    )  # fmt: skip
    given = [f"--gpu-architecture={arch}", "--std=c++17", *(f"--define-macro={n}={x}" for n, x in defines.items())]
    (status,) = nvrtc.nvrtcCompileProgram(program, len(given), [option.encode() for option in given])
    if int(status) != 0:
        said = b"\0" * (int(_checked(nvrtc.nvrtcGetProgramLogSize(program))) + 1)  # one byte would be a shared object
        _checked(nvrtc.nvrtcGetProgramLog(program, said))
        raise NvrtcError(said.decode(errors="replace").strip("\0 \n") or repr(status))
    code = b" " * int(_checked(nvrtc.nvrtcGetCUBINSize(program)))
    _checked(nvrtc.nvrtcGetCUBIN(program, code))
    _checked(nvrtc.nvrtcDestroyProgram(program))
    return code


def launch(
    name: str, defines: Defines, arguments: ctypes.Structure, *, grid: tuple[int, int, int], threads: int, shared: int,
    dependent: bool, device: torch.device,
) -> bool:  # fmt: skip
    """One launch on torch's current stream; ``why_not_compiled`` has been asked. Whether the driver took it.

    Args:
        name: Of the file in ``cuda/`` and its kernel.
        defines: What it is compiled with.
        arguments: The kernel's one argument.
        grid: Blocks along x, y and z.
        threads: Of a block.
        shared: Bytes of dynamic shared memory of a block.
        dependent: Whether it may begin while the launch ahead ends (programmatic dependent launch).
        device: The current device.
    """
    from cuda.bindings import driver

    key = (name, defines, _index(device))
    config = driver.CUlaunchConfig()
    config.gridDimX, config.gridDimY, config.gridDimZ = grid
    config.blockDimX, config.blockDimY, config.blockDimZ = threads, 1, 1
    config.sharedMemBytes, config.hStream = shared, torch.cuda.current_stream(device).cuda_stream
    overlap = driver.CUlaunchAttribute()
    overlap.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
    overlap.value.programmaticStreamSerializationAllowed = int(dependent)
    config.attrs, config.numAttrs = [overlap], 1
    addresses = (ctypes.c_void_p * 1)(ctypes.addressof(arguments))
    try:
        _checked(driver.cuLaunchKernelEx(config, _loaded[key], ctypes.addressof(addresses), 0))
    except NvrtcError as error:
        _give_up(key, error)
        return False
    return True


def _load(name: str, defines: Defines, device: int) -> Any:
    """A kernel, loaded on a device, that may have all of its shared memory."""
    from cuda.bindings import driver

    if int(_checked(driver.cuCtxGetCurrent())) == 0:  # a thread that has done nothing on a GPU yet
        primary = driver.cuDevicePrimaryCtxRetain(_checked(driver.cuDeviceGet(device)))
        _checked(driver.cuCtxSetCurrent(_checked(primary)))
    major, minor = torch.cuda.get_device_capability(device)
    code = compile_source(name, dict(defines), f"sm_{major}{minor}")
    function = _checked(driver.cuModuleGetFunction(_checked(driver.cuModuleLoadData(code)), name.encode()))
    found: Any = torch.cuda.get_device_properties(device)
    attribute = driver.CUfunction_attribute
    static = _checked(driver.cuFuncGetAttribute(attribute.CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES, function))
    room = int(found.shared_memory_per_block_optin) - static
    _checked(driver.cuFuncSetAttribute(function, attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, room))
    return function


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


def _checked(said: tuple[Any, ...]) -> Any:
    """What a call of ``cuda.bindings`` gives back behind its status."""
    status, *rest = said
    if int(status) != 0:
        raise NvrtcError(repr(status))
    return rest[0] if len(rest) == 1 else tuple(rest)
