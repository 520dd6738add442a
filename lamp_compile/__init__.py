"""lamp_compile: look-ahead mixed precision for transformer attention, as a graph-compilation pass.

Names are loaded on first use, so that importing the package loads neither torch nor transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "compile": "lamp_compile.api",
    "rewrite": "lamp_compile.api",
    "explain": "lamp_compile.api",
    "disable": "lamp_compile.api",
    "compare": "lamp_compile.diff.api",
    "snapshot": "lamp_compile.diff.api",
    "backend": "lamp_compile.torch_backend",
    "export_onnx": "lamp_compile.onnx_export",
    "rewrite_onnx": "lamp_compile.frontends.onnx.rewriting.rewrite",
    "DecodeStep": "lamp_compile.frontends.huggingface.decode_step",
    "OrtSession": "lamp_compile.runtime.ort.session",
    "NestedCache": "lamp_compile.runtime.kv_cache",
    "Plan": "lamp_compile.plan",
    "SitePlan": "lamp_compile.plan",
    "GuardPlan": "lamp_compile.plan",
    "ControlPlan": "lamp_compile.control_plan",
    "LinearPlan": "lamp_compile.linear_plan",
    "LampError": "lamp_compile.errors",
}
__all__ = [
    "ControlPlan",
    "DecodeStep",
    "GuardPlan",
    "LampError",
    "LinearPlan",
    "NestedCache",
    "OrtSession",
    "Plan",
    "SitePlan",
    "__version__",
    "backend",
    "compare",
    "compile",
    "disable",
    "explain",
    "export_onnx",
    "rewrite",
    "rewrite_onnx",
    "snapshot",
]

if TYPE_CHECKING:
    from lamp_compile.api import compile, disable, explain, rewrite
    from lamp_compile.control_plan import ControlPlan
    from lamp_compile.diff.api import compare, snapshot
    from lamp_compile.errors import LampError
    from lamp_compile.frontends.huggingface.decode_step import DecodeStep
    from lamp_compile.frontends.onnx.rewriting.rewrite import rewrite_onnx
    from lamp_compile.linear_plan import LinearPlan
    from lamp_compile.onnx_export import export_onnx
    from lamp_compile.plan import GuardPlan, Plan, SitePlan
    from lamp_compile.runtime.kv_cache import NestedCache
    from lamp_compile.runtime.ort.session import OrtSession
    from lamp_compile.torch_backend import backend


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'lamp_compile' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
