"""``lamp-compile doctor``: versions, devices, what is available here, what is not and why."""

from __future__ import annotations

import argparse
from typing import Any

from lamp_compile.commands import _output

NAME, HELP = "doctor", "versions, devices, what is available here, what is not and why"


def add(parser: argparse.ArgumentParser) -> None:
    """No options of its own."""


def run(args: argparse.Namespace) -> int:
    """Look around and say so."""
    found = examine()
    if args.json:
        _output.print_json(found)
        return 0
    for name, version in found["versions"].items():
        print(f"{name:14s} {version or 'not installed'}")
    for device in found["devices"]:
        print(f"device         {device}")
    for item in found["features"]:
        print(f"{'yes' if item['available'] else 'no ':3s} {item['name']}: {item['detail']}")
    return 0


def examine() -> dict[str, Any]:
    """Versions, devices and features as data."""
    import torch

    from lamp_compile.quality.environment import cpp_compiler, device_name, versions
    from lamp_compile.runtime import formats, lookahead

    installed = versions()
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    rules = [rule.name for rule in lookahead.all_rules().values() if not rule.control]

    def package(name: str, gives: str, fix: str) -> dict[str, Any]:
        have = installed.get(name) is not None
        return {
            "name": gives,
            "available": have,
            "detail": f"{name} {installed[name]}" if have else f"{name} is missing: {fix}",
        }

    compiler = cpp_compiler()
    built = torch.version.cuda or torch.version.hip
    no_gpu = "this torch is a CPU build" if built is None else "torch sees no device"
    features = [
        package("transformers", "Hugging Face models", "pip install 'lamp_compile[hf]'"),
        package("onnxruntime", "ONNX Runtime", "pip install 'lamp_compile[onnx-cpu]'"),
        {
            "name": "compiled decoding on the CPU",
            "available": compiler is not None,
            "detail": compiler or "no C++ compiler for Inductor: install g++ or clang++, or use mode='eager'",
        },
        {"name": "GPU", "available": count > 0, "detail": f"{count} found" if count else no_gpu},
        _kernels(count, no_gpu, installed["triton"]),
        _cpu_kernels(),
        *_onnxruntime(installed["onnxruntime"]),
        {"name": "storage formats", "available": True, "detail": ", ".join(formats.all_formats())},
        {"name": "selection rules", "available": True, "detail": ", ".join(rules)},
    ]
    devices = [device_name("cpu"), *(device_name(f"cuda:{index}") for index in range(count))]
    return {"versions": installed, "devices": devices, "features": features}


def _kernels(devices: int, no_gpu: str, version: str | None) -> dict[str, Any]:
    """Whether the kernels run here, and as what each device is compiled for; else everything that is missing."""
    import torch

    from lamp_compile.runtime import kernels

    reason = kernels.why_not_device("cuda")
    missing = [no_gpu] if not devices else []
    if reason:
        missing.append(f"{reason}: pip install 'lamp_compile[kernels]' (CUDA and ROCm builds of torch bring it)")
    if missing:
        return {"name": "GPU kernels", "available": False, "detail": "; ".join(missing)}
    from lamp_compile.runtime.kernels import nvrtc
    from lamp_compile.runtime.kernels.targets import target_of

    found = [torch.device("cuda", index) for index in range(devices)]
    refused = [kernels.why_not_model(device) for device in found]
    served = [reason or target_of(device).name for device, reason in zip(found, refused, strict=True)]
    compiler = f"CUDA C++: {nvrtc.why_not(found[0]) or 'by NVRTC'}"
    return {
        "name": "GPU kernels",
        "available": None in refused,
        "detail": f"triton {version or 'of torch'}, for {', '.join(served)}; {compiler}",
    }


def _cpu_kernels() -> dict[str, Any]:
    """Which instruction set the CPU kernels use, of those that they have here; or why there are none."""
    from lamp_compile.runtime import fused_ops as _fused_ops  # noqa: F401  (defines what torch is joined for)
    from lamp_compile.runtime.kernels import cpu

    reason = cpu.why_not()
    if reason:
        detail = f"{reason}; decoding on a CPU runs the reference, which is slower than the model itself"
    else:
        found, alone = ", ".join(cpu.instruction_sets()), cpu.join_torch()
        called = (
            "called by torch itself" if alone is None else f"called by Python, which short contexts notice ({alone})"
        )
        lie = (
            "by lanes"
            if cpu.by_lanes()
            else "by rows; programs exported where they lie by lanes run slower here than ones exported here"
        )
        detail = (
            f"{cpu.instruction_set()}, {called}, {cpu.threads()}, planes {lie} "
            f"(this machine has {found}; LAMP_CPU=NAME takes another, LAMP_CPU=none none)"
        )
    return {"name": "CPU kernels", "available": reason is None, "detail": detail}


def _onnxruntime(version: str | None) -> list[dict[str, Any]]:
    """The execution providers that are there, and whether the native operators of ``ai.lamp`` can be used."""
    from lamp_compile.errors import OptionError
    from lamp_compile.runtime.ort import _library, providers

    reason = _library.why_not()
    native = f"{_library.instruction_set()}, on {providers.CPU}" if reason is None else f"{reason}; {_library.PORTABLE}"
    there = False
    if version is None:
        detail = f"onnxruntime is missing: {providers.INSTALL[providers.CPU]}"
    else:
        try:
            detail = ", ".join(providers.onnxruntime().get_available_providers())
            detail += "; its telemetry is switched off in processes that lamp_compile starts"
            there = True
        except OptionError as error:
            detail = error.what
    return [
        {"name": "ONNX Runtime providers", "available": there, "detail": detail},
        {"name": "native ai.lamp operators for ONNX Runtime", "available": there and reason is None, "detail": native},
    ]
