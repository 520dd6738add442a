"""Readers of ONNX spellings of attention, one per file; the folder's listing is the registry."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import cache

from lamp_compile import _plugins
from lamp_compile.frontends.onnx.patterns._base import OnnxPattern


@cache
def all_patterns() -> Mapping[str, OnnxPattern]:
    """Every pattern in this folder, by name."""
    return _plugins.load(sys.modules[__name__], "PATTERN", OnnxPattern)
