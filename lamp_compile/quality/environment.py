"""What a measurement ran on, for reports: versions and device, no names of people, hosts or folders."""

from __future__ import annotations

import json
import os
import platform
import shutil
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from lamp_compile import __version__

PACKAGES = ("torch", "transformers", "triton", "safetensors", "numpy", "onnxruntime")


def versions() -> dict[str, str | None]:
    """Python and the packages that matter; None where one is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version(), "lamp_compile": __version__}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def device_name(device: torch.device | str) -> str:
    """The device in words."""
    device = torch.device(device)
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    return f"{device.type}, {platform.machine()}, {torch.get_num_threads()} threads"


def environment(device: torch.device | str) -> dict[str, Any]:
    """``{"device", "versions"}``, as every JSON report starts."""
    return {"device": device_name(device), "versions": versions()}


def write_json(path: Path, data: dict[str, Any]) -> None:
    """Write a report; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def cpp_compiler() -> str | None:
    """The C++ compiler that Inductor would find on this machine; None where there is none."""
    named = os.environ.get("CXX")
    return next((name for name in (named, "g++", "clang++", "c++") if name and shutil.which(name)), None)
