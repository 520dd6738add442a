"""The compiled core: found, loaded, and asked what this machine can run. No torch headers, a plain C interface."""

from __future__ import annotations

import ctypes
import os
import platform
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch

pointer = ctypes.byref
VARIABLE = "LAMP_CPU"
"""Environment variable: an instruction set to use instead of the best ("avx2"), or "none" for the reference."""

_I, _P, _F = ctypes.c_int64, ctypes.c_void_p, ctypes.c_float
_PLANES = ["k_high", "k_residual", "k_scale", "v_high", "v_residual", "v_scale", "table"]
_PLANE_SIZES = ["table_stride", "pages", "stored_tiles", "tile", "half_k", "half_v", "kv_heads", "by_lanes"]
_INTEGERS = ("data", "bytes", "stride")


TORCH = {
    "library": "aoti_torch_library_init_impl", "implement": "torch_library_impl", "call": "torch_call_dispatcher",
    "data": "aoti_torch_get_data_ptr", "dim": "aoti_torch_get_dim", "sizes": "aoti_torch_get_sizes",
    "strides": "aoti_torch_get_strides", "dtype": "aoti_torch_get_dtype", "empty": "aoti_torch_empty_strided",
    "drop_tensor": "aoti_torch_delete_tensor_object", "text": "torch_string_c_str", "drop_text": "torch_delete_string",
    "threads": "torch_get_num_threads", "float32": "aoti_torch_dtype_float32", "bfloat16": "aoti_torch_dtype_bfloat16",
    "float16": "aoti_torch_dtype_float16", "uint8": "aoti_torch_dtype_uint8", "int32": "aoti_torch_dtype_int32",
    "int64": "aoti_torch_dtype_int64", "boolean": "aoti_torch_dtype_bool",
    "drop_argument": "torch_delete_stable_ivalue",
}  # fmt: skip
"""Functions of torch's stable C interface, by the core's names for them."""
SINCE_LATER = ("drop_argument",)
"""Those that older versions do without."""


def _fields(*groups: tuple[type, str]) -> list[tuple[str, type]]:
    return [(name, kind) for kind, names in groups for name in names.split()]


_HEAD = _fields((_P, " ".join(_PLANES)), (_I, " ".join(_PLANE_SIZES)), (_P, "k_signs"), (_I, "k_base"),
                (_P, "v_signs"), (_I, "v_base"))  # fmt: skip
"""Both calls begin with the planes and two rotations, written out field by field: one flat structure is filled faster
than nested ones, and lies in memory just as they do."""


class Append(ctypes.Structure):
    """``LampAppend`` of ``core/lamp_core.h``."""

    _fields_ = _HEAD + _fields(
        (_P, "k v"), (_I, "dtype batch rows k0 k1 k2 v0 v1 v2"), (_P, "balance"), (_I, "balance_stride"),
        (_P, "positions"), (_I, "positions_bytes positions_stride threads"),
    )  # fmt: skip


class Attend(ctypes.Structure):
    """``LampAttend`` of ``core/lamp_core.h``."""

    _fields_ = _HEAD + _fields(
        (_P, "q"), (_I, "dtype batch heads queries q0 q1 q2"), (_P, "balance"), (_I, "balance_stride"),
        (_P, "tau floor budget"), (_I, "tau_stride floor_stride budget_stride"), (_P, "state stats mask"),
        (_I, "mask0 mask1 mask2 mask3 mask_keys"), (_P, "bias"), (_I, "bias0 bias1 bias2 bias3 bias_keys"),
        (_P, "sinks start"), (_I, "start_bytes start_stride"), (_P, "lengths"), (_I, "lengths_bytes lengths_stride"),
        (_I, "keys causal window"), (_F, "scale softcap"), (_I, "rule subtile guard_window guard_hold"),
        (_F, "hysteresis"), (_P, "out lse certificate"), (_I, "threads"),
    )  # fmt: skip


class Predict(ctypes.Structure):
    """``LampPredict`` of ``core/lamp_core.h``."""

    _fields_ = _fields(
        (_P, "summary history trust query"), (_I, "query_dtype"), (_P, "query_bias age extra limit margin"),
        (_I, "rank group tiles trained"), (_F, "skip"),
    )  # fmt: skip


class Summarize(ctypes.Structure):
    """``LampSummarize`` of ``core/lamp_core.h``."""

    _fields_ = _fields(
        (_P, " ".join(_PLANES)), (_I, " ".join(_PLANE_SIZES)), (_P, "summary key"), (_I, "key_dtype"), (_P, "key_bias"),
        (_I, "batch rank group"), (_P, "positions"), (_I, "positions_bytes positions_stride threads"),
    )  # fmt: skip


class Torch(ctypes.Structure):
    """``LampTorch`` of ``core/torch_abi.h``: addresses of torch's own functions."""

    _fields_ = [(name, _P) for name in TORCH]


@cache
def path() -> Path | None:
    """Where the compiled core lies, or None where the package was installed without a compiler."""
    file = Path(__file__).parent / "_core.so"
    return file if file.exists() else None


