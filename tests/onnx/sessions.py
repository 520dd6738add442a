"""Run a model and its rewritten self on stock ONNX Runtime, or on onnx's reference evaluator."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

from lamp_compile.frontends.onnx.rewriting.rewrite import RewrittenOnnx, rewrite_onnx
from tests import tolerances


def run(model: onnx.ModelProto, feeds: dict[str, Any]) -> list[np.ndarray]:
    """Outputs of a model on the CPU provider."""
    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, 1
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, feeds)  # type: ignore[no-any-return]


def error(got: np.ndarray, wanted: np.ndarray) -> float:
    """Relative error of one output."""
    assert got.shape == wanted.shape
    a, b = got.astype(np.float64), wanted.astype(np.float64)
    assert np.isfinite(a).all()
    return float(np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-9))


def sound(done: RewrittenOnnx, original: onnx.ModelProto) -> onnx.ModelProto:
    """The rewritten model, once it passes the full checks and has the original's inputs and outputs."""
    onnx.checker.check_model(done.model, full_check=True)
    onnx.shape_inference.infer_shapes(done.model, check_type=True, strict_mode=True, data_prop=True)
    for field in ("input", "output"):
        assert getattr(done.model.graph, field) == getattr(original.graph, field)
    return done.model


def compared(model: onnx.ModelProto, feeds: dict[str, Any], sites: int = 1, **options: Any) -> RewrittenOnnx:
    """Rewrite it; the result must be close with both planes, clearly worse with the high plane alone (so that the
    original attention has gone), and the count of sites right."""
    wanted = run(model, feeds)
    done = rewrite_onnx(model, tau=0.0, **options)
    assert len(done.report.rewritten) == len(done.report.sites) == sites
    close = error(run(sound(done, model), feeds)[0], wanted[0])
    assert 0 < close < tolerances.REWRITTEN.relative
    coarse = error(run(rewrite_onnx(model, tau=1e9, **options).model, feeds)[0], wanted[0])
    assert coarse > tolerances.HIGH_OVER_BOTH * close
    return done
