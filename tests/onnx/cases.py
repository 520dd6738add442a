"""The node tests that the onnx package ships for operator Attention."""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any


@cache
def attention_cases() -> dict[str, Any]:
    """Name -> test case (``model``, ``data_sets``), those that spell the operator out in others included."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # The whole collection imports the tests of two hundred operators; the import of one adds its cases to the list.
        import onnx.backend.test.case.node.attention  # noqa: F401
        from onnx.backend.test.case import node
    return {case.name: case for case in node._NodeTestCases if case.name.startswith("test_attention_")}