@cache
def load() -> ctypes.CDLL:
    """The core, with its threads joined to torch's.

    Raises:
        OSError: It is not there or does not load.
        AttributeError, RuntimeError: It was built from other sources than these.
    """
    file = path()
    if file is None:
        raise OSError("the core was not compiled")
    core = ctypes.CDLL(str(file))
    core.lamp_instruction_set.restype = core.lamp_instruction_sets.restype = ctypes.c_char_p
    core.lamp_use_threads_of.argtypes = [_P]
    core.lamp_append.argtypes = core.lamp_attend.argtypes = core.lamp_summarize.argtypes = [_P]
    core.lamp_attend_predicted.argtypes = [_P, _P]
    core.lamp_served.restype = _I
    core.lamp_join_torch.argtypes, core.lamp_refuse.argtypes = [_P], [ctypes.c_char_p]
    structures = {"append": Append, "attend": Attend, "predict": Predict, "summarize": Summarize, "torch": Torch}
    for name, structure in structures.items():
        size = getattr(core, f"lamp_size_of_{name}")
        size.restype = _I
        if size() != ctypes.sizeof(structure):
            raise RuntimeError(f"{file.name} was built from other sources; install the package again")
    core.lamp_use_threads_of(_gomp_parallel())
    return core


@cache
def join_torch() -> str | None:
    """Have torch call the core for ``lamp::append`` and ``lamp::fused_attention`` on CPUs, once their schemas are
    known. Without it they go by Python, which takes longer than a short context. Returns why that is so, or None."""
    if reason := why_not():
        return reason
    functions = Torch()
    try:
        library = ctypes.CDLL(_torch_library())
        for name, symbol in TORCH.items():
            if name in SINCE_LATER and not hasattr(library, symbol):
                continue
            setattr(functions, name, ctypes.cast(getattr(library, symbol), _P).value)
    except (OSError, AttributeError) as error:
        return f"torch {torch.__version__} has no stable C interface that the core knows: {error}"
    if load().lamp_join_torch(pointer(functions)) != 0:
        return f"torch {torch.__version__} did not take the core's kernels"
    return None


def _torch_library() -> str:
    """The file that torch's functions for CPUs are in; it is loaded already."""
    names = {"Windows": "torch_cpu.dll", "Darwin": "libtorch_cpu.dylib"}
    return str(Path(torch.__file__).parent / "lib" / names.get(platform.system(), "libtorch_cpu.so"))


@contextmanager
def without_torch() -> Iterator[None]:
    """Calls of torch's dispatcher are all handed on to Python as long as this lasts, in every thread."""
    if join_torch() is not None:
        yield
        return
    core = load()
    before = core.lamp_serve_torch(0)
    try:
        yield
    finally:
        core.lamp_serve_torch(before)


def served() -> int:
    """How many calls of torch's dispatcher the core has taken as they came."""
    return 0 if join_torch() is not None else int(load().lamp_served())


def refuse(reason: str) -> bool:
    """Say why the operator that the core has handed a call on to will not do it; False where this thread is in none."""
    return join_torch() is None and bool(load().lamp_refuse(reason.encode()))


def _gomp_parallel() -> int | None:
    """Address of ``GOMP_parallel`` in the OpenMP runtime that torch has loaded: its threads are awake already, and
    a second set would compete with them. None where torch has another runtime; the core then starts its own."""
    if platform.system() != "Linux":
        return None
    try:
        function = ctypes.CDLL(None).GOMP_parallel
    except AttributeError:
        return None
    return ctypes.cast(function, ctypes.c_void_p).value


@cache
def why_not() -> str | None:
    """Why the core does not run here, or None."""
    wanted = os.environ.get(VARIABLE, "")
    if wanted == "none":
        return f"{VARIABLE}=none"
    if path() is None:
        return f"the CPU kernels were not compiled when this package was installed ({_compiler()})"
    try:
        core = load()
    except (OSError, AttributeError, RuntimeError) as error:
        return f"the CPU kernels do not load: {error}"
    if wanted and core.lamp_use(wanted.encode()) != 0:
        reason = f"{VARIABLE}={wanted}: this machine has {core.lamp_instruction_sets().decode()}"
        warnings.warn(f"{reason}; on CPUs the reference runs, slowly", stacklevel=2)
        return reason
    return None


def _compiler() -> str:
    """What may have been missing."""
    if platform.system() == "Windows":
        return "no clang-cl? Visual Studio has it as 'C++ Clang tools for Windows'"
    return "no C++ compiler?"


def threads() -> str:
    """Whose threads the core runs on."""
    if _gomp_parallel():
        return "on torch's threads"
    return "on threads of its own, started for every call: torch has another OpenMP runtime than GCC's"


def instruction_set() -> str:
    """The one in use: "avx512", "avx2", "neon" or "portable"; empty without a core."""
    return "" if why_not() else str(load().lamp_instruction_set().decode())


def instruction_sets() -> tuple[str, ...]:
    """All that run here, best first; none without a core that loads."""
    try:
        return tuple(load().lamp_instruction_sets().decode().split(","))
    except (OSError, AttributeError, RuntimeError):
        return ()
