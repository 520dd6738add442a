"""Compiles the launches that a call would make, for GPUs that are not here.

A launcher runs on CPU tensors with its kernels replaced by recorders; what they are given is specialised as Triton's
own launcher does it (None and 1 become constants, multiples of 16 are marked), and compiled for the target.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_86": GPUTarget("cuda", 86, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
    "gfx950": GPUTarget("hip", "gfx950", 64),
}
_TYPES = {
    torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.uint8: "*u8", torch.int8: "*i8",
    torch.int32: "*i32", torch.int64: "*i64", torch.bool: "*i1",
}  # fmt: skip
OPTIONS = ("num_warps", "num_stages", "launch_pdl", "waves_per_eu", "maxnreg")


class Recorder:
    """Stands in for a kernel; keeps the arguments of its launches."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.calls: list[tuple[tuple[int, ...], tuple[Any, ...], dict[str, Any]]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *args, **kwargs: self.calls.append((grid, args, kwargs))


def compile_call(kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any], target: GPUTarget) -> Any:
    """The compiled kernel of one recorded launch."""
    options = {name: kwargs[name] for name in OPTIONS if name in kwargs}
    given = {name: value for name, value in kwargs.items() if name not in options}
    given.update(zip(kernel.arg_names, args, strict=False))
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        name, value = parameter.name, given.pop(parameter.name)
        special = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (special and isinstance(value, int) and value == 1):
            signature[name], constants[(index,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = _TYPES[value.dtype]
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif isinstance(value, int):
            signature[name] = "i32"
            if special and value % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32"
    assert not given, f"{kernel.__name__} has no arguments {sorted(given)}"
    return triton.compile(ASTSource(kernel, signature, constants, attributes), target=target, options=options)


def spilled(made: Any, target: GPUTarget) -> int:
    """Bytes of registers that a compiled kernel keeps in memory."""
    if target.backend == "hip":
        found = re.search(r"\.private_segment_fixed_size: (\d+)", made.asm["amdgcn"])
        return int(found.group(1)) if found else -1
    return local_memory(made.asm["cubin"])


def local_memory(code: bytes) -> int:
    """Bytes of a thread's stack and registers in memory, of NVIDIA's machine code."""
    tool = triton.knobs.nvidia.cuobjdump.path
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code)
        file.flush()
        report = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    return sum(int(number) for number in re.findall(r"(?:LOCAL|STACK):(\d+)", report.stdout))
